"""
The run folder: who may write to it, what a run in it goes on from, and what that must leave as it was.

What is left out: what lies in it (log.py, checkpoint.py, report.py). Tests: tests/test_cli.py, test_bad_input.py
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from control.preflight import refuse
from extensions import oprd
from record import checkpoint, log

if TYPE_CHECKING:
    from asyncopd import Config

# What a run that goes on must leave as it was: the order of its prompts, its slots and its model
FIXED = ("student", "task", "prompt_key", "filter", "prompt_template", "prompt_suffix", "thinking", "eval_task",
         "eval_n", "max_prompt", "max_response", "long_prompts", "seed", "batch", "minibatches", "schedule",
         "kl", "estimator", "lora_rank", "oprd_weight", "oprd_rank", "oprd_layers", "oprd_bridge", "effopd",
         "rock", "rock_set")


def recorded(out: str, defaults: dict) -> dict:
    """The configuration of the run in a folder, as it was last started; what it did not know yet has its default."""
    out or refuse("--resume needs --out, the folder of the run that is to go on")
    try:
        lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        starts = [lines[0], *(line for line in lines[1:] if line.startswith('{"type": "run"'))]
        of_last = json.loads(starts[-1])["config"]       # it may have been given other flags
        return {name: of_last.get(name, default) for name, default in defaults.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        refuse(f"--resume: {out}/log.jsonl does not begin as a run's log does ({type(e).__name__}: {e})")


def check_same(cfg: Config, before: dict) -> None:
    """Refuse what a resumption cannot change. Projected states, the set of a gate and the losses of rocks are those of
    one teacher."""
    for name in (*FIXED, *(["teacher"] if cfg.oprd_weight or cfg.effopd == "kl" or cfg.rock else [])):
        getattr(cfg, name) == before[name] or refuse(f"--{name.replace('_', '-')} {getattr(cfg, name)}: --resume "
                                                     f"cannot change the {before[name]} of the run in {cfg.out}")


def check_out(cfg: Config) -> Path | None:
    """Refuse a folder that cannot be written to; the checkpoint to go on from, with --resume."""
    out = Path(cfg.out)
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    there.is_dir() or refuse(f"--out {cfg.out}: {there} is a file, not a folder")
    os.access(there, os.W_OK) or refuse(f"--out {cfg.out}: {there} is not to be written to")
    if (out / "log.jsonl").exists():
        log.Log.taken(out) and refuse(f"--out {cfg.out}: a run is at work there")
    if cfg.resume:
        folder, faults = checkpoint.newest(out / "checkpoints")
        folder or refuse(f"--resume: no whole checkpoint in {out}/checkpoints ({'; '.join(faults) or 'none at all'})")
        for fault in faults:
            print(f"asyncopd: {fault}: going on from {folder.name}", file=sys.stderr)
        int(folder.name[5:]) <= cfg.steps or refuse(f"--steps {cfg.steps}: the run in {out} is at {folder.name}")
        cfg.oprd_rank == 0 or (out / oprd.FILE).exists() or refuse(f"--resume: {out / oprd.FILE} is gone")
        return folder
    if out.exists() and any(out.iterdir()):
        cfg.overwrite or refuse(f"--out {cfg.out}: not empty (--overwrite empties it)")
        (out / "log.jsonl").exists() or refuse(f"--out {cfg.out}: holds no log.jsonl, so it is no run to overwrite")
        for name in ("student", "teacher", "task", "eval_task"):
            used = Path(getattr(cfg, name))
            if used.exists() and used.resolve().is_relative_to(out.resolve()) and getattr(cfg, name):
                refuse(f"--overwrite would delete --{name.replace('_', '-')} {used}, which lies in --out {cfg.out}")


def empty(folder: Path) -> None:
    """An empty folder there, which may be a link or a mount: only what is in it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def recorded_flags(out: str) -> dict[str, object]:
    """By names with dots, the flags of the run in a folder as it was last started.

    Raises ValueError where `out` is empty or holds no log of a run.
    """
    raise NotImplementedError(out)

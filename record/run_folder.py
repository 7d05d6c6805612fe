"""
The run folder: who may write to it, what a resumed run goes on from, and what it may not change.

Left out: the files in it (log.py, checkpoint.py, report.py, timeline.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from config import require
from extensions import oprd
from record import checkpoint, log

if TYPE_CHECKING:
    from asyncopd import Config

# What a resumed run may not change: the order of prompts, the slots and the model depend on these
FIXED = ("student", "task", "prompt_key", "filter", "prompt_template", "prompt_suffix", "thinking",
         "eval_task", "eval_n", "max_prompt", "max_response", "long_prompts", "seed", "batch",
         "minibatches", "schedule", "kl", "estimator", "lora_rank", "oprd_weight", "oprd_rank",
         "oprd_layers", "oprd_bridge", "effopd", "rock", "rock_set")
INPUTS = ("student", "teacher", "task", "eval_task")       # flags that may name a file or folder


# -- going on with a run -------------------------------------------------------------------------

def recorded(out: str, defaults: dict) -> dict:
    """The configuration of the run in a folder, as it was last started.

    A flag that the run did not have yet gets its default. Raises ValueError if there is no run.
    """
    require(out, "--resume needs --out, the folder of the run that is to go on")
    try:
        lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        starts = [line for line in lines[1:] if line.startswith('{"type": "run"')]
        last = [lines[0], *starts][-1]             # a resumption may have been given other flags
        config = json.loads(last)["config"]
        return {name: config.get(name, default) for name, default in defaults.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(f"--resume: {out}/log.jsonl does not begin as a run's log does "
                         f"({type(e).__name__}: {e})") from e


def check_same(cfg: Config, before: dict) -> None:
    """Raise ValueError for a flag that a resumption cannot change.

    Projected states, the set of a gate and the losses of rocks belong to one teacher.
    """
    fixed = list(FIXED)
    if cfg.oprd_weight or cfg.effopd == "kl" or cfg.rock:
        fixed.append("teacher")
    for name in fixed:
        value = getattr(cfg, name)
        require(value == before[name], f"{flag(name)} {value}: --resume cannot change the "
                                       f"{before[name]} of the run in {cfg.out}")


# -- before a run --------------------------------------------------------------------------------

def check_out(cfg: Config) -> Path | None:
    """The checkpoint to go on from with --resume, else None.

    Raises ValueError for a folder that this run may not write to.
    """
    out = Path(cfg.out)
    check_writable(cfg.out)
    if (out / "log.jsonl").exists():
        require(not log.in_use(out / "log.jsonl"),
                f"--out {cfg.out}: a run is writing to it (choose another folder, or stop it)")
    if cfg.resume:
        return resume_point(cfg)
    if out.exists() and any(out.iterdir()):
        check_overwrite(cfg)
    return None


def check_writable(out: str) -> None:
    """The folder, or the nearest existing one above it, must be a folder and writable."""
    paths = (Path(out), *Path(out).absolute().parents)
    existing = next(path for path in paths if path.exists())
    require(existing.is_dir(), f"--out {out}: {existing} is a file, not a folder")
    require(os.access(existing, os.W_OK), f"--out {out}: no permission to write to {existing}")


def resume_point(cfg: Config) -> Path:
    """The newest complete checkpoint. Says on stderr what is wrong with newer ones."""
    out = Path(cfg.out)
    folder, faults = checkpoint.newest(out / "checkpoints")
    found = "; ".join(faults) or "none at all"
    require(folder is not None, f"--resume: no complete checkpoint in {out}/checkpoints ({found})")
    for fault in faults:
        print(f"asyncopd: {fault}: going on from {folder.name}", file=sys.stderr)
    require(checkpoint.step_of(folder) <= cfg.steps,
            f"--steps {cfg.steps}: the run in {out} is already at {folder.name}")
    if cfg.oprd_rank:
        require((out / oprd.FILE).exists(), f"--resume: {out / oprd.FILE} is missing")
    return folder


def check_overwrite(cfg: Config) -> None:
    """A folder that is not empty may be emptied only if --overwrite is given, if it holds a run,
    and if no input of this run lies in it."""
    out = Path(cfg.out)
    require(cfg.overwrite, f"--out {cfg.out}: not empty (--overwrite empties it)")
    require((out / "log.jsonl").exists(),
            f"--out {cfg.out}: no log.jsonl there, so it is not a run that --overwrite may empty")
    for name in INPUTS:
        value = getattr(cfg, name)
        if value and Path(value).exists():
            inside = Path(value).resolve().is_relative_to(out.resolve())
            require(not inside,
                    f"--overwrite would delete {flag(name)} {value}: it lies in --out {cfg.out}")


def empty(folder: Path) -> None:
    """Make a folder, or empty it. The folder itself may be a link or a mount, so it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def flag(name: str) -> str:
    """The flag of a field of Config."""
    return f"--{name.replace('_', '-')}"

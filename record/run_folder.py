"""
The run folder: who may write to it, what a resumed run continues from, and what it may not change.

What is left out: the files in it (log.py, checkpoint.py, report.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from config import Config, each_flag, flag_of, require
from record import checkpoint, log

# What a resumed run may not change: the order of prompts, the slots and the model depend on these
FIXED = ("student", "task", "data.prompt_key", "data.filter", "data.template", "data.suffix",
         "data.thinking", "data.long_prompts", "data.eval_task", "eval.n", "max_prompt",
         "max_response", "seed", "batch", "minibatches", "schedule", "kl", "estimator",
         "lora_rank", "extend")
INPUTS = ("student", "teacher", "task", "data.eval_task")      # may name a file or folder


def recorded_flags(out: str) -> dict[str, object]:
    """By names with dots, the flags of the run in a folder as it was last started.

    Raises ValueError where `out` is empty or holds no log of a run.
    """
    require(out, "--resume needs --out, the folder of the run that is to continue")
    try:
        lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        starts = [line for line in lines[1:] if line.startswith('{"type": "run"')]
        last = [lines[0], *starts][-1]             # a resumption may have been given other flags
        return dict(flattened(json.loads(last)["config"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise ValueError(f"--resume: {out}/log.jsonl does not begin as a run's log does "
                         f"({type(e).__name__}: {e})") from None


def flattened(config: dict) -> Iterator[tuple[str, object]]:
    """(name with dots, value) of every flag of a recorded configuration."""
    for name, value in config.items():
        if name == "extensions":
            yield from flattened(value)
        elif isinstance(value, dict):
            yield from ((f"{name}.{inner}", x) for inner, x in value.items())
        else:
            yield name, value


def check_same(cfg: Config, before: Mapping[str, object], further: Sequence[str] = ()) -> None:
    """Raise ValueError for a flag that a resumption cannot change: those of FIXED and `further`.

    before: the flags of the run that continues. All names are with dots.
    """
    now = dict(each_flag(cfg))
    for name in (*FIXED, *further):
        require(now[name] == before[name],
                f"{flag_of(name)} {now[name]}: --resume cannot change the {before[name]} of the "
                f"run in {cfg.out}")


# -- before a run ---------------------------------------------------------------------------------

def check_out(cfg: Config) -> Path | None:
    """The checkpoint to continue from with --resume, else None.

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
        print(f"asyncopd: {fault}: continuing from {folder.name}", file=sys.stderr)
    require(checkpoint.step_of(folder) <= cfg.steps,
            f"--steps {cfg.steps}: the run in {out} is already at {folder.name}")
    return folder


def check_overwrite(cfg: Config) -> None:
    """A folder that is not empty may be emptied only if --overwrite is given, if it holds a run,
    and if no input of this run lies in it."""
    out = Path(cfg.out)
    require(cfg.overwrite, f"--out {cfg.out}: not empty (--overwrite empties it)")
    require((out / "log.jsonl").exists(),
            f"--out {cfg.out}: no log.jsonl there, so it is not a run that --overwrite may empty")
    values = dict(each_flag(cfg))
    for name in INPUTS:
        value = values[name]
        if value and Path(value).exists():
            inside = Path(value).resolve().is_relative_to(out.resolve())
            require(not inside,
                    f"--overwrite would delete {flag_of(name)} {value}: it lies in --out "
                    f"{cfg.out}")


def empty(folder: Path) -> None:
    """Make a folder, or empty it. The folder itself may be a link or a mount, so it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

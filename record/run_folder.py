"""
The run folder: who may write to it, what a resumed run continues from, and what it may not change.

What is left out: the files in it (log.py, checkpoint.py, report.py).
Tests: tests/test_run_folder.py, tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from config import Config, each_flag, flag_of, require
from data.printable import printable
from record import checkpoint

CLAIM = ".claim"               # the file in a run folder that its run holds locked
ATTEMPTS = 100                 # at a claim, while others give up the same folder

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


# -- whose folder it is ---------------------------------------------------------------------------

class Claim:
    """The right to write to a run folder, until `release` or the end of the process.

    It is a lock on the file .claim in the folder, which the kernel ends with the process.
    """

    def __init__(self, folder: Path, file, made: int = 0):
        """`made`: how many folders were made for the claim, `folder` itself and those above."""
        self.folder = folder
        self.file = file
        self.made = made
        # A copy of this process must not hold the lock as well
        os.register_at_fork(after_in_child=file.close)

    def release(self) -> None:
        """Remove the file, and the folders that were made for it, as far as they are empty."""
        with contextlib.suppress(OSError):       # a person may have removed the folder
            self.remove()
        self.file.close()

    def remove(self) -> None:
        if not self.made or os.listdir(self.folder) != [CLAIM]:
            (self.folder / CLAIM).unlink()
            return
        aside = partial_name(self.folder)        # first out of the way of others, then removed
        self.folder.rename(aside)
        (aside / CLAIM).unlink()
        aside.rmdir()
        for above in self.folder.parents[:self.made - 1]:
            above.rmdir()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim_folder(cfg: Config) -> tuple[Config, Claim]:
    """Claim --out, or a new folder with a name of its own where --out is not given.

    Returns the flags with the folder's name. Raises ValueError where another run holds the folder.
    """
    if not cfg.out:
        task = Path(cfg.task).stem.replace(":", "-")
        claim = claim_unused(f"runs/{task}-{time.strftime('%Y%m%d-%H%M%S')}")
        return replace(cfg, out=str(claim.folder)), claim
    check_writable(cfg.out)
    try:
        claim = claim_path(Path(cfg.out))
    except OSError as e:
        raise ValueError(f"--out {cfg.out}: cannot be written to ({e.strerror})") from None
    require(claim, f"--out {cfg.out}: a run is writing to it (choose another folder, or stop it)")
    return cfg, claim


def claim_unused(name: str) -> Claim:
    """Claim a folder that is not there: `name`, or NAME-2, NAME-3, .. while it is taken."""
    number = 1
    while True:
        folder = Path(name if number == 1 else f"{name}-{number}")
        claim = None
        if not folder.exists():
            claim = claim_new(folder)
        if claim is not None:
            return claim
        if folder.exists():
            number += 1


def claim_path(folder: Path) -> Claim | None:
    """Claim a folder, which is made if it is not there; None if another process holds it."""
    for attempt in range(ATTEMPTS):
        try:
            if folder.is_dir():
                return claim_old(folder)
            claim = claim_new(folder)
        except FileNotFoundError:                # another process has just removed it
            if attempt == ATTEMPTS - 1:
                raise
            continue
        if claim is not None:
            return claim
    return None


def claim_old(folder: Path) -> Claim | None:
    """Claim a folder that is there; None if another process holds it. FileNotFoundError if that
    one has released it meanwhile: then the locked file is not the one in the folder."""
    file = open(folder / CLAIM, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / CLAIM)):
            raise FileNotFoundError
    except BlockingIOError:
        file.close()
        return None
    except FileNotFoundError:
        file.close()
        raise
    return Claim(folder, file)


def claim_new(folder: Path) -> Claim | None:
    """Make a folder, and those above it, that appear with the claim in them; None if another
    process has made them meanwhile."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if not missing:
        return None
    top = missing[-1]
    partial = partial_name(top)
    inside = partial / folder.relative_to(top)
    try:
        inside.mkdir(parents=True)
        file = open(inside / CLAIM, "a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.rename(top)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if top.exists():
            return None
        raise
    return Claim(folder, file, made=len(missing))


def partial_name(folder: Path) -> Path:
    """A name that no other process uses."""
    return folder.with_name(f".{folder.name}-{os.getpid()}")


# -- before a run ---------------------------------------------------------------------------------

def check_out(cfg: Config) -> Path | None:
    """The checkpoint to continue from with --resume, else None.

    Raises ValueError for a folder that this run may not write to. Of a killed command only the
    file of its claim may be left: such a folder counts as empty.
    """
    if cfg.resume:
        return resume_point(cfg)
    if any(entry.name != CLAIM for entry in Path(cfg.out).iterdir()):
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
        print(printable(f"asyncopd: {fault}: continuing from {folder.name}"), file=sys.stderr)
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
    """Empty a folder, all but its claim. The folder itself may be a link or a mount, so it
    stays."""
    for entry in folder.iterdir():
        if entry.name == CLAIM:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

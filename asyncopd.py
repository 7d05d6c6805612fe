"""
Asynchronous on-policy distillation: a student writes, a teacher scores, a learner updates, all
at the same time.

    .venv/bin/python asyncopd.py --gpus 8 --kl reverse --mc-samples 4
    .venv/bin/python asyncopd.py --gpus 0           # no GPU: the same processes, a toy model

This file is the command: flags, checks, the run, and the exit code.

    0    done                       2    bad input, nothing is left
    1    the run failed             130  interrupted

Reading order: README.md; the folders: docs/architecture.md. What is left out: several machines.
Tests: tests/test_cli.py, tests/test_bad_input.py, tests/test_pipeline.py
"""
from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config
from control import dryrun
from control.command_line import Given
from control.controller import Controller
from control.plan import plan
from control.preflight import Job, prepare, prepare_extensions
from control.preflight_models import fetch
from control.resolve import configure_given
from control.signals import SIGNALS
from data.printable import printable
from record.report import shortened
from record.run_folder import check_out, claim_folder, empty
from transport.process import start_server

ONE_LINE = 480               # characters of a message that refuses bad input, at most


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        return command(argv)
    except (RuntimeError, OSError) as e:
        complain(str(e))
        return 1
    except KeyboardInterrupt:                    # before the run began
        complain("interrupted, nothing is saved")
        return 130


def command(argv: Sequence[str]) -> int:
    """Claim the run folder before anything is prepared, and keep it to the end."""
    try:
        cfg, given = configure_given(argv)
        if cfg.dry_run:
            dryrun.show(cfg, given)
            return 0
        cfg, claim = claim_folder(cfg)
    except (ValueError, OSError) as e:
        return refuse(e)
    with claim:
        return check_and_train(cfg, given)


def check_and_train(cfg: Config, given: Given) -> int:
    """Check everything, then train. What the checks yield is a `Job`: models, prompts, grader."""
    try:
        resume = check_out(cfg)
        start_server()
        cfg, job = prepare(cfg, given)
        fetch(cfg)
        prepared = {}
        if resume is None:
            prepared = prepare_extensions(cfg, job)
    except (ValueError, OSError) as e:
        return refuse(e)
    return train(cfg, job, resume, prepared)


def train(cfg: Config, job: Job, resume: Path | None, prepared: dict[Path, bytes]) -> int:
    """The run itself, from an empty run folder to the last line of the log. Whatever happens, it
    leaves no process behind.

    `resume`: the checkpoint to continue from. `prepared`: files that extensions have computed.
    """
    run = Controller(cfg, job, plan(cfg))
    try:
        if resume is None:
            empty(Path(cfg.out))
        for file, data in prepared.items():
            file.write_bytes(data)
        run.start(resume)
        run.loop()
        run.finish()
        return 0
    except (RuntimeError, OSError) as e:
        run.close()                              # first, so that this is the last line
        complain(with_remedy(str(e), run))
        return 1
    except KeyboardInterrupt:
        saved = save_interrupted(run)
        run.close()
        complain(f"interrupted, {saved}")
        return 130
    finally:
        run.close()


def with_remedy(why: str, run: Controller) -> str:
    """Why a run has failed, and whether it can go on; nothing is added before the first step."""
    if run.saved:
        remedy = f"--resume --out {run.cfg.out} continues from {run.saved}"
    elif run.scheduler.version > 0:
        remedy = "no checkpoint is saved that --resume could continue from (--save-every)"
    else:
        return why
    if "\n" in why:                              # a traceback
        return f"{why.rstrip()}\nasyncopd: {remedy}"
    return f"{why}; {remedy}"


def save_interrupted(run: Controller) -> str:
    """Write a checkpoint; returns what to tell the person who waits for it."""
    try:
        folder = run.interrupted()
    except (RuntimeError, OSError, KeyboardInterrupt):   # the learner died, or a second interrupt
        folder = run.saved
    if folder:
        return f"--resume continues from {folder}"
    return "nothing is saved"


def refuse(e: Exception) -> int:
    """Bad input, in one line. Returns the exit code."""
    complain(shortened(str(e), ONE_LINE))
    return 2


def complain(message: str) -> None:
    print(printable(f"asyncopd: {message}"), file=sys.stderr)


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, SIGNALS)             # noticed only while the parent waits for reports
    sys.exit(main(sys.argv[1:]))

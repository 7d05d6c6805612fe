"""
Everything that a run writes while it runs: the log, the trace and the account, behind one object.

What is left out: the content of the lines (steps.py, metrics.py), checkpoints (checkpoint.py).
Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from record.account import Account, Trained
from record.log import Log
from record.steps import done_record, step_record
from record.timeline import Trace
from record.trackers import TRACKERS, Patient


class Recorder:
    """Has an account from the beginning; files between `open` and `close`."""

    def __init__(self, out: Path, roles: Mapping[str, str], extensions: Collection[str] = ()):
        """`roles`: of every worker, by its name. `extensions`: keys that they add to a step
        line.
        """
        self.out = out
        self.roles = dict(roles)
        self.extensions = extensions
        self.account = Account()
        self.pushes: dict[str, dict] = {}        # rollout worker -> its last push
        self.log: Log | None = None
        self.trace: Trace | None = None

    def open(self, steps: int, done: int, quiet: bool, tracker: str, config: dict) -> None:
        """`steps`: of the whole run; `done`: of them, before this start; `quiet`: no bar.

        `tracker`: "none" or a key of TRACKERS, which is given the flags `config`.
        """
        self.log = Log(self.out, steps, quiet, done=done)
        if tracker != "none":
            self.log.tracker = Patient(partial(TRACKERS[tracker], self.out, config), self.log.disk)
        self.trace = Trace(self.out / "trace.json", self.roles, self.log.disk)

    def spans(self, worker: str, spans: list[tuple[str, float, float]]) -> None:
        for what, begin, end in spans:
            self.trace.span(worker, what, begin, end)

    def event(self, what: str, **values) -> None:
        self.log.write("event", what=what, **values)

    def warn(self, text: str, /, **event) -> None:
        """An event that a person should see at once."""
        self.log.warn(text, **event)

    def busy(self) -> dict[str, float]:
        """By role, the share of the time since the last start that its workers worked."""
        return self.trace.busy(self.account.began, self.account.last_step)

    def step(self, measured: dict, events: list[dict], skipped: int, trained: Trained,
             slots: dict[str, int], begun: int) -> None:
        """A step line, the curves of the trace, and what the extensions tell of the step.

        slots   how many are free and how many are in each stage
        begun   responses so far
        """
        now = time.monotonic()
        self.account.enter(measured, trained)
        known = self.account.rates(now) | self.account.responses(begun)
        metrics = step_record(measured, known, self.pushes.values(), skipped, trained,
                              self.extensions)
        self.trace.fold(self.account.began)
        self.trace.curve("slots", now, slots)
        self.trace.curve("lag", now, {k: metrics[f"lag_{k}"] for k in ("min", "mean", "max")})
        rates = {k: metrics[f"{k}_tok_s"] for k in ("gen", "train")}
        self.trace.curve("tokens per second", now, rates)
        self.log.step(metrics)
        for event in events:
            self.log.write("event", step=metrics["step"], **event)

    def evaluation(self, step: int, who: str, summary: dict, answered: list[tuple]) -> None:
        """`summary`: graders.summary; `answered`: as in Log.evaluation."""
        self.account.accuracy[who, step] = summary["accuracy"]
        self.log.evaluation(step, who, summary, answered)

    def done(self, in_flight: int) -> dict:
        """The last line. `in_flight`: tokens drawn and not trained. OSError if the log could not
        be written to its end."""
        totals = done_record(self.account, in_flight, self.busy())
        self.log.write("done", **totals)
        self.log.check_written()
        return totals

    @property
    def waiting(self) -> bool:
        """Are there lines of the log that a full disk has not taken?"""
        return self.log is not None and self.log.file.fault is not None

    def close(self) -> None:
        for file in (self.trace, self.log):
            if file is not None:
                with contextlib.suppress(OSError):       # a full disk
                    file.close()
        self.trace = None
        self.log = None

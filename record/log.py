"""
log.jsonl and the progress bar: the record of a run, line by line.

A line is one JSON object, whose `type` is run, step, eval, event or done. Left out: the content of
the lines (metrics.py, steps.py, provenance.py), texts for people (report.py), other places for the
same numbers (trackers.py). Tests: tests/test_report.py
"""
from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from data.printable import printable
from record.disk import Disk
from record.report import evaluation_text, progress_text, sample_texts
from record.trackers import Tracker, numbers

TRACKED = ("step", "eval", "done")             # types of lines whose numbers go to a tracker


class Log:
    """The log and the bar. Each line is written at once, or as soon as the disk has room."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False, done: int = 0):
        """`steps`: of the whole run; `done`: of them, before this start; `quiet`: no bar."""
        self.disk = Disk(self.say)
        self.file = self.disk.open(folder / "log.jsonl", "a")
        self.samples = self.disk.open(folder / "samples.txt", "a")
        self.tracker: Tracker | None = None
        self.steps = steps
        self.done = done
        self.quiet = quiet
        self.bar: tqdm | None = None

    def begin(self) -> None:
        """Show the bar: the first ticket is handed out, and from here on steps are counted."""
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=self.steps, initial=self.done, unit="step", dynamic_ncols=True,
                        smoothing=0.1, disable=self.quiet, mininterval=interval)
        self.bar.set_postfix_str("the first batch is generated and scored")

    def write(self, kind: str, /, **values) -> None:
        """One line of type `kind`. A number that is not finite is written as null, as JSON has no
        word for it."""
        line = {"type": kind}
        for key, value in values.items():
            infinite = isinstance(value, float) and not math.isfinite(value)
            line[key] = None if infinite else value
        self.disk.try_again()
        self.file.write(json.dumps(line) + "\n")
        if self.tracker is not None and kind in TRACKED:
            step = line["steps"] if kind == "done" else line["step"]
            self.tracker.write(step, numbers(line))

    def warn(self, text: str, /, **event) -> None:
        """An event that a person should see at once."""
        self.write("event", **event)
        self.say(text)

    def say(self, text: str) -> None:
        """A message to a person, above the bar."""
        tqdm.write(printable(f"asyncopd: {text}"), file=sys.stderr)

    def progress(self, text: str) -> None:
        """What is waited for, where there is no bar yet."""
        if not self.quiet:
            self.say(text)

    def step(self, metrics: dict) -> None:
        """A step line (steps.step_record), and the bar's next step."""
        self.write("step", **metrics)
        if self.bar is not None:
            self.bar.set_postfix_str(progress_text(metrics), refresh=False)
            self.bar.update()

    def evaluation(self, step: int, who: str, summary: dict, answered: list[tuple]) -> None:
        """An evaluation line, and samples of the answers for a person.

        `summary`: graders.summary; `answered`: of every prompt its row, the k texts, and whether
        each is right.
        """
        self.write("eval", step=step, who=who, **summary)
        self.samples.write(sample_texts(step, who, answered))
        if not self.quiet:
            tqdm.write(evaluation_text(step, who, summary, answered))

    def check_written(self) -> None:
        """Raise the OSError, with the file's name, for which lines are still waiting."""
        self.disk.try_again()
        fault = self.file.fault
        if fault is not None:
            raise OSError(fault.errno, fault.strerror, str(self.file.path))

    def close(self) -> None:
        self.disk.close()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close()


def rewind(path: Path, step: int) -> list[dict]:
    """Remove from a log what a run that goes on from `step` will write again.

    Returns the lines that stay.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):    # a kill may leave half of the last line
            lines.append(json.loads(text))
    kept = [line for line in lines if not is_after(line, step)]
    partial = path.with_name(".log.jsonl")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.rename(path)
    return kept


def is_after(line: dict, step: int) -> bool:
    """Is a line about something after `step`? A cut under the weights of `step` is after it."""
    if line["type"] == "done" or line.get("step", 0) > step:
        return True
    return line.get("what") == "cut" and line["version"] >= step

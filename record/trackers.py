"""
--log NAME: the numbers of the log, in TensorBoard, Weights & Biases or trackio as well.

log.jsonl is the record; a tracker repeats it. A tracker's library is imported only if its name is
given. Left out: after --resume, a tracker's old run is not continued; a new one of the same name
begins.
Tests: tests/test_report.py
"""
from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from record.disk import FULL, Disk


class Tracker(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Files in the run folder."""

    def __init__(self, folder: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        text = json.dumps(config, indent=2).replace("\n", "\n    ")
        self.writer.add_text("config", "    " + text)        # Markdown: indented text is code

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Service:
    """Weights & Biases, or trackio, whose library has the same three functions."""

    def __init__(self, library: str, folder: Path, config: dict):
        self.module = importlib.import_module(library)
        self.step = 0
        self.module.init(project="asyncopd", name=folder.resolve().name, config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        # An evaluation arrives when later steps have been written, and steps may not go back
        self.step = max(self.step, step)
        self.module.log(values, step=self.step)

    def close(self) -> None:
        self.module.finish()


class Patient:
    """A tracker that survives a full disk: what it did not take waits, and goes to a new one of
    its kind when there is room."""

    def __init__(self, make: Callable[[], Tracker], disk: Disk):
        """`disk`: that of the log, which is written first and so knows whether there is room."""
        self.make = make
        self.disk = disk
        self.tracker: Tracker | None = make()
        self.waiting: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.waiting.append((step, values))
        if not self.disk.full:
            self.flush()

    def flush(self) -> None:
        try:
            if self.tracker is None:
                self.tracker = self.make()
            while self.waiting:
                self.tracker.write(*self.waiting[0])
                del self.waiting[0]
        except OSError as e:
            if e.errno not in FULL:
                raise
            self.tracker = None

    def close(self) -> None:
        if self.waiting:
            self.flush()
        if self.tracker is not None:
            self.tracker.close()


# --log NAME -> (run folder, configuration of the run) -> its tracker, ready to write to
TRACKERS: dict[str, Callable[[Path, dict], Tracker]] = {
    "wandb": partial(Service, "wandb"),
    "tensorboard": TensorBoard,
    "trackio": partial(Service, "trackio"),
}
# What must be installed for it; a tracker without an entry needs nothing
LIBRARIES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}


def numbers(line: dict) -> dict[str, float]:
    """Everything in a line of the log that can be drawn as a curve, by name: step/kl, or
    eval/student/pass_at_k/4."""
    prefix = line["type"]
    if "who" in line:
        prefix += f"/{line['who']}"
    found = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= {f"{prefix}/{key}/{part}": x for part, x in value.items() if is_number(x)}
        elif is_number(value):
            found[f"{prefix}/{key}"] = value
    return found


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)

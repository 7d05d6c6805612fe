"""
trace.json: who worked when, and which share of the time.

Left out: spans inside of a step, for which a profiler serves. Tests: tests/test_readme.py
"""
from __future__ import annotations

import json
import math
import time
from pathlib import Path

from record.disk import Disk

WORK = {"rollout": ("generate", "push"), "teacher": ("score",), "learner": ("step", "publish")}

HELD = 2**13                   # bytes of small events that are written together
MOST_WAITING = 2**26           # bytes that may wait for a full disk

Span = tuple[str, str, float, float]           # worker, what it did, from, to: time.monotonic()


class Trace:
    """A Chrome / Perfetto trace: one row per worker, and curves.

    The file is written as the spans arrive, because a long run's trace does not fit in memory. A
    killed run leaves it without its closing brackets, which Perfetto accepts.
    """

    def __init__(self, path: Path, roles: dict[str, str], disk: Disk | None = None):
        """`roles`: the role of every worker, by its name. `disk`: that of the run's other files.
        """
        self.roles = roles
        self.rows = {name: i for i, name in enumerate(roles)}
        self.file = (disk or Disk()).open(path, "w", hold=HELD)
        self.zero = time.monotonic()
        self.seconds = dict.fromkeys(roles, 0.0)                   # of work, up to the last fold
        self.recent: list[Span] = []                               # since then
        labels = [json.dumps({"ph": "M", "name": "thread_name", "pid": 0, "tid": i,
                              "args": {"name": name}}) for name, i in self.rows.items()]
        self.file.write('{"traceEvents": [' + ",\n".join(labels))

    def span(self, worker: str, what: str, begin: float, end: float) -> None:
        """`worker` did `what` from `begin` to `end`."""
        self.recent.append((worker, what, begin, end))
        self.write(ph="X", name=what, tid=self.rows[worker], ts=round((begin - self.zero) * 1e6),
                   dur=round((end - begin) * 1e6))

    def curve(self, name: str, now: float, values: dict) -> None:
        self.write(ph="C", name=name, ts=round((now - self.zero) * 1e6), args=values)

    def write(self, **event) -> None:
        """Add an event, unless too many wait for a full disk: then the trace has a gap."""
        if len(self.file.text) > MOST_WAITING:
            return
        self.file.write(",\n" + json.dumps(event | {"pid": 0}))

    def fold(self, began: float) -> None:
        """Add up the spans so far and forget them: all of them ended before the end of the run."""
        self.seconds = self.seconds_of_work(began, math.inf)
        self.recent = []

    def seconds_of_work(self, began: float, ended: float) -> dict[str, float]:
        """By worker, up to the last fold and within [began, ended] since then."""
        seconds = dict(self.seconds)
        for worker, what, begin, end in self.recent:
            if what in WORK[self.roles[worker]]:
                seconds[worker] += max(0.0, min(end, ended) - max(begin, began))
        return seconds

    def busy(self, began: float, ended: float) -> dict[str, float]:
        """By role, the share of [began, ended] that its workers spent on work, on average."""
        seconds = self.seconds_of_work(began, ended)
        wall = max(1e-9, ended - began)
        shares = {}
        for role in WORK:
            of_role = [seconds[worker] for worker in self.roles if self.roles[worker] == role]
            if of_role:
                shares[role] = sum(of_role) / len(of_role) / wall
        return shares

    def close(self) -> None:
        self.file.write("]}")
        self.file.flush()

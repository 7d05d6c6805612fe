"""
trace.json: who worked when, and how much of the time.

What is left out: spans inside of a step; use a profiler on the worker. Tests: tests/test_readme.py
"""
from __future__ import annotations

import json
import math
import time
from pathlib import Path

BUSY = {"rollout": ("generate", "push"), "teacher": ("score",), "learner": ("step", "publish")}     # counts as work


class Trace:
    """trace.json, a Chrome / Perfetto trace: one row per worker, and curves. Written as it comes: a long run's is long.

    A killed run leaves it without its end, which Perfetto does not mind.
    """

    def __init__(self, path: Path, workers: list[str]):
        self.rows = {name: i for i, name in enumerate(workers)}
        self.file, self.zero = open(path, "w", encoding="utf-8"), time.monotonic()
        self.seconds = dict.fromkeys(workers, 0.0)                 # of work, up to the last fold
        self.recent: list[tuple[str, str, float, float]] = []      # worker, what, from, to: since then
        self.file.write('{"traceEvents": [')
        self.file.write(",\n".join(json.dumps(dict(ph="M", name="thread_name", pid=0, tid=i, args=dict(name=name)))
                                   for name, i in self.rows.items()))

    def span(self, name: str, what: str, a: float, b: float) -> None:
        self.recent.append((name, what, a, b))
        self.write(ph="X", name=what, tid=self.rows[name], ts=round((a - self.zero) * 1e6), dur=round((b - a) * 1e6))

    def curve(self, name: str, now: float, values: dict) -> None:
        self.write(ph="C", name=name, ts=round((now - self.zero) * 1e6), args=values)

    def write(self, **event) -> None:
        self.file.write(",\n" + json.dumps(event | {"pid": 0}))

    def fold(self, began: float) -> None:
        """What has come so far is wholly within the run."""
        self.seconds = busy_seconds(self.recent, self.seconds, began, math.inf)
        self.recent = []

    def busy(self, began: float, ended: float) -> dict[str, float]:
        """Per role, the share of [began, ended] that its workers spent on work, averaged over them."""
        seconds = busy_seconds(self.recent, self.seconds, began, ended)
        return {role: sum(v) / len(v) / max(1e-9, ended - began) for role in BUSY
                if (v := [s for name, s in seconds.items() if name.startswith(role)])}

    def close(self) -> None:
        self.file.write("]}")
        self.file.close()


def busy_seconds(spans: list[tuple[str, str, float, float]], seconds: dict[str, float], began: float,
                 ended: float) -> dict[str, float]:
    """`seconds` by worker, and those that the spans of work have within [began, ended]."""
    seconds = dict(seconds)
    for name, what, a, b in spans:
        if what in BUSY[name.rstrip("0123456789")]:
            seconds[name] += max(0.0, min(b, ended) - max(a, began))
    return seconds

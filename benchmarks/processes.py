"""
What the processes below this one use: memory, with shared pages counted once, and seconds of CPU.

Imported by peers.py and prune.py. Reads /proc, so Linux only. Started as a script it shows itself.
Last line: one JSON object, {"gb", "cpu_s"} of a child that sums a million numbers.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


class Watch(threading.Thread):
    """Looks at every process below this one, every `every_s` seconds, between `with` and its end.

    gb     the most that they held together (PSS); looked at every `memory_s`, since it is a lot of work
    cpu_s  by process, seconds of CPU so far, also of those that have ended
    """

    def __init__(self, every_s: float = 10.0, memory_s: float = 10.0,
                 look: Callable[[Watch], None] = lambda watch: None):
        """`look` is called after every look, with this object."""
        super().__init__(daemon=True)
        self.every_s = every_s
        self.memory_s = memory_s
        self.look = look
        self.gb = 0.0
        self.cpu_s: dict[int, float] = {}
        self.ended = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        weighed = float("-inf")
        while not self.ended.wait(self.every_s):
            found = descendants()
            self.cpu_s |= found
            if time.monotonic() - weighed >= self.memory_s:
                weighed = time.monotonic()
                self.gb = max(self.gb, sum(map(pss_gb, found)))
            self.look(self)


def descendants() -> dict[int, float]:
    """Every process below this one, and its seconds of CPU so far."""
    parents: dict[int, int] = {}
    cpu_s: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:                          # it has ended meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        cpu_s[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    found: dict[int, float] = {}
    todo = [os.getpid()]
    while todo:
        parent = todo.pop()
        children = [pid for pid, p in parents.items() if p == parent]
        found |= {pid: cpu_s[pid] for pid in children}
        todo += children
    return found


def pss_gb(pid: int) -> float:
    """The kernel visits every page for this: it takes a while."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    held = re.search(r"^Pss:\s+(\d+)", text, re.M)
    return int(held[1]) * 1024 / 1e9 if held else 0.0


def main() -> None:
    with Watch(every_s=0.05, memory_s=0.05) as watch:
        subprocess.run([sys.executable, "-c", "print(sum(range(10 ** 7)))"], check=True)
    print(json.dumps({"gb": watch.gb, "cpu_s": max(watch.cpu_s.values(), default=0.0)}))


if __name__ == "__main__":
    main()

"""
Commands that take turns on one machine, two seconds each, so that what slows the machine for a while slows all alike.

A shared machine is a quarter faster in one minute than in the next. Commands that run one after the other meet
different minutes, and the ratio of their times is as noisy as the machine. Here all but one stand still (SIGSTOP, to
the whole process group) while that one has the machine to itself. The clock goes on meanwhile: Turns.seconds() leaves
the pauses out.

Imported by peers.py. Started as a script it shows itself.
Last line: one JSON object, {"alone", "in turns": seconds of a child that counts, "with pauses": the same by the clock}.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

TURN_S = 2.0


@dataclass
class Turns:
    """A command and when it ran. Times are those of time.monotonic(), which all processes share."""
    command: Sequence[str]
    spans: list[tuple[float, float]] = field(default_factory=list)
    stdout: str = ""
    process: subprocess.Popen | None = None

    def seconds(self, begin: float, end: float) -> float:
        """From `begin` to `end`, without the pauses."""
        return sum(max(0.0, min(end, last) - max(begin, first)) for first, last in self.spans)

    def running(self) -> bool:
        return self.process is None or self.process.poll() is None

    def go(self, turn_s: float, cwd: str | None, file: IO[str]) -> None:
        """One turn, or less if the command ends."""
        begin = time.monotonic()
        if self.process is None:
            # A group of its own: the signals reach what it starts, and not this process
            self.process = subprocess.Popen(self.command, cwd=cwd, stdout=file, start_new_session=True)
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.wait(turn_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGSTOP)
        self.spans.append((begin, time.monotonic()))

    def clear(self) -> None:
        """End whatever is left of the group, such as a child that was stopped while its parent ended."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def in_turns(commands: Sequence[Sequence[str]], turn_s: float = TURN_S, cwd: str | None = None) -> list[Turns]:
    """Runs the commands to their ends and returns what they printed.

    Nothing that they have started outlives them. Raises: RuntimeError if a command fails; the others are killed then.
    """
    found = [Turns(command) for command in commands]
    files = [tempfile.TemporaryFile("w+") for _ in found]
    try:
        while any(turns.running() for turns in found):
            for turns, file in zip(found, files):
                if turns.running():
                    turns.go(turn_s, cwd, file)
                if turns.process.returncode:
                    raise RuntimeError(f"{' '.join(turns.command)} ended with {turns.process.returncode}")
        for turns, file in zip(found, files):
            file.seek(0)
            turns.stdout = file.read()
    finally:
        for turns, file in zip(found, files):
            file.close()
            turns.clear()
    return found


COUNT = "import time; s = time.monotonic(); sum(range(3 * 10 ** 7)); print(s, time.monotonic())"


def main() -> None:
    command = [sys.executable, "-c", COUNT]
    alone, = in_turns([command], turn_s=0.1)
    one, _ = in_turns([command, command], turn_s=0.1)
    begin, end = map(float, one.stdout.split())
    print(json.dumps({"alone": alone.seconds(*map(float, alone.stdout.split())), "in turns": one.seconds(begin, end),
                      "with pauses": end - begin}))


if __name__ == "__main__":
    main()

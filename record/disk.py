"""
Files that wait for a disk that is full, so that the run which writes them goes on.

What cannot be written stays in memory, in its order, and follows as soon as there is room. Left
out: checkpoints, which are given up (control/recovery.py); other failures of a disk, which are
raised. Tests: tests/test_disk.py
"""
from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)     # also a quota, and the limit of a file's size


class Disk:
    """The files that a run writes while it runs, and whether they find room."""

    def __init__(self, say: Callable[[str], None] = print):
        """`say` tells a person."""
        self.say = say
        self.files: list[PatientFile] = []
        self.full = False

    def open(self, path: Path, mode: str, hold: int = 0) -> PatientFile:
        """A file for text; PatientFile."""
        file = PatientFile(self, path, mode, hold)
        self.files.append(file)
        return file

    def ran_full(self, file: PatientFile) -> None:
        """Tell of it, once until there is room again."""
        if not self.full:
            self.full = True
            self.say(f"{file.path}: {file.fault.strerror}: the run goes on, and what it writes "
                     "waits in memory until there is room")

    def try_again(self) -> None:
        """Write what waits, if there is room."""
        if not self.full:
            return
        for file in self.files:
            file.flush()
        if not self.waiting():
            self.full = False
            self.say("there is room on the disk again: what waited is written")

    def waiting(self) -> list[PatientFile]:
        """The files that could not be written."""
        return [file for file in self.files if file.fault is not None]

    def close(self) -> None:
        """Write what waits, or tell of what is lost."""
        for file in self.files:
            file.flush()
        for file in self.waiting():
            self.say(f"{file.path}: {file.fault.strerror}: its last {len(file.text):,} bytes are "
                     "lost")
        for file in self.files:
            file.close()


class PatientFile:
    """A text file that is written to its end, or waits. `fault`: why it waits; None if it does
    not."""

    def __init__(self, disk: Disk, path: Path, mode: str, hold: int = 0):
        """It is opened at the first write: "a" appends, "w" begins a new file. `hold`: bytes that
        may be kept back, so that a file with many small pieces is not written with each of them.
        """
        self.disk = disk
        self.path = path
        self.mode = mode
        self.hold = hold
        self.text = bytearray()                      # not written yet
        self.file = None
        self.fault: OSError | None = None

    def write(self, text: str) -> None:
        self.text += text.encode("utf-8")
        if len(self.text) > self.hold:
            self.flush()

    def flush(self) -> None:
        """Write everything, or as much as there is room for."""
        try:
            if self.file is None and self.text:
                self.file = open(self.path, f"{self.mode}b", buffering=0)
            while self.text:
                written = self.file.write(self.text)             # a full disk may take a part
                del self.text[:written]
            self.fault = None
        except OSError as e:
            if e.errno not in FULL:
                raise
            self.fault = e
            self.disk.ran_full(self)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def write_text(path: Path, text: str) -> None:
    """Write a whole file. An OSError names it, which that of a full disk does not by itself."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None

"""
SIGINT and SIGTERM, noticed only while the parent waits.

Tests: tests/test_pipeline.py, tests/test_faults.py
"""
from __future__ import annotations

from collections.abc import Iterable
from multiprocessing.connection import Connection, wait


class SignalHandler:
    """Raises KeyboardInterrupt while the parent waits, never in the middle of a message or of a
    decision.

    Blocking the signals would not do that: the kernel delivers a signal to any thread that does
    not block it, and Python passes it on to the main thread.
    """

    def __init__(self):
        self.waiting = True              # also before the first `wait`, when no worker is there
        self.pending = False

    def __call__(self, *_) -> None:
        """The handler, for signal.signal."""
        self.pending = True
        if self.waiting:
            self.interrupt()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt if a signal is pending."""
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def wait(self, pipes: Iterable[Connection], timeout: float) -> list[Connection]:
        """The pipes that can be read, after at most `timeout` seconds. Raises
        KeyboardInterrupt.
        """
        self.waiting = True
        try:
            self.interrupt()
            return wait(pipes, timeout=timeout)
        finally:
            self.waiting = False


SIGNALS = SignalHandler()

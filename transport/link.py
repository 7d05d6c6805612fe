"""
A worker's end of its pipe.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from torch import Tensor


class Incurable(RuntimeError):
    """A failure that another process would meet again: no reason to start one."""


class ParentGone(Exception):
    """The pipe to the parent is closed: the worker has nobody left to work for."""


class Link:
    """A worker's end of its pipe: orders come in, reports go out, each with the spans of work since the last one.

    pulse [2], shared with the parent: when the worker last moved (time.monotonic), and whether it is told to hurry.
    """

    def __init__(self, pipe: Connection, pulse: Tensor):
        self.pipe, self.pulse, self.spans = pipe, pulse, []
        self.later: list[tuple[str, object]] = []        # orders that came while `answer` waited for another

    def beat(self) -> None:
        self.pulse[0] = time.monotonic()

    @property
    def hurried(self) -> bool:
        return bool(self.pulse[1])

    def send(self, kind: str, **body) -> None:
        self.beat()
        self.pipe.send((kind, body, self.spans))
        self.spans = []

    def orders(self, wait: bool) -> Iterator[tuple[str, object]]:
        """Everything that has arrived; with `wait`, at least one. A parent that is gone ends the worker."""
        if wait and not self.later:
            with self.span("wait"):
                while not self.pipe.poll(1):             # nothing to do is no fault: the parent's end shows as EOF
                    self.beat()
        try:
            while self.later or self.pipe.poll(0):
                yield self.later.pop(0) if self.later else self.pipe.recv()
        except EOFError:
            raise ParentGone from None

    def answer(self, wanted: str) -> object:
        """What the order `wanted` says, without which the worker cannot go on. Those before it are heard later."""
        before, self.later = self.later, []
        while True:
            for order, body in self.orders(wait=True):
                if order == wanted:
                    self.later = before
                    return body
                before.append((order, body))

    @contextmanager
    def span(self, what: str):
        """Time spent on `what`, for the trace; turns of the same work that follow each other are one span."""
        self.beat()
        start = time.monotonic()
        yield
        if self.spans and self.spans[-1][0] == what and start - self.spans[-1][2] < 2e-3:
            start = self.spans.pop()[1]
        self.spans.append((what, start, time.monotonic()))

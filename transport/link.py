"""
A worker's end of its pipe: orders come in, reports go out.

What is left out: the parent's end (process.py). Tests: tests/test_pipeline.py,
tests/test_faults.py
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from torch import Tensor

SAME_SPAN_S = 2e-3           # turns of the same work with a shorter pause are one span


class Incurable(RuntimeError):
    """A failure that a new process would meet again, so that none is started."""


class ParentGone(Exception):
    """The pipe to the parent is closed: the worker has nobody left to work for."""


class Link:
    """Orders are pairs (order, body); a report is (kind, body, spans of work since the last one).

    pulse [3], shared with the parent: when the worker last gave a sign of life (time.monotonic),
    whether it is asked to hurry, and whether it may begin, 0 or 1.
    """

    def __init__(self, pipe: Connection, pulse: Tensor):
        self.pipe = pipe
        self.pulse = pulse
        self.spans: list[tuple[str, float, float]] = []     # what, from, to
        self.later: list[tuple[str, object]] = []           # orders put aside by `answer`

    def beat(self) -> None:
        """Give a sign of life."""
        self.pulse[0] = time.monotonic()

    def wait_for_turn(self) -> None:
        """Until the parent lets this worker begin (control/plan.waves)."""
        while not self.pulse[2]:
            self.beat()
            time.sleep(0.02)

    @property
    def hurried(self) -> bool:
        return bool(self.pulse[1])

    def send(self, kind: str, **body) -> None:
        self.beat()
        self.pipe.send((kind, body, self.spans))
        self.spans = []

    def orders(self, wait: bool) -> Iterator[tuple[str, object]]:
        """Everything that has arrived; with `wait`, at least one. Raises ParentGone."""
        if wait and not self.later:
            with self.span("wait"):
                while not self.pipe.poll(1):         # a closed pipe ends the wait, too
                    self.beat()
        try:
            while self.later or self.pipe.poll(0):
                if self.later:
                    yield self.later.pop(0)
                else:
                    yield self.pipe.recv()
        except EOFError:
            raise ParentGone from None

    def answer(self, wanted: str) -> object:
        """Wait for the order `wanted` and return its body. Orders before it are read later."""
        before = self.later
        self.later = []
        while True:
            for order, body in self.orders(wait=True):
                if order == wanted:
                    self.later = before
                    return body
                before.append((order, body))

    @contextmanager
    def span(self, what: str) -> Iterator[None]:
        """Time spent on `what`, for the trace. Turns of the same work in a row are one span."""
        self.beat()
        start = time.monotonic()
        yield
        if self.spans:
            last, began, ended = self.spans[-1]
            if last == what and start - ended < SAME_SPAN_S:
                self.spans.pop()
                start = began
        self.spans.append((what, start, time.monotonic()))

"""
The rollout worker: takes tickets, generates, hands slots over.

It loads newly published weights between two engine steps, without waiting for running responses:
these are flushed to their slots, the weights are replaced, and the responses continue from their
tokens so far, whose context is computed again. Every token carries the version that drew it.

What is left out: how tokens are drawn (engines/). Tests: tests/test_rollout.py, tests/test_lag.py
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from config import Config
from engines.base import Engine, probe_tolerance
from engines.table import engine_class
from extension import Extensions
from transport.link import Incurable, Link
from transport.shared import SharedMemory


def rollout_worker(cfg: Config, link: Link, shared: SharedMemory, device: str,
                   dtype: torch.dtype) -> None:
    """A rollout process: obey the orders of the parent, and between them generate."""
    engine = engine_class(cfg.engine)(cfg, device, dtype)
    worker = Worker(cfg, link, shared, engine, probe_tolerance(dtype))
    link.send("ready")
    while not worker.stopped:
        for order, body in link.orders(wait=worker.idle):
            worker.orders[order](body)
        if not worker.stopped:
            worker.turn()


class Worker:
    """What a rollout worker does between two engine steps, and the promises that it keeps there:

    - no ticket is begun under weights older than the newest that are published;
    - the version of a token is that of the weights that drew it;
    - what is overdue is handed over at once, and only if it really is overdue.
    """

    def __init__(self, cfg: Config, link: Link, shared: SharedMemory, engine: Engine,
                 tolerance: float = 1e-3):
        """`tolerance`: largest difference between engine and learner on the probe, nats."""
        self.cfg = cfg
        self.link = link
        self.shared = shared
        self.slots = shared.slots
        self.weights = shared.weights
        self.engine = engine
        self.tolerance = tolerance
        self.extensions = Extensions.load(cfg)
        # Whether weights may change while responses run
        self.in_flight = cfg.schedule == "async" and cfg.inflight == "recompute"
        self.orders = {"take": self.take, "cut": self.cut, "drop": self.drop,
                       "evaluate": self.evaluate, "stop": self.stop}
        self.version = -1                        # of the weights in the engine
        self.tokens = 0                          # drawn so far, for the record
        self.stopped = False
        self.evaluation_wanted = False
        self.waiting: deque[tuple[int | None, int]] = deque()
        # (version to draw under, slot); None: the newest
        self.running: set[int] = set()           # slots

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.evaluation_wanted)

    def turn(self) -> None:
        """Load new weights, begin new tickets, make one engine step, hand over what finished."""
        if self.in_flight or not self.running:
            if self.evaluation_wanted:
                self.answer()
            if self.in_flight:
                self.load(None)
        self.begin_waiting()
        with self.link.span("generate"):
            finished = self.engine.step()
        if finished:
            self.flush(finished)
            self.link.send("generated", slots=finished, finished=True, tokens=self.tokens)

    def begin_waiting(self) -> None:
        """Begin tickets, as long as none needs other weights than the responses that run."""
        while self.waiting:
            version, s = self.waiting[0]
            if self.running and self.behind(self.available(version)):
                return
            self.waiting.popleft()
            self.load(self.available(version))
            self.start(s)

    def available(self, version: int | None) -> int | None:
        """That version if it can still be read. After a restart it may have been overwritten, and
        the newest (None) takes its place."""
        if version is not None and not self.weights.holds(version):
            return None
        return version

    def behind(self, version: int | None) -> bool:
        """Whether the engine has other weights than `version`, or than the newest for None."""
        wanted = self.weights.version if version is None else version
        return self.version != wanted

    # -- orders

    def take(self, tickets: list[tuple[int | None, int]]) -> None:
        """New tickets: (version to draw under, slot)."""
        self.waiting += tickets

    def evaluate(self, body: None) -> None:
        self.evaluation_wanted = True

    def cut(self, body: tuple[int, list[int]]) -> None:
        """Hand over what these responses have so far."""
        floor, slots = body
        self.link.send("generated", slots=self.overdue(floor, slots), finished=False,
                       tokens=self.tokens)

    def drop(self, body: tuple[int, list[int]]) -> None:
        """Throw these responses away."""
        floor, slots = body
        self.link.send("dropped", slots=self.overdue(floor, slots), tokens=self.tokens)

    def overdue(self, floor: int, slots: list[int]) -> list[int]:
        """Those of `slots` whose first token is of version `floor` or older, flushed.

        The parent knows only `born`, and it may be out of date: a response may have had no token
        when the weights were replaced, and have begun under the new ones since. A response that
        has no token even now starts again, under the newest weights.
        """
        held = [s for s in slots if s in self.running and self.slots.born[s] <= floor]
        self.flush(held)
        self.waiting += [(None, s) for s in held if self.slots.length[s] == 0]
        for _, s in self.waiting:
            self.slots.born[s] = self.weights.version    # at least: it begins under the newest
        return [s for s in held if self.slots.length[s] > 0]

    def stop(self, body: None) -> None:
        """The last order: answer what was asked, hand in what runs."""
        self.flush(sorted(self.running))
        if self.evaluation_wanted:
            self.answer()
        self.link.send("stopped", tokens=self.tokens)
        self.stopped = True

    # -- weights

    def load(self, version: int | None) -> None:
        """Replace the weights of the engine by `version`, or by the newest for None.

        The engine proves that they have arrived: its log-probs of the probe must be the learner's.
        """
        if not self.behind(version):
            return
        with self.paused(), self.link.span("push"):
            start = time.monotonic()
            self.version, tensors, probe_logp = self.weights.read(version)
            self.engine.load(tensors)
            gap = (self.engine.logp(self.weights.probe) - probe_logp).abs()
        if not gap.max() <= self.tolerance:              # `not <=`, so that nan counts as wrong
            raise Incurable(f"weights of version {self.version} did not arrive in the engine: its "
                            f"log-probs differ from the learner's by up to {gap.max():.3g} on the "
                            f"probe (tolerance {self.tolerance:g})")
        self.link.send("pushed", version=self.version, seconds=time.monotonic() - start,
                       gap=[gap.mean().item(), gap.quantile(0.95).item(), gap.max().item()])

    def answer(self) -> None:
        """Answer the evaluation prompts under the newest weights.

        Training responses wait meanwhile: a long evaluation is paid for in lag.
        """
        self.load(None)
        wanted = self.cfg.eval
        with self.paused(), self.link.span("evaluate"):
            answers = self.engine.complete(self.shared.eval_prompts, self.cfg.max_response,
                                           wanted.k, wanted.temperature, self.link.beat)
        self.evaluation_wanted = False
        self.link.send("evaluated", version=self.version, answers=answers)

    # -- responses

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is in the engine: what runs is flushed to its slots, and continues
        afterwards."""
        going_on = sorted(self.running)
        self.flush(going_on)
        yield
        for s in going_on:
            self.start(s)

    def start(self, s: int) -> None:
        """Let the engine continue slot s from whatever tokens it holds."""
        start = int(self.slots.start[s])
        length = int(self.slots.length[s])
        if length == 0:
            self.slots.born[s] = self.version
        position = start + length - int(self.slots.prompt[s])     # in the response
        tokens = self.slots.tokens[s, :start + length].tolist()
        self.engine.add(s, tokens, self.cfg.max_response - position,
                        uid=int(self.slots.uid[s]), position=position)
        self.running.add(s)

    def flush(self, slots: list[int]) -> None:
        """Take responses out of the engine and write what they have into their slots."""
        for s, (tokens, ids, logmu) in self.engine.take(slots).items():
            first = int(self.slots.start[s] + self.slots.length[s] - self.slots.prompt[s])
            kept = self.extensions.stored(self.shared.tensors, tokens, int(self.slots.uid[s]),
                                          first)
            self.slots.append(s, tokens, ids, logmu, self.version, kept)
            self.running.discard(s)
            self.tokens += len(tokens)

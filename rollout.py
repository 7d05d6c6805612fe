"""
The rollout worker, and its engine in plain transformers; engines/vllm.py holds the same few methods in vLLM.

The worker takes tickets, generates, and hands slots over. It loads newly published weights between two engine steps,
without waiting for what is running: running responses are flushed to their slots, the weights are replaced, and the
responses go on from their tokens so far, whose context is computed anew. Every token carries the version that drew it.

Sampling is ours in both engines (`draw_rows`): N tokens per position, i.i.d. from the softmax that is really sampled,
the first one emitted. vLLM runs it through its public logits-processor interface. What is left out: beam search, tool
calls, penalties, speculative decoding; distillation wants samples of the plain distribution.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from cache import Slots
from engines.table import ENGINES
from transport.link import Incurable
from transport.weights import Weights

if TYPE_CHECKING:
    from config import Config
    from transport.link import Link


# -- the draw --------------------------------------------------------------------------------------

# -- the worker ------------------------------------------------------------------------------------

def rollout_worker(cfg: Config, link: Link, slots: Slots, weights: Weights, eval_prompts: list[list[int]],
                   device: str, dtype: torch.dtype) -> None:
    worker = Worker(cfg, link, slots, weights, ENGINES[cfg.engine](cfg, device, dtype), eval_prompts)
    link.send("ready")
    while not worker.stopped:
        for order, body in link.orders(wait=worker.idle):
            getattr(worker, order)(body)       # take, cut, drop, evaluate, stop: each appends to or ends something
        if not worker.stopped:
            worker.turn()


class Worker:
    """What a rollout worker does between two engine steps, and the promises that it keeps there:

    no ticket is begun under weights older than the newest there are; a token's version is that of the weights that
    drew it; what is overdue is handed over at once, and only if it really is.
    """

    def __init__(self, cfg: Config, link: Link, slots: Slots, weights: Weights, engine, eval_prompts=()):
        self.link, self.slots, self.weights, self.engine = link, slots, weights, engine
        self.eval_prompts, self.asked = eval_prompts, False        # asked: for answers to them
        self.eval_k, self.eval_temperature = cfg.eval.k, cfg.eval.temperature
        self.max_response, self.tolerance = cfg.max_response, cfg.gap_max
        self.in_flight = cfg.schedule == "async" and cfg.inflight == "recompute"    # load beside running responses
        self.version, self.tokens, self.stopped = -1, 0, False
        self.waiting: deque[tuple[int | None, int]] = deque()      # (version to draw under, None: the newest; slot)
        self.running: set[int] = set()                             # slots

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.asked)

    def turn(self) -> None:
        """New weights if there are any, new tickets, one engine step, finished responses out."""
        if self.in_flight or not self.running:
            if self.asked:
                self.answer()
            if self.in_flight:
                self.load(None)
        while self.waiting and not (self.running and self.behind(self.due(self.waiting[0][0]))):
            version, s = self.waiting.popleft()
            self.load(self.due(version))
            self.start(s)
        with self.link.span("generate"):
            finished = self.engine.step()
        if finished:
            self.flush(finished)
            self.link.send("generated", slots=finished, finished=True, tokens=self.tokens)

    def due(self, version: int | None) -> int | None:
        """Exactly that version while it is still there; after a restart it may not be, and the newest has to do."""
        return None if version is not None and self.weights.clock[0] >= version + 2 else version

    def behind(self, version: int | None) -> bool:
        return self.version != (self.weights.version if version is None else version)

    # -- orders

    def take(self, body: list[tuple[int | None, int]]) -> None:
        self.waiting += body

    def evaluate(self, body: None) -> None:
        self.asked = True

    def cut(self, body: tuple[int, list[int]]) -> None:
        """Hand over what these responses have so far."""
        self.link.send("generated", slots=self.overdue(*body), finished=False, tokens=self.tokens)

    def drop(self, body: tuple[int, list[int]]) -> None:
        """Throw these responses away."""
        self.link.send("dropped", slots=self.overdue(*body), tokens=self.tokens)

    def overdue(self, floor: int, slots: list[int]) -> list[int]:
        """Those of `slots` whose first token is of version `floor` or older, flushed.

        The parent cannot know better than `born`: a response may have had no token when the weights were replaced,
        and have begun under the new ones since. One that has none even now begins anew, under the newest.
        """
        held = [s for s in slots if s in self.running and self.slots.born[s] <= floor]
        self.flush(held)
        self.waiting += [(None, s) for s in held if self.slots.length[s] == 0]
        for _, s in self.waiting:
            self.slots.born[s] = self.weights.version              # at least: it is taken under the newest
        return [s for s in held if self.slots.length[s] > 0]

    def stop(self, body: None) -> None:
        """The last order: what was asked is answered, what runs is handed in."""
        self.flush(sorted(self.running))
        if self.asked:
            self.answer()
        self.link.send("stopped", tokens=self.tokens)
        self.stopped = True

    # -- what they are made of

    def load(self, version: int | None) -> None:
        """Replace the engine's weights by the newest (or exactly `version`) and let it prove that they arrived."""
        if not self.behind(version):
            return
        with self.paused(), self.link.span("push"):
            start = time.monotonic()
            self.version, tensors, probe_logp = self.weights.read(version)
            self.engine.load(tensors)
            gap = (self.engine.logp(self.weights.probe) - probe_logp).abs()
        if not gap.max() <= self.tolerance:                        # `not <=` so that nan counts as wrong
            raise Incurable(f"weights of version {self.version} did not arrive in the engine: its log-probs are up "
                               f"to {gap.max():.3g} from the learner's on the probe (tolerance {self.tolerance:g})")
        self.link.send("pushed", version=self.version, seconds=time.monotonic() - start,
                       gap=[gap.mean().item(), gap.quantile(0.95).item(), gap.max().item()])

    def answer(self) -> None:
        """Answers under the newest weights. Training responses wait meanwhile: a long evaluation is paid in lag."""
        self.load(None)
        with self.paused(), self.link.span("evaluate"):
            answers = self.engine.complete(self.eval_prompts, self.max_response, self.eval_k, self.eval_temperature,
                                           self.link.beat)
        self.asked = False
        self.link.send("evaluated", version=self.version, answers=answers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in the engine: what runs is flushed to its slots, and goes on from there afterwards."""
        going_on = sorted(self.running)
        self.flush(going_on)
        yield
        for s in going_on:
            self.start(s)

    def start(self, s: int) -> None:
        """Let the engine go on with slot s, from whatever tokens it holds."""
        start, length, prompt = int(self.slots.start[s]), int(self.slots.length[s]), int(self.slots.prompt[s])
        if length == 0:
            self.slots.born[s] = self.version
        so_far = start + length - prompt
        self.engine.add(s, self.slots.tokens[s, :start + length].tolist(), self.max_response - so_far,
                        uid=int(self.slots.uid[s]), position=so_far)
        self.running.add(s)

    def flush(self, keys: list[int]) -> None:
        """Take responses out of the engine and write what they have into their slots."""
        for s, (tokens, ids, logmu) in self.engine.take(keys).items():
            self.slots.append(s, tokens, ids, logmu, self.version)
            self.running.discard(s)
            self.tokens += len(tokens)


# -- the engine in transformers --------------------------------------------------------------------


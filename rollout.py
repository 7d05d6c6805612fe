"""
The rollout worker: takes tickets (cache.py), generates, hands slots over.

It loads newly published weights between two engine steps, without waiting for running responses:
it writes these to their slots, replaces the weights, and continues the responses from the tokens
that they have so far, whose hidden states are computed again. With `--inflight keep` they stay in
the engine instead, with the keys and values that they have. Every token carries the version of the
weights that drew it.

Terms
    link     this end of the pipe to the parent: orders come in, reports go out. `link.span` times
             the work for the trace (transport/link.py)
    probe    a fixed sequence of tokens. The learner publishes its log-probs of them with every
             version, and a checksum of every tensor; an engine that holds the same bits and
             computes the same log-probs has the right weights
    overdue  a response whose oldest token would exceed --max-lag if it were not in the next batch
    flush    to write a response that the engine holds into its slot

What is left out: how tokens are drawn (engines/). Tests: tests/test_rollout.py, tests/test_lag.py
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from config import Config
from engines.base import Engine, probe_tolerance
from engines.table import engine_class
from extension import Extensions
from transport.link import Incurable, Link, ParentGone
from transport.published import Published
from transport.shared import SharedMemory


def rollout_worker(cfg: Config, link: Link, shared: SharedMemory, device: str,
                   dtype: torch.dtype) -> None:
    """A rollout process: carry out the parent's orders, and generate between them.

    An engine that fails before its first token would fail again in a new process: Incurable.
    """
    try:
        engine = engine_class(cfg.engine)(cfg, device, dtype)
    except Exception as e:                       # whatever an engine raises
        raise RuntimeError(engine_fault(cfg.engine, "has not started", e)) from e
    worker = Worker(cfg, link, shared, engine, dtype)
    shared.weights.attach(device)
    link.send("ready")
    try:
        work(worker, link)
    except (ParentGone, Incurable):
        raise
    except Exception as e:
        if worker.has_generated:
            raise
        raise Incurable(engine_fault(cfg.engine, "has failed before its first token", e)) from e


def work(worker: Worker, link: Link) -> None:
    """Until the order to stop."""
    while not worker.stopped:
        for order, body in link.orders(wait=worker.idle):
            worker.orders[order](body)
        if not worker.stopped:
            worker.turn()


def engine_fault(name: str, what: str, e: Exception) -> str:
    """One line: what the engine has done, why, and what to do."""
    why = (str(e).strip().splitlines() or [""])[0]
    remedy = "" if name == "hf" else " (--engine hf runs without it)"
    return f"--engine {name} {what}: {type(e).__name__}: {why}{remedy}"


def not_arrived(published: Published, why: str) -> Incurable:
    return Incurable(f"weights of version {published.version} did not arrive in the engine: {why}")


class Worker:
    """The state of a rollout worker, and three promises:

    - a ticket begins under the newest published weights, unless it asks for a version;
    - every token is stored with the version of the weights that drew it;
    - an overdue response is handed over at once, and only if it really is overdue.
    """

    def __init__(self, cfg: Config, link: Link, shared: SharedMemory, engine: Engine,
                 dtype: torch.dtype = torch.float32):
        """`dtype`: in which the engine computes."""
        self.cfg = cfg
        self.link = link
        self.shared = shared
        self.slots = shared.slots
        self.weights = shared.weights
        self.engine = engine
        self.dtype = dtype
        self.extensions = Extensions.load(cfg)
        # Whether weights may change while responses run
        self.in_flight = cfg.schedule == "async" and cfg.inflight != "finish"
        self.orders = {"take": self.take, "cut": self.cut, "drop": self.drop,
                       "evaluate": self.evaluate, "stop": self.stop}
        self.version = -1                        # of the weights in the engine
        self.probe_logp: Tensor | None = None    # of the same weights, in the learner
        self.tokens = 0                          # drawn so far, for the record
        self.has_generated = False               # the engine has made a step
        self.stopped = False
        self.evaluation_wanted = False
        # Tickets not begun yet: (version to draw under, slot); None stands for the newest version
        self.waiting: deque[tuple[int | None, int]] = deque()
        self.running: set[int] = set()           # slots whose responses are in the engine

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
        self.step()

    def step(self) -> None:
        """Make one engine step, hand over what has finished."""
        with self.link.span("generate"):
            finished = self.engine.step()
        self.has_generated = True
        if finished:
            self.flush(finished)
            self.link.send("generated", slots=finished, finished=True, **self.counts())

    def begin_waiting(self) -> None:
        """Begin tickets in their order, up to one that needs other weights while responses run."""
        while self.waiting:
            version, s = self.waiting[0]
            if self.running and self.behind(self.available(version)):
                return
            self.waiting.popleft()
            self.load(self.available(version))
            self.start(s)

    def available(self, version: int | None) -> int | None:
        """`version` if it can still be read. After a restart of this worker it may have been
        overwritten; then None, the newest."""
        if version is not None and not self.weights.holds(version):
            return None
        return version

    def behind(self, version: int | None) -> bool:
        """Whether the engine has other weights than `version`; None: than the newest."""
        wanted = self.weights.version if version is None else version
        return self.version != wanted

    # -- orders

    def take(self, tickets: list[tuple[int | None, int]]) -> None:
        """New tickets: (version to draw under, slot)."""
        self.waiting += tickets

    def evaluate(self, body: None) -> None:
        """An evaluation is wanted; `turn` makes it."""
        self.evaluation_wanted = True

    def cut(self, body: tuple[int, list[int]]) -> None:
        """Hand over what these responses have so far. The rest becomes a new ticket, later."""
        floor, slots = body
        held = self.overdue(floor, slots)
        self.link.send("generated", slots=held, finished=False, **self.counts())

    def drop(self, body: tuple[int, list[int]]) -> None:
        """Throw these responses away."""
        floor, slots = body
        held = self.overdue(floor, slots)
        self.link.send("dropped", slots=held, **self.counts())

    def overdue(self, floor: int, slots: list[int]) -> list[int]:
        """Those of `slots` whose first token is of version `floor` or older, flushed.

        The parent chose them by `born` (cache.py), which may have changed since: a response that
        had no token then may have begun under newer weights. One that still has no token is not
        handed over; it starts again under the newest weights. One whose tokens turn out to be newer
        goes on: with `--inflight keep`, vLLM may have read a part of its prompt before a push.
        """
        held = [s for s in slots if s in self.running and self.slots.born[s] <= floor]
        self.flush(held)
        begun = [s for s in held if self.slots.length[s] > 0]
        self.waiting += [(None, s) for s in held if s not in begun]
        for _, s in self.waiting:
            self.slots.born[s] = self.weights.version    # or newer: the newest when it begins
        late = [s for s in begun if self.slots.born[s] <= floor]
        for s in begun:
            if s not in late:
                self.start(s)
        return late

    def stop(self, body: None) -> None:
        """The last order: flush what runs, and make the evaluation if one is still wanted."""
        self.flush(sorted(self.running))
        if self.evaluation_wanted:
            self.answer()
        self.link.send("stopped", **self.counts())
        self.stopped = True

    def counts(self) -> dict[str, int]:
        """Of this worker so far, for the record: tokens drawn, and responses put aside."""
        return {"tokens": self.tokens, "preempted": self.engine.preempted}

    # -- weights

    def load(self, version: int | None) -> None:
        """Replace the weights of the engine by those of `version`; None: by the newest."""
        if not self.behind(version):
            return
        if self.cfg.inflight == "keep":
            self.push_beside_responses(version)
        else:
            with self.paused():
                self.push(version)

    def push_beside_responses(self, version: int | None) -> None:
        """Replace the weights while responses are in the engine."""
        tokenless = [s for s in self.engine.not_begun() if self.slots.length[s] == 0]
        self.push(version)
        for s in tokenless:
            self.slots.born[s] = self.version
        if self.running:
            self.step()          # some may have ended on the probe: nobody may take up these again

    def push(self, version: int | None) -> None:
        """Replace the weights of the engine, which proves that they have arrived."""
        with self.link.span("push"):
            start = time.monotonic()
            published, proven = self.copy_weights(version)
            gap = self.check_probe(published, proven)
            self.version = published.version
            self.probe_logp = published.probe_logp
        self.link.send("pushed", version=self.version, seconds=time.monotonic() - start,
                       gap=[gap.mean().item(), gap.quantile(0.95).item(), gap.max().item()])

    def copy_weights(self, version: int | None) -> tuple[Published, bool]:
        """Load into the engine what is published, again if the learner has overwritten it
        meanwhile: that takes two more versions, so it is rare. The engine must then hold the bits
        that were published, as far as it can show them; returns also whether it shows some of every
        tensor.

        Raises Incurable: a restart of this worker would not help.
        """
        while True:
            published = self.weights.read(version)
            self.check_finite(published)
            self.engine.load(published.tensors, published.version)
            layout = self.weights.layout
            shown = self.engine.checksums(layout, published.version)
            wrong = sorted({x.name for x in shown if x.checksum != published.checksum_like(x)})
            if self.weights.holds(published.version):
                break
            assert version is None, f"version {version} was overwritten while it was read"
        if wrong:
            raise not_arrived(published, f"it has other numbers than were published in {len(wrong)} "
                              f"of {len(layout)} tensors, the first of them {wrong[0]}")
        return published, {x.name for x in shown} == layout.keys()

    def check_probe(self, published: Published, proven: bool) -> Tensor:
        """The engine must compute the learner's log-probs of the probe. Returns how far these
        differ, [len - 1]. `proven`: the engine has shown bits of all tensors.

        Raises Incurable.
        """
        gap = (self.engine.logp(self.weights.probe) - published.probe_logp).abs()
        moved = 0.0
        if self.probe_logp is not None:
            moved = (published.probe_logp - self.probe_logp).abs().max().item()
        tolerance = probe_tolerance(self.dtype, moved, proven)
        if not gap.max() <= tolerance:                   # `not <=`, so that nan counts as wrong
            raise not_arrived(published, "its log-probs differ from the learner's by up to "
                              f"{gap.max():.3g} on the probe (tolerance {tolerance:.3g})")
        return gap

    def check_finite(self, published: Published) -> None:
        """No engine can prove that nan has arrived: then the update is to blame, not the way."""
        if not published.probe_logp.isfinite().all():
            raise Incurable(f"version {published.version} of the student is useless: the learner "
                            "itself computes log-probs of nan or inf with it. Its last update was "
                            f"too large (--lr {self.cfg.lr:g}, --clip {self.cfg.clip:g}; grad_norm in "
                            "the log): lower --lr, or raise --warmup")

    def answer(self) -> None:
        """Answer the evaluation prompts under the newest weights.

        Meanwhile the training responses wait, so a long evaluation adds to their lag.
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
        """Empty the engine for a while: flush what runs, and let it continue afterwards."""
        interrupted = self.by_age(self.running)
        self.flush(interrupted)
        yield
        for s in interrupted:
            self.start(s)

    def by_age(self, slots: Iterable[int]) -> list[int]:
        """The same slots, oldest response first. An engine with fewer places than responses takes
        them in this order, so that none is overtaken at every push until it is overdue."""
        return sorted(slots, key=lambda s: int(self.slots.uid[s]))

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
        for s, drawn in self.engine.take(slots).items():
            kept = self.kept(s, drawn.tokens) if self.slots.sparse else None
            self.slots.append(s, *drawn, kept)
            self.running.discard(s)
            self.tokens += len(drawn.tokens)

    def kept(self, s: int, tokens: Tensor) -> Tensor | None:
        """Which of these new tokens of slot s keep their scores, bool [k]; None: all of them."""
        position = int(self.slots.start[s] + self.slots.length[s] - self.slots.prompt[s])
        return self.extensions.stored(self.shared.tensors, tokens, int(self.slots.uid[s]),
                                      position)

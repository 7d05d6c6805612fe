"""
The learner: from stored scores to an update.

A step reads its slots in place, computes log p of the stored words under the current student, and
back-propagates the loss of the estimator. If the estimator needs the whole vocabulary, the slot
holds the teacher's last hidden state, and the learner applies the teacher's head to it.

Three sizes
    train batch      --batch responses: one step, after which one version is published
    optimizer batch  the part of it (one of --minibatches) that one AdamW update uses. The loss is
                     a sum over its positions, divided by a number of tokens that is the same for
                     all batches of an asynchronous run (`Divisors`)
    micro-batch      what passes through the model at once; its size does not change the loss

Several learners are ranks: each works on its share of a batch and on its shards of the model, and
rank 0 reports (models/sharding.py). Orders and reports pass through a link (rollout.py).

What is left out: the model itself (models/student.py); the log (record/).
Shapes: M new tokens of a micro-batch, m of them with stored scores; C columns of a slot, of which
n were drawn by mu; V words. Tests: tests/test_learner.py
"""
from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cache import Segment
from config import Config
from estimators import DENSE, ESTIMATORS, VALUE, importance_weight
from extension import Extensions, Step
from models.head import teacher_logq
from models.loading import load_head
from models.sharding import Ranks, concatenated
from models.student import Student
from record.checkpoint import UNWRITABLE, read_training, replace, write_training
from transport.link import Link
from transport.shared import LearnerStart, SharedMemory
from transport.versions import WeightTransport

FIRST_ROWS = "rows of the first batch:"          # begins the names of Divisors in a checkpoint
Measured = dict[str, Tensor]                     # by name, one value per position [m]
CACHED = ("ids", "logpi", "logmu", "logq", "hidden")              # what a position has in a slot
MEASURED = ("loss", "kl", "w", "entropy", "duplicates", "y")      # what `Learner.measure` returns
UNUSABLE = {"logmu": "the engine sampled from nan",
            "logpi": "the engine, or a teacher that draws, sampled from nan",
            "logq": "the teacher has not scored it, or scored nan",
            "hidden": "the teacher's last state is nan"}


@dataclass
class Trained:
    """What became of one train batch."""
    metrics: dict[str, object]
    skipped: list[dict]                          # optimizer updates that were not made, and why
    events: list[dict] = field(default_factory=list)
    flush: bool = False      # an extension has moved the weights: the parent ends what is running


class Interrupted(Exception):
    """The run is to end: the step was given up before its first update."""


# -- one step ------------------------------------------------------------------------------------

class Learner:
    """The student, its optimizer, and the loss."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype, checkpoint: str = "",
                 ranks: Ranks | None = None):
        """`dtype` of compute. `checkpoint`: the folder from which a run continues."""
        self.cfg = cfg
        self.ranks = ranks or Ranks()
        self.estimator = ESTIMATORS[cfg.estimator]
        self.loss = self.estimator.bind(cfg)
        self.batch_context: dict[int, dict[str, Tensor]] = {}    # slot -> result of `prepass`
        self.teacher_head = None
        if self.estimator.support == "full":
            self.teacher_head = load_head(cfg.teacher, device, dtype)
        self.student = Student(cfg, device, dtype, checkpoint, self.ranks)
        parameters = [p for _, p in self.student.trained()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=cfg.lr, weight_decay=cfg.weight_decay,
            fused=True if self.student.device.type == "cuda" else None)
        self.updates = 0
        self.divisors = Divisors(lockstep=cfg.schedule != "async")
        self.continues = bool(checkpoint)        # resumed from a checkpoint
        saved: dict[str, Tensor] = {}
        if checkpoint:
            self.updates, saved = read_training(Path(checkpoint), self.student.trained(),
                                                self.optimizer, self.ranks.part)
            self.divisors.take(saved)
        self.extensions = Extensions.load(cfg)
        self.extensions.attach(self, saved)
        self.layers = self.extensions.student_layers

    def step(self, segments: list[Segment], version: int, link: Link | None = None) -> Trained:
        """Train once on every new token of the segments, which are not changed.

        `version`: of the weights before the step. An update is skipped if its inputs are
        `unusable` or its gradient is not finite. Raises Interrupted if the run is to end and no
        update has been made yet.
        """
        lag = lags(segments, version)
        self.check_lag(lag)
        self.batch_context = self.prepass(segments, link)
        measured: list[Measured] = []
        skipped: list[dict] = []
        norm = torch.tensor(torch.nan)
        lr = self.learning_rate()
        self.divisors.note(segments)
        minibatches = split(segments, self.cfg.minibatches)
        for i, minibatch in enumerate(minibatches):
            fault = unusable(minibatch)
            if fault:
                skipped.append(fault)
                measured.append(self.nothing_measured(minibatch))
                continue
            divisors = self.divisors.of(minibatch, len(minibatches))
            measured += self.accumulate(minibatch, divisors, link, first=i == 0)
            lr = self.learning_rate()
            norm = self.update(lr)
            if not norm.isfinite():
                slots = [s.slot for s in minibatch]
                why = f"the gradient's norm is {norm.item()}"
                skipped.append({"slots": slots, "why": why})
        everywhere = self.ranks.all(concatenated(measured))
        step = Step(segments=segments, measured=everywhere, version=version, link=link)
        outcome = self.extensions.after_step(step)
        metrics = self.metrics(segments, everywhere, lag) | outcome.metrics
        metrics |= {"grad_norm": norm.item(), "lr": lr}
        return Trained(metrics, skipped, outcome.events, outcome.flush)

    def accumulate(self, minibatch: list[Segment], divisors: dict[str, float],
                   link: Link | None, first: bool) -> list[Measured]:
        """Add up the gradient of one optimizer batch, micro-batch by micro-batch."""
        measured = []
        for group in self.ranks.groups(minibatch, self.cfg.micro_tokens):
            if link and first and self.ranks.any(link.hurried):      # the parent wants to end
                self.optimizer.zero_grad()
                raise Interrupted
            measured.append(self.backward(group, max(1, divisors[""]), divisors))
            if link:
                link.beat()
        return measured

    def backward(self, group: list[Segment], count: float,
                 used: Mapping[str, float] | None = None) -> Measured:
        """Add the gradient of this micro-batch to that of the optimizer batch.

        The estimator's loss is divided by `count` tokens, and the loss of an extension by
        `used[name]`, rows of its slot tensor (`divisors`). FSDP averages over the learners
        although a sum is wanted, so each divisor is multiplied by `part`.
        """
        part = 1 / self.ranks.size
        rows, states = self.student.rows_and_states(group, self.layers)
        cached = {name: self.cached(group, name) for name in CACHED}
        context = self.context_of(group)
        ids = cached["ids"].long()

        def loss(at: slice, logp: Tensor, every: Tensor | None, **tail: Tensor) -> Measured:
            return self.measure(logp, every, {name: x[at] for name, x in cached.items()},
                                {name: x[at] for name, x in context.items()} | tail)

        roots: list[tuple[Tensor, Tensor | None]] = []           # for autograd: tensor, gradient
        if self.estimator.head:
            gradient, measured = self.student.head_backward(
                rows, ids, loss, count=count * part, all_words=self.teacher_head is not None,
                best=self.estimator.scored(ids) if self.estimator.tail else None)
            roots.append((rows, gradient))
        else:       # the head gets no gradient at all: with one of 0, AdamW would still decay it
            measured = self.measure(self.student.logp(rows, ids), None, cached, context)
        for extension in self.extensions:
            own = extension.loss([states[layer] for layer in extension.student_layers], group)
            if own is not None:
                divisor = count
                if extension.loss_over:
                    divisor = max(1, (used or {}).get(extension.loss_over, 0))
                roots.append((own.sum() / (divisor * part), None))
        torch.autograd.backward([root for root, _ in roots], [g for _, g in roots])
        return measured

    def measure(self, logp: Tensor, every: Tensor | None, cached: dict[str, Tensor],
                context: dict[str, Tensor]) -> Measured:
        """All [m]: the loss, the logged KL, w = p / mu of the emitted token, an estimate of p's
        entropy, the share of drawn words that are repeats, and the emitted token y.

        logp [m, C] are those of the stored words; `every` [m, V] those of all words, or None if
        the estimator does not need them. `context`: further arguments of the loss, from `prepass`
        and, if the estimator has a tail, from the head.

        Where an extension weighs positions by their emitted token, or leaves some out, column 0
        takes no part in loss and KL: given such a choice it is no draw from mu any more.
        """
        ids = cached["ids"]
        logq = cached["logq"]
        logpi = cached["logpi"]
        n = self.estimator.drawn(ids.shape[1])
        selective = self.extensions.selective
        if selective and n > 1:                  # one of n independent draws does not take part
            logpi = logpi + math.log((n - 1) / n)
        drawn = [self.estimator.logged(x, selective) for x in (logp.detach(), logq, logpi)]
        if every is None:
            scored = [self.estimator.scored(x, selective) for x in (logp, logq, logpi)]
            loss = self.loss(*scored, **context)
            kl = VALUE[self.cfg.kl](*drawn)
        else:
            with torch.no_grad():
                every_q = teacher_logq(self.teacher_head, cached["hidden"], every.shape[1])
            loss = self.loss(every, every_q, every_q, **context)     # these losses ignore logpi
            kl = DENSE[self.cfg.kl](every.detach(), every_q, every_q)
        weight = self.extensions.weight(ids[:, 0])
        if weight is not None:
            loss = loss * weight
        copies = importance_weight(drawn[0], drawn[2])
        distinct = ids[:, :n].sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
        return {"loss": loss, "kl": kl, "w": importance_weight(logp[:, 0], cached["logmu"]),
                "entropy": -(copies * drawn[0]).sum(-1), "duplicates": 1 - distinct / n,
                "y": ids[:, 0]}

    def update(self, lr: float) -> Tensor:
        """One step of the optimizer, unless the gradient is not finite. Returns the norm of the
        gradient before clipping."""
        parameters = self.student.model.parameters()
        norm = self.ranks.gather(torch.nn.utils.clip_grad_norm_(parameters, self.cfg.clip))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if norm.isfinite():
            self.optimizer.step()
        self.updates += 1
        self.optimizer.zero_grad()
        return norm

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.cfg.lr * rate(self.updates, self.cfg)

    # -- what a step needs of its slots ----------------------------------------------------------

    @torch.no_grad()
    def prepass(self, segments: list[Segment],
                link: Link | None = None) -> dict[int, dict[str, Tensor]]:
        """By slot, one row per position: the further arguments of a loss that depends on the whole
        train batch (`Estimator.batch`), computed before the first update."""
        if self.estimator.batch is None:
            return {}
        mine = self.ranks.groups(segments, self.cfg.micro_tokens)
        parts = []
        for group in mine:
            ids = self.cached(group, "ids").long()
            parts.append(self.student.logp(self.student.rows(group), ids).cpu())
            if link:
                link.beat()
        self.student.release()
        slots = [s.slot for group in mine for s in group if len(s)]
        by_slot = {s.slot: s for s in segments}
        order: list[Segment] = []
        logp = []
        for their_slots, their_logp in self.ranks.all((slots, torch.cat(parts))):
            order += [by_slot[slot] for slot in their_slots]
            logp.append(their_logp)
        columns = [torch.cat(logp).to(self.student.device),
                   self.cached(order, "logq"), self.cached(order, "logpi")]
        found = self.estimator.batch(*map(self.estimator.scored, columns))
        lengths = [len(s.ids) for s in order]
        split_up = {name: x.expand(len(columns[0]), -1).split(lengths)
                    for name, x in found.items()}
        return {s.slot: {name: rows[i] for name, rows in split_up.items()}
                for i, s in enumerate(order)}

    def context_of(self, group: list[Segment]) -> dict[str, Tensor]:
        """What `prepass` found for the positions of a micro-batch, [m, ..] each."""
        names = self.batch_context[group[0].slot] if self.batch_context else ()
        return {name: torch.cat([self.batch_context[s.slot][name][:len(s.ids)] for s in group])
                for name in names}

    def cached(self, group: list[Segment], name: str) -> Tensor:
        """One field of these segments, [m, ..], on the device of the student."""
        return torch.cat([getattr(s, name) for s in group]).to(self.student.device)

    def check_lag(self, lag: Tensor) -> None:
        """Raises RuntimeError if the scheduler has broken the promise of --max-lag; lag [M]."""
        bounded = self.cfg.schedule == "async" and self.cfg.overdue != "keep"
        oldest = int(lag.max())
        if bounded and oldest > self.cfg.max_lag:
            raise RuntimeError(f"a token of lag {oldest} was to be trained, --max-lag "
                               f"{self.cfg.max_lag} is broken")

    # -- what a step reports ---------------------------------------------------------------------

    def metrics(self, segments: list[Segment], measured: list[Measured],
                lag: Tensor) -> dict[str, object]:
        """The learner's numbers of a step; record/metrics.py explains each. lag [M], versions."""
        tokens = sum(map(len, segments))
        ends = [s.start - s.prompt + len(s) for s in segments]
        found: dict[str, object] = dict(summarize(measured))
        stored = sum(len(s.ids) for s in segments) / tokens
        found["loss"] = found["loss"] * stored         # per position of the batch
        found |= {"tokens": tokens, "stored": stored, "sequences": len(segments),
                  "token_weight": self.divisors.token_weight(segments),
                  "length_trained": sum(ends) / len(ends),
                  "context": sum(s.start - s.prompt for s in segments),
                  "lag_min": int(lag.min()), "lag_mean": lag.mean().item(),
                  "lag_max": int(lag.max())}
        return found

    def nothing_measured(self, minibatch: list[Segment]) -> Measured:
        """For an update that is skipped: nan for each of its tokens, and only at rank 0."""
        tokens = max(1, sum(map(len, minibatch)))
        size = tokens if self.ranks.rank == 0 else 0
        return {name: torch.full((size,), torch.nan) for name in MEASURED}

    # -- publishing and saving -------------------------------------------------------------------

    def publish(self, weights: WeightTransport, version: int) -> None:
        """Make the student readable as this version. All learners take part.

        Rollout and teacher workers go on meanwhile. The learner waits until it is done: to train
        at the same time would gain 1% (benchmarks/step.py).
        """
        student = self.student
        probe_logp = student.probe_logp(weights.probe)
        parameters = student.parameters()
        if self.ranks.rank == 0:
            weights.publish(parameters, version, probe_logp, student.gather)
        else:
            student.collect(parameters.items())

    def save(self, folder: Path) -> None:
        """Write the student as a Hugging Face folder, under another name until it is complete."""
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        self.student.write(partial)
        self.student.write_adapter(partial / "adapter")
        if self.ranks.rank == 0:
            replace(partial, folder)

    def checkpoint(self, folder: Path) -> None:
        """Write the learner's part of a checkpoint: the student and the optimizer."""
        fault = None
        try:
            self.student.write(folder)
        except UNWRITABLE as e:      # raised below: the other ranks still gather with this one
            fault = e
        # float32 weights are stored too where the folder does not hold them
        masters = self.student.dtype != torch.float32 or self.cfg.lora_rank > 0
        write_training(folder, self.student.trained(), self.optimizer, self.updates,
                       masters=masters, extra=self.state(),
                       collect=self.ranks.collect, rank=self.ranks.rank)
        if fault:
            raise fault


    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What else a resumed run has to know, by name."""
        yield from self.divisors.state()
        yield from self.extensions.state()


class Divisors:
    """What the losses of an optimizer batch are divided by: "" the estimator's, by new tokens; the
    name of a slot tensor: that of an extension, by its used rows.

    In lockstep a batch holds all responses that were begun together, and each loss is a mean over
    the rows of its batch. An asynchronous run trains first what ends first: its first batches hold
    short responses, and in a mean over their few tokens each would weigh up to twice as much as a
    token of a later batch. So there every batch is divided by the rows of the run's first one, and
    a token weighs the same in all of them.
    """

    def __init__(self, lockstep: bool):
        self.lockstep = lockstep
        self.first: dict[str, float] = {}        # rows of the first batch that has any

    def note(self, segments: list[Segment]) -> None:
        """A batch is to be trained."""
        for name, rows in rows_in_use(segments).items():
            if not self.first.get(name):
                self.first[name] = rows

    def of(self, minibatch: list[Segment], updates: int) -> dict[str, float]:
        """For one of the `updates` of a batch."""
        if self.lockstep:
            return rows_in_use(minibatch)
        return {name: rows / updates for name, rows in self.first.items()}

    def token_weight(self, batch: list[Segment]) -> float:
        """Weight of a token of this batch, relative to one of the first batch."""
        return self.first[""] / self.of(batch, 1)[""]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, rows in self.first.items():
            yield FIRST_ROWS + name, torch.tensor(rows)

    def take(self, saved: dict[str, Tensor]) -> None:
        """Remove from `saved` what `state` has written, and go on from it."""
        for key in [key for key in saved if key.startswith(FIRST_ROWS)]:
            self.first[key.removeprefix(FIRST_ROWS)] = saved.pop(key).item()


def split(segments: list[Segment], minibatches: int) -> list[list[Segment]]:
    """Optimizer batches of nearly equal numbers of responses, in order."""
    n = len(segments)
    m = min(minibatches, n)
    return [segments[i * n // m:(i + 1) * n // m] for i in range(m)]


def rate(update: int, cfg: Config) -> float:
    """The fraction of --lr at an optimizer update: a linear rise over --warmup, then constant, or
    half a cosine down to 0."""
    if update < cfg.warmup:
        return (update + 1) / cfg.warmup
    if cfg.lr_schedule == "constant":
        return 1.0
    total = cfg.steps * cfg.minibatches
    done = (update - cfg.warmup) / max(1, total - cfg.warmup)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))


def lags(segments: list[Segment], version: int) -> Tensor:
    """The lag of every new token [M], float32: learner version minus the version that drew it."""
    return torch.cat([version - s.version for s in segments]).float()


def rows_in_use(segments: Sequence[Segment]) -> dict[str, int]:
    """By name of an extension's slot tensor, the number of its rows that these segments use; by
    the name "", the number of their new tokens."""
    used = {"": sum(map(len, segments))}
    for s in segments:
        for name, rows in s.extra.items():
            used[name] = used.get(name, 0) + len(rows)
    return used


def unusable(segments: list[Segment]) -> dict | None:
    """The slots whose stored numbers are nan or inf, and why; None if there are none."""
    reasons = dict(UNUSABLE)
    reasons |= {name: "what the teacher has recorded is nan" for s in segments for name in s.extra}
    for name, why in reasons.items():
        bad = []
        for s in segments:
            x = s.extra[name] if name in s.extra else getattr(s, name)
            if (x.isnan() | (x == torch.inf)).any():
                bad.append(s.slot)
        if bad:
            return {"slots": bad, "why": f"{name}: {why}"}
    return None


def summarize(measured: list[Measured]) -> dict[str, float]:
    """The step's numbers, from what was measured in all micro-batches. `ess`: the effective sample
    size of the weights w, as a fraction of their number."""
    x = {}
    for name in [key for key in measured[0] if key != "y"]:
        values = torch.cat([m[name] for m in measured]).float()
        if len(values) == 0:                     # no position of the batch has scores
            values = values.new_tensor([torch.nan])
        x[name] = values
    w = x.pop("w")
    p99 = w.kthvalue(math.ceil(0.99 * len(w))).values
    means = {name: v.mean().item() for name, v in x.items()}
    return means | {"w_mean": w.mean().item(), "w_max": w.max().item(), "w_p99": p99.item(),
                    "ess": (w.sum() ** 2 / (w ** 2).sum() / len(w)).item()}


# -- the worker ----------------------------------------------------------------------------------

class LearnerWorker:
    """Carries out the parent's orders in a learner process."""

    def __init__(self, learner: Learner, link: Link, shared: SharedMemory, version: int):
        self.learner = learner
        self.link = link
        self.shared = shared
        self.version = version
        self.idle_since = time.monotonic()
        self.leads = learner.ranks.rank == 0
        self.orders = {"train": self.train, "checkpoint": self.checkpoint, "export": self.export,
                       "validation": self.validation, "examine": self.examine}

    def publish(self) -> float:
        """Write the weights where the engines read them. Returns the seconds that it took."""
        start = time.monotonic()
        self.learner.publish(self.shared.weights, self.version)
        if self.leads:
            self.learner.extensions.published(self.shared.tensors)
        return time.monotonic() - start

    def train(self, slots: list[int]) -> None:
        """One train batch, published; the slots are free afterwards."""
        start = time.monotonic()
        segments = [self.shared.slots.read(s) for s in slots]
        try:
            with self.link.span("step"):
                trained = self.learner.step(segments, self.version, self.link)
        except Interrupted:                      # the version does not change
            return
        self.version += 1
        with self.link.span("publish"):
            publish_s = self.publish()
        seconds = time.monotonic() - start
        metrics = trained.metrics | {
            "step": self.version, "version": self.version, "publish_s": publish_s,
            "push_bytes": self.shared.weights.nbytes, "wait_s": start - self.idle_since,
            "train_tok_s": trained.metrics["tokens"] / seconds}
        kind = "trained" if self.leads else "trained along"      # the parent reads rank 0's report
        self.link.send(kind, metrics=metrics, skipped=trained.skipped, events=trained.events,
                       flush=trained.flush)

    def checkpoint(self, folder: str) -> None:
        self.write(self.learner.checkpoint, folder)

    def export(self, folder: str) -> None:
        self.write(self.learner.save, folder)

    def write(self, how, folder: str) -> None:
        """Save by `how`. A full disk is reported, and does not end the run."""
        why = ""
        try:
            how(Path(folder))
        except UNWRITABLE as e:
            why = str(e)
        if self.leads:
            self.link.send("saved", folder=folder, version=self.version, why=why)

    def validation(self, prompts: list[list[int]]) -> None:
        """Pass on prompts whose answers the parent can grade, to the extensions that want some."""
        for extension in self.learner.extensions:
            extension.validation_prompts = prompts[:extension.validation_rows]

    def examine(self, slots: list[int]) -> None:
        """An extension has moved the weights, and what was running has been ended and scored.
        Report which of these slots to drop untrained."""
        segments = [self.shared.slots.read(s) for s in slots]
        drop = self.learner.extensions.after_flush(segments, self.link)
        if self.leads:
            self.link.send("flushed", drop=sorted(drop), examined=len(slots))


def learner_worker(cfg: Config, link: Link, shared: SharedMemory, start: LearnerStart, device: str,
                   dtype: torch.dtype) -> None:
    """A learner process: publish the first version, then train until the order to stop."""
    ranks = Ranks(start.rank, cfg.learners, f"{cfg.out}/.learners")
    learner = Learner(cfg, device, dtype, start.checkpoint, ranks)
    worker = LearnerWorker(learner, link, shared, start.version)
    shared.weights.attach(device)
    worker.publish()
    link.send("ready")
    while True:
        for order, body in link.orders(wait=True):
            if order == "stop":
                link.send("stopped")
                shared.weights.close()
                return ranks.leave()
            worker.orders[order](body)
            worker.idle_since = time.monotonic()

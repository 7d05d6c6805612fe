"""
EffOPD (arXiv 2605.11739): longer steps in the direction that training takes, as far as a gate
finds them better.

    --extend effopd --effopd.gate kl

After the steps t = 1, 2, 4, 8, .. the learner tries W_t + 2k D for k = 1, 2, .. --effopd.most,
with D = W_t - W_ref, and stops at the first that is not strictly better than all before (the
paper says not worse; its code: better). The weights become the best of them, which is W_t to the
bit where that is k = 0. W_ref is the outcome of the previous jump; at first it is the initial
student. Only the weights of attention and MLP move; embeddings, head and norms between them do
not. The moments of Adam stay.

    gate kl         the forward KL on at most 64 rollouts of the first batch, kept with scores
    gate accuracy   the share of right answers, one sampled for each of 50 training prompts: the
                    paper's

No rollout judges a direction that it has made: with the gate `kl` there is no jump after step 1,
W_ref is W_1 instead, and what a later batch continues of the kept rollouts is given up.

The measure of the first gate is the forward KL, whatever is trained: the mean of
(q / mu)(log q - log p), whose weights no candidate can move. The reverse KL, the mean of
w (log p - log q), likes best a student that never says any of the set's words again: all w are 0.

A jump makes old what is in flight: it is cut (with --overdue drop: dropped) and scored, and
dropped where the effective sample size of its weights is below MIN_ESS.
What is left out: LoRA; --schedule step-off; a set that is renewed. A later epoch trains other
answers to the set's prompts.
Shapes: M new tokens; C columns of a slot. Tests: tests/test_effopd.py
"""
from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cache import Segment
from config import Config, Count, require
from engines.hf import HFEngine
from engines.uniforms import VALIDATION
from estimators import DENSE, VALUE, importance_weight
from extension import Extension, ModelPair, Outcome, Step
from models.head import teacher_logq
from models.sharding import layers, shard_of

BETTER = {"kl": operator.lt, "accuracy": operator.gt}    # by gate: whether a value beats another
KEPT = 64                # responses in the set of the gate `kl`
PROMPTS = 50             # of the gate `accuracy`
MIN_ESS = 0.5            # after a jump, responses with a smaller one are dropped


class Hurried(Exception):
    """The run is ordered to end while candidates are tried."""


class EffOPD(Extension):
    """What the learner remembers between its jumps.

    Copies of weights lie on the CPU; of several learners each holds those of its shards.
    """

    @dataclass(frozen=True)
    class Flags:
        gate: Literal["kl", "accuracy"] = "kl"
        """what decides whether a longer step is better"""
        most: Count = 5
        """number of longer steps that are tried at most, each time"""

    def __init__(self, name: str, cfg: Config, flags: Any):
        super().__init__(name, cfg, flags)
        self.fixed_on_resume = ("gate", "teacher")       # the scores of the set are this teacher's
        if flags.gate == "accuracy":
            self.fixed_on_resume = ("gate",)
            self.validation_rows = PROMPTS
            self.fixed_on_resume = ("gate",)             # no teacher's scores are kept

    # -- the parent

    def check(self, models: ModelPair) -> list[str]:
        cfg = self.cfg
        require(cfg.schedule != "step-off",
                "--schedule step-off: its lag is controlled, which the jumps of --extend effopd "
                "would upset (--schedule async or sync)")
        require(cfg.lora_rank == 0,
                f"--lora-rank {cfg.lora_rank}: --extend effopd moves the student's own weights")
        if self.flags.gate == "accuracy":
            require(cfg.learners == 1,
                    f"--learners {cfg.learners}: --effopd.gate accuracy generates on one "
                    "(--learners 1, or --effopd.gate kl)")
            require(not getattr(models.student_config, "sliding_window", None),
                    f"--student {cfg.student}: has a sliding window, which the answers of "
                    "--effopd.gate accuracy would ignore")
        return []

    def extra_gb(self, models: ModelPair) -> dict[str, float]:
        """The weights before a jump and those it is measured from. Gate `kl`: the set, which every
        learner has; gate `accuracy`: keys and values, float32, of the answers."""
        cfg = self.cfg
        P = models.student.P
        found = {"host": 8 * P / 1e9, "checkpoint": 4 * P / 1e9}
        if self.flags.gate == "kl":
            kept = min(KEPT, cfg.batch)
            found["host"] += cfg.learners * kept * models.slot_bytes / 1e9
        else:
            tokens = min(PROMPTS, cfg.max_running) * (cfg.max_prompt + cfg.max_response)
            found["learner"] = tokens * models.student.cached(4) / 1e9
        return found

    # -- a learner

    def attach(self, learner: Any, saved: Mapping[str, Tensor]) -> None:
        self.learner = learner
        self.student = learner.student
        self.ranks = learner.ranks
        self.link = None
        self.tokens = 0          # that the validation of this step has read or drawn
        self.moving = moving_weights(self.student.model)
        self.set: list[Segment] = []                     # of the gate `kl`
        if saved:
            self.ref = {name: shard_of(self.ranks.part(saved[name], p)).cpu()
                        for name, p in self.moving.items()}
            self.set = unpacked(saved)
        else:
            self.ref = self.copies()
        self.engine = None
        if self.flags.gate == "accuracy":
            self.engine = OwnEngine(self.cfg, self.student.model)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor after the other: of several learners' shards only one at a time is whole."""
        for name, p in self.moving.items():
            yield name, self.ranks.joined(self.ref[name], p)
        yield from packed(self.set).items()

    @torch.no_grad()
    def after_step(self, step: Step) -> Outcome:
        """After the updates of a step: a jump, if it is time for one."""
        if self.flags.gate == "kl" and not self.holds_out(step.segments):
            return Outcome()
        if not is_trigger(step.version + 1):
            return Outcome()
        start = time.monotonic()
        self.tokens = 0
        self.link = step.link
        now = self.copies()
        k, values = climb(lambda k: self.value_of(now, k), self.flags.most,
                          BETTER[self.flags.gate])
        self.move(now, k)
        now = {}                 # freed before the new copies are made
        self.ref = {}
        self.ref = self.copies()
        event = {"what": "effopd", "k": k, "gate": self.flags.gate,
                 "tokens": sum(self.ranks.all(self.tokens)),
                 "values": [v if abs(v) < torch.inf else None for v in values],
                 "seconds": time.monotonic() - start}
        return Outcome(events=[event], flush=k > 0)

    def copies(self) -> dict[str, Tensor]:
        """The weights that move, on the CPU."""
        return {name: shard_of(p.detach()).to("cpu", copy=True)
                for name, p in self.moving.items()}

    def move(self, now: dict[str, Tensor], k: int) -> None:
        """To W_t + 2k D, from W_t and not from the last candidate: the best one is made again
        exactly."""
        for name, p in self.moving.items():
            w = now[name].to(p.device)
            if k > 0:
                w = w + 2 * k * (w - self.ref[name].to(p.device))
            shard_of(p.detach()).copy_(w)

    # -- the gates

    def holds_out(self, segments: list[Segment]) -> bool:
        """Whether there is a set that had no part in D, after a step on these segments.

        Where there is none, the set is made of them, and D begins behind them.
        """
        self.set = [kept for kept in self.set if not is_continued(kept, segments)]
        if self.set:
            return True
        self.set = kept_copies(segments)
        self.ref = self.copies()
        return False

    def value_of(self, now: dict[str, Tensor], k: int) -> float:
        """The gate's value of candidate k; nan where the run is ordered to end: then the best so far
        has to do."""
        self.move(now, k)
        if self.link is not None and self.ranks.any(self.link.hurried):
            return torch.nan
        try:
            return self.accuracy() if self.flags.gate == "accuracy" else self.kl()
        except Hurried:
            return torch.nan

    def kl(self) -> float:
        """The forward KL per token of the set, nats."""
        found = [torch.empty(0)]
        for group in self.ranks.groups(self.set, self.cfg.micro_tokens):
            found.append(self.kl_of(group).cpu())
            self.beat(sum(len(s.tokens) for s in group if len(s)))
        self.student.release()
        parts = [x for part in self.ranks.all(found) for x in part]
        return torch.cat(parts).mean(dtype=torch.float64).item()

    def kl_of(self, group: list[Segment]) -> Tensor:
        """The same at every new token [M]: exact where the teacher's head is at the learner, else
        an estimate."""
        learner = self.learner
        student = self.student
        rows = student.rows(group)
        if learner.teacher_head is None:
            n = learner.estimator.drawn(self.cfg.mc_samples)
            ids, logpi, logq = (learner.cached(group, name)[:, :n]
                                for name in ("ids", "logpi", "logq"))
            return VALUE["forward"](student.logp(rows, ids.long()), logq, logpi)
        hidden = learner.cached(group, "hidden")
        values = []
        for i in range(0, max(1, len(rows)), student.chunk):
            part = slice(i, i + student.chunk)
            q = teacher_logq(learner.teacher_head, hidden[part], student.words)
            words = torch.arange(q.shape[1], device=q.device).expand(len(q), -1)
            values.append(DENSE["forward"](student.logp(rows[part], words), q, q))
        return torch.cat(values)

    def accuracy(self) -> float:
        """The share of right answers: drawn here, graded by the parent, who knows the texts."""
        # layers that compute their inside again would keep no cache
        again = [layer.eval() for layer in layers(self.student.model) if layer.training]
        try:
            with self.student.compute():
                answers = self.engine.complete(
                    self.validation_prompts, self.cfg.max_response, temperature=1.0,
                    each_step=self.one_token, stream=VALIDATION)
        finally:
            for layer in again:
                layer.training = True
        self.beat(sum(map(len, answers)))
        self.link.send("validation_answers", answers=answers)
        return self.link.answer("validation_share")

    def one_token(self) -> None:
        self.beat(0)
        if self.link is not None and self.link.hurried:
            raise Hurried

    def beat(self, tokens: int) -> None:
        self.tokens += tokens
        if self.link is not None:
            self.link.beat()

    # -- what was in flight

    @torch.no_grad()
    def after_flush(self, segments: list[Segment], link: Any) -> set[int]:
        """Drop the slots whose weights have an effective sample size below MIN_ESS."""
        ess = self.sample_sizes(segments, link)
        return {slot for slot, x in ess.items() if x < MIN_ESS}

    def sample_sizes(self, segments: list[Segment], link: Any) -> dict[int, float]:
        """By slot, the effective sample size of the emitted tokens' weights w = p / mu,
        (sum w)^2 / sum w^2 / n: 1 where all are alike."""
        found: dict[int, float] = {}
        for group in self.ranks.groups(segments, self.cfg.micro_tokens):
            y = self.learner.cached(group, "ids")[:, :1].long()
            logp = self.student.logp(self.student.rows(group), y)[:, 0]
            weights = importance_weight(logp, self.learner.cached(group, "logmu"))
            for s, w in zip(group, weights.split([len(s.ids) for s in group])):
                if len(w):
                    found[s.slot] = (w.sum() ** 2 / (w ** 2).sum() / len(w)).item()
            link.beat()
            if self.ranks.any(link.hurried):             # the run ends
                break
        self.student.release()
        return {slot: x for part in self.ranks.all(found) for slot, x in part.items()}


class OwnEngine(HFEngine):
    """The engine on the learner's own model, whose weights are always the newest."""

    def __init__(self, cfg: Config, model: Any):
        self.use(cfg, model)


def is_trigger(step: int) -> bool:
    """1, 2, 4, 8, .."""
    return step & (step - 1) == 0


def climb(value: Callable[[int], float], most: int,
          better: Callable[[float, float], bool]) -> tuple[int, list[float]]:
    """(k of the best, the values of 0, 1, ..), up to the first that is not better than all before
    it. nan is never better."""
    best = 0
    values = [value(0)]
    for k in range(1, most + 1):
        values.append(value(k))
        if not better(values[k], values[best]):
            break
        best = k
    return best, values


def moving_weights(model: Any) -> dict[str, Tensor]:
    """The weights that jump: those of attention and MLP. The other children of a block, its norms,
    have no children of their own."""
    inside = set()
    for layer in layers(model):
        for part in layer.children():
            if len(list(part.children())) > 0:
                inside |= {id(p) for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}


# -- the set of the gate `kl` --------------------------------------------------------------------

TENSORS = ("tokens", "version", "ids", "logpi", "logmu", "logq", "hidden", "kept")      # of a Segment


def kept_copies(segments: list[Segment]) -> list[Segment]:
    """Copies, since their slots go on, of the first that were drawn and scored without a nan."""
    usable = [s for s in segments
              if not any(x.isnan().any() for x in (s.logpi, s.logmu, s.logq, s.hidden))]
    return [replace(s, slot=i, extra={}, **{name: x.clone() for name, x in tensors_of(s).items()})
            for i, s in enumerate(usable[:KEPT])]


def is_continued(kept: Segment, segments: list[Segment]) -> bool:
    """Whether one of the segments goes on where this response was cut."""
    n = len(kept.tokens)
    return any(s.start > s.prompt and torch.equal(s.tokens[:n], kept.tokens) for s in segments)


def tensors_of(s: Segment) -> dict[str, Tensor]:
    """The tensors of a segment by name; `kept` is there only in sparse slots."""
    found = {name: getattr(s, name) for name in TENSORS}
    return {name: x for name, x in found.items() if x is not None}


def packed(segments: list[Segment]) -> dict[str, Tensor]:
    """The set as named tensors."""
    if not segments:
        return {}
    found = {f"set/{s.slot}/{name}": x for s in segments for name, x in tensors_of(s).items()}
    return found | {"set": torch.tensor([[s.prompt, s.start] for s in segments])}


def unpacked(saved: Mapping[str, Tensor]) -> list[Segment]:
    """The set from named tensors."""
    segments = []
    for i, (prompt, start) in enumerate(saved.get("set", torch.empty(0, 2)).tolist()):
        tensors = {name: saved[f"set/{i}/{name}"] for name in TENSORS
                   if f"set/{i}/{name}" in saved}
        segments.append(Segment(slot=i, prompt=prompt, start=start, **tensors))
    return segments

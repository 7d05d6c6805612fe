"""
EffOPD: longer steps in the direction that training takes, as far as a gate finds them better (arXiv 2605.11739).

After steps t = 1, 2, 4, 8, .. the learner tries W_t + 2k D, k = 1, 2, .. --effopd-max, with D = W_t - W_ref, and stops
at the first that is not strictly better than all before (the paper says not worse; its code: better). The weights
become the best, bit for bit W_t if that is k = 0, and W_ref is these: at first it is the student as it began. Only the
weights of attention and MLP move; embeddings, head and the norms between do not. Adam's moments stay.

--effopd kl       the forward KL on at most 64 rollouts of the first batch, which are kept with their scores
--effopd accuracy the share of right answers, one sampled for each of 50 training prompts: the paper's

The measure is the forward KL, whatever is trained: mean of (q / mu)(logq - logp), whose weights no candidate can move.
The reverse, mean of w (logp - logq), likes best a student that never says any of the set's words again: all w are 0.

A jump makes old what is in flight: it is cut (--overdue drop: dropped), scored, weighed, and dropped below MIN_ESS.
What is left out: LoRA; --schedule step-off; a set that is renewed. Tests: tests/test_effopd.py
"""
from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cache import Segment
from engines.hf import HFEngine
from engines.sampling import VALIDATION
from estimators import DENSE, VALUE, importance_weight
from models.head import head_logp, teacher_logq
from models.sharding import layers, shard_of

if TYPE_CHECKING:
    from config import Config
    from learner import Learner
    from transport.link import Link

GATES = {"kl": operator.lt, "accuracy": operator.gt}     # --effopd: which of two values is the better one
KEPT = 64                # responses in the set of the gate `kl`
PROMPTS = 50             # of the gate `accuracy`
MIN_ESS = 0.5            # a response of less, after a jump, is dropped


def check(cfg: Config, learners: int) -> None:
    """Refuse flags that cannot be. Raises ValueError with the remedy."""
    if cfg.effopd and cfg.schedule == "step-off":
        raise ValueError("--schedule step-off: a controlled lag, in which --effopd has no place (--schedule async or "
                         "sync)")
    if cfg.effopd and cfg.lora_rank:
        raise ValueError(f"--lora-rank {cfg.lora_rank}: --effopd moves the student's own weights")
    if cfg.effopd == "accuracy" and learners > 1:
        raise ValueError(f"--learners {learners}: the gate of --effopd accuracy generates on one (--learners 1, "
                         f"--effopd kl)")


def triggers(step: int) -> bool:
    """1, 2, 4, 8, .."""
    return step & (step - 1) == 0


def climb(value: Callable[[int], float], most: int, better: Callable[[float, float], bool]) -> tuple[int, list[float]]:
    """(k of the best, the values of 0, 1, ..), up to the first that is not better than all before it. nan never is."""
    best, values = 0, [value(0)]
    for k in range(1, most + 1):
        values.append(value(k))
        if not better(values[k], values[best]):
            break
        best = k
    return best, values


def moving(model) -> dict[str, Tensor]:
    """The weights that jump: attention's and MLP's. A block's other children, its norms, have no children."""
    inside = {id(p) for layer in layers(model) for part in layer.children() if next(part.children(), None) is not None
              for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}


class Hurried(Exception):
    """The run is told to end while answers are drawn."""


# -- jumps -----------------------------------------------------------------------------------------

class Jumps:
    """What the learner remembers between its jumps. Copies of weights lie on the CPU, each learner's of its shards."""

    def __init__(self, learner: Learner, extra: dict[str, Tensor]):
        """`extra`: what `state` was at the checkpoint that the run goes on from; empty at its beginning."""
        self.learner, self.cfg, self.link = learner, learner.cfg, None
        self.moving = moving(learner.model)
        self.ref = {name: shard_of(learner.ranks.part(extra[f"effopd/{name}"], p)).cpu() for name, p in
                    self.moving.items()} if extra else self.copies()
        self.set = unpacked(extra) if "effopd/set" in extra else []
        self.prompts: list[list[int]] = []               # of the gate `accuracy`: an order brings them
        self.engine = OwnEngine(self.cfg, learner.model) if self.cfg.effopd == "accuracy" else None
        self.tokens = 0                                  # that the validation of this step has read or drawn

    @torch.no_grad()
    def after(self, segments: list[Segment], step: int, link: Link | None) -> list[dict]:
        """The updates of `step` are made: a jump, if it is time for one; what the log should hold of it."""
        if not self.set and self.cfg.effopd == "kl":
            self.set = kept(segments)
        if not triggers(step):
            return []
        start, now, self.tokens, self.link = time.monotonic(), self.copies(), 0, link

        def value(k: int) -> float:
            self.move(now, k)
            told = link is not None and self.learner.ranks.any(link.hurried)      # then the best so far has to do
            try:
                return torch.nan if told else getattr(self, self.cfg.effopd)()
            except Hurried:
                return torch.nan
        k, values = climb(value, self.cfg.effopd_max, GATES[self.cfg.effopd])
        self.move(now, k)
        now, self.ref = {}, {}                           # and only then copies of the new ones
        self.ref = self.copies()
        return [{"what": "effopd", "k": k, "gate": self.cfg.effopd, "tokens": sum(self.learner.ranks.all(self.tokens)),
                 "values": [v if abs(v) < torch.inf else None for v in values], "seconds": time.monotonic() - start}]

    def copies(self) -> dict[str, Tensor]:
        return {name: shard_of(p.detach()).to("cpu", copy=True) for name, p in self.moving.items()}

    def move(self, now: dict[str, Tensor], k: int) -> None:
        """To W_t + 2k D, from W_t itself and not from the last candidate: so that the best is made again exactly."""
        for name, p in self.moving.items():
            w = now[name].to(p.device)
            shard_of(p.detach()).copy_(w + 2 * k * (w - self.ref[name].to(p.device)) if k else w)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """For the checkpoint, one after the other: of several learners' shards no more than one is on the GPU."""
        for name, p in self.moving.items():
            yield f"effopd/{name}", self.learner.ranks.joined(self.ref[name], p)
        yield from packed(self.set).items() if self.set else ()

    def kl(self) -> float:
        """Forward KL per token of the set, nats."""
        learner, found = self.learner, [torch.empty(0)]
        for group in learner.ranks.groups(self.set, self.cfg.micro_tokens):
            found.append(self.kl_of(group).cpu())
            self.beat(sum(len(s.tokens) for s in group if len(s)))
        learner.ranks.settle(learner.model)
        return torch.cat([x for part in learner.ranks.all(found) for x in part]).mean(dtype=torch.float64).item()

    def kl_of(self, group: list[Segment]) -> Tensor:
        """The same at every new token [M]: exact where the teacher's head is at the learner, else an estimate."""
        learner, rows, values = self.learner, self.learner.rows(group), []
        n, hidden = learner.estimator.drawn(self.cfg.mc_samples), learner.cached(group, "hidden")
        ids, logmu, logq = (learner.cached(group, name)[:, :n] for name in ("ids", "logmu", "logq"))
        if learner.teacher_head is None:
            return VALUE["forward"](self.logp(rows, ids.long()), logq, logmu)
        for i in range(0, max(1, len(rows)), learner.chunk):
            q = teacher_logq(learner.teacher_head, hidden[i:i + learner.chunk], len(learner.head.weight))
            words = torch.arange(q.shape[1], device=q.device).expand(len(q), -1)
            values.append(DENSE["forward"](self.logp(rows[i:i + learner.chunk], words), q, q))
        return torch.cat(values)

    def logp(self, rows: Tensor, ids: Tensor) -> Tensor:
        return head_logp(self.learner.head, rows, ids, chunk=self.learner.chunk, dtype=self.learner.dtype)

    def accuracy(self) -> float:
        """The share of right answers: drawn here, graded by the parent, who knows texts and answers."""
        again = [layer.eval() for layer in layers(self.learner.model) if layer.training]
        try:
            with self.learner.compute():                 # layers that are computed again would keep no cache
                answers = self.engine.complete(self.prompts, self.cfg.max_response, temperature=1.0,
                                               each_step=self.token, stream=VALIDATION)
        finally:
            for layer in again:
                layer.training = True
        self.beat(sum(map(len, answers)))
        self.link.send("answers", answers=answers)
        return self.link.answer("share")

    def token(self) -> None:
        self.beat(0)
        if self.link and self.link.hurried:
            raise Hurried

    def beat(self, tokens: int) -> None:
        self.tokens += tokens
        self.link and self.link.beat()

    @torch.no_grad()
    def weigh(self, segments: list[Segment], link: Link) -> dict[int, float]:
        """By slot, the ESS of the emitted tokens' w after a jump, (sum w)^2 / sum w^2 / n: 1 where all w are alike."""
        learner, ess = self.learner, {}
        for group in learner.ranks.groups(segments, self.cfg.micro_tokens):
            ids, logmu = (learner.cached(group, name)[:, :1] for name in ("ids", "logmu"))
            w = importance_weight(self.logp(learner.rows(group), ids.long()), logmu).flatten()
            weights = w.split([len(s.ids) for s in group])
            ess |= {s.slot: (w.sum() ** 2 / (w ** 2).sum() / len(w)).item() for s, w in zip(group, weights) if len(w)}
            link.beat()
            if learner.ranks.any(link.hurried):          # the run ends
                break
        learner.ranks.settle(learner.model)
        return {slot: x for part in learner.ranks.all(ess) for slot, x in part.items()}


class OwnEngine(HFEngine):
    """The engine on the learner's own model, whose weights are always the newest."""

    def __init__(self, cfg: Config, model):
        self.drive(cfg, model)


# -- the set of the gate `kl` ----------------------------------------------------------------------

TENSORS = ("tokens", "version", "ids", "logmu", "logq", "hidden", "kept")      # of a Segment, those that are there


def kept(segments: list[Segment]) -> list[Segment]:
    """Copies, as their slots go on, of the first that were drawn and scored without a nan."""
    found = [s for s in segments if not any(x.isnan().any() for x in (s.logmu, s.logq, s.hidden))][:KEPT]
    return [Segment(i, prompt=s.prompt, start=s.start, **{name: x.clone() for name, x in tensors(s)})
            for i, s in enumerate(found)]


def tensors(s: Segment) -> list[tuple[str, Tensor]]:
    return [(name, x) for name in TENSORS if (x := getattr(s, name)) is not None]


def packed(segments: list[Segment]) -> dict[str, Tensor]:
    return {f"effopd/set/{s.slot}/{name}": x for s in segments for name, x in tensors(s)} | {
        "effopd/set": torch.tensor([[s.prompt, s.start] for s in segments])}


def unpacked(extra: dict[str, Tensor]) -> list[Segment]:
    return [Segment(i, prompt=prompt, start=start, **{name: extra[f"effopd/set/{i}/{name}"] for name in TENSORS
                                                      if f"effopd/set/{i}/{name}" in extra})
            for i, (prompt, start) in enumerate(extra["effopd/set"].tolist())]

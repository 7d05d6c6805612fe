"""
Rock Tokens (arXiv 2605.09253): find token types whose loss is high and stays high; weigh them, or
bypass them.

    --extend rock --rock.weight 0.3 --rock.k 100 --rock.every 20

A position belongs to the type of the token that it predicts, v = y_t; its loss l_t is the logged
`kl` of that row. Over a window of `every` steps

    n(v)  number of positions of v        m(v)  of those, the number that were measured
    mean(v) = sum of l_t / m(v)           R(v) = mean(v) n(v), its share of the loss

At the end of a window the k types with the largest R(v) become the rocks, among those that pass
`choose`. That rule is ours: the paper filters for consistency over contexts and does not publish
its thresholds. A window holds successive versions of the student and is emptied at each choice, so
that no mean mixes those before and after one.

    loss = sum of w_t l_t / number of all positions,   w_t = weight at the rocks, 1 elsewhere

The denominator stays: divided by the sum of w_t, the gradients of the other positions would grow
by what the rocks lose. With weight 0 the rocks are bypassed: such a position is neither stored
nor put through an LM head, except for an audited 5%, which are measured at weight 0. A rock that
is none any more, or whose audit is too small to judge by, leaves the set and is measured as a
whole again. A loss of another extension is not weighed.

What is left out: statistics by context; more slots for the room that bypassed rows leave.
Shapes: V words; M new tokens; m measured positions; k tokens handed over at once.
Tests: tests/test_rock.py
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from cache import Segment
from config import Bound, Count, require
from engines.uniforms import SELECTION, uniforms
from estimators import ESTIMATORS
from extension import Extension, ModelPair, Outcome, Step

COUNT = 16            # fewest measurements of a mean that is judged
PERSISTENT = 0.8      # the part of its early mean that a rock keeps at least
AUDITED = 0.05        # of the bypassed positions
CHOSEN = "rock_chosen"           # shared tensor [V], bool: the rocks, for the rollouts
STATE = ("n", "m", "total", "early", "entered", "chosen")      # by type, [V], for the checkpoint


class Rock(Extension):
    """The statistics of a run, and the set of types that they choose.

    early    a type's first mean, of the first window that has COUNT measurements of it
    entered  the mean of the choice that made it a rock, the last one before it was bypassed
    """

    @dataclass(frozen=True)
    class Flags:
        weight: Annotated[float, Bound(least=0)] = 0.3
        """factor of the loss at the chosen types, below 1; 0 bypasses them"""
        k: Count = 100
        """number of token types to choose"""
        every: Count = 20
        """steps between two choices"""
        types: str = ""
        """token ids or words, separated by commas: these types from the start, instead of a
        choice"""

    METRICS = {"rock": "share of the batch's positions that predict a rock, which count "
                       "--rock.weight times in the loss"}
    fixed_on_resume = ("weight", "k", "every", "types", "teacher")

    def __init__(self, name: str, cfg: Any, flags: Any):
        super().__init__(name, cfg, flags)
        self.sparse = flags.weight == 0

    # -- the parent

    def check(self, models: ModelPair) -> list[str]:
        from transformers import AutoTokenizer
        require(self.flags.weight < 1, f"--rock.weight {self.flags.weight}: must be below 1")
        require(ESTIMATORS[self.cfg.estimator].head,
                f"--extend rock: --estimator {self.cfg.estimator} has no loss at a token to weigh "
                "(--kl reverse has one)")
        if self.flags.types and not self.cfg.dry_run:    # which reads no tokenizer
            fixed_types(self.flags.types, AutoTokenizer.from_pretrained(self.cfg.student))
        return []

    def shared_tensors(self, models: ModelPair) -> dict[str, Tensor]:
        if not self.sparse:
            return {}
        return {CHOSEN: torch.zeros(models.student.V, dtype=torch.bool)}

    # -- a rollout worker

    def stored(self, shared: Mapping[str, Tensor], tokens: Tensor, uid: int,
               first: int) -> Tensor | None:
        """All but the rocks, and of these the audited ones."""
        if not self.sparse:
            return None
        return ~shared[CHOSEN][tokens.long()] | audited(self.cfg.seed, uid, first, len(tokens))

    # -- a learner

    def attach(self, learner: Any, saved: Mapping[str, Tensor]) -> None:
        from transformers import AutoTokenizer
        words = learner.student.words
        self.writes = learner.ranks.rank == 0
        self.tokenizer = AutoTokenizer.from_pretrained(self.cfg.student)
        self.early = torch.full((words,), torch.nan, dtype=torch.float64)
        self.entered = torch.full((words,), torch.nan, dtype=torch.float64)
        self.chosen = torch.zeros(words, dtype=torch.bool)
        self.summary: dict = {}                          # what rocks.json holds
        self.open_window()
        if self.flags.types:
            self.chosen[fixed_types(self.flags.types, self.tokenizer)] = True
        if saved:
            for name in STATE:
                setattr(self, name, saved[name])
            self.versions = saved["versions"].tolist()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name in STATE:
            yield name, getattr(self, name)
        yield "versions", torch.tensor(self.versions)

    def weight(self, tokens: Tensor) -> Tensor:
        is_rock = self.chosen.to(tokens.device)[tokens.long()]
        return torch.where(is_rock, self.flags.weight, 1.0)

    def published(self, shared: Mapping[str, Tensor]) -> None:
        if self.sparse:
            shared[CHOSEN].copy_(self.chosen)

    def after_step(self, step: Step) -> Outcome:
        """Enter a train batch and the measurements of all learners; at a window's end choose.

        Every learner sees the same, and comes to the same set.
        """
        predicted = new_tokens(step.segments)
        outcome = Outcome(metrics={"rock": self.chosen[predicted].float().mean().item()})
        self.enter(predicted, step.measured, step.version)
        if len(self.versions) == self.flags.every:
            outcome.events.append(self.end_window(step.segments))
            if self.writes:
                self.write()
        return outcome

    # -- statistics

    def enter(self, predicted: Tensor, measured: list[dict[str, Tensor]], version: int) -> None:
        """predicted [M]: the new tokens of the batch. measured: by learner, y and kl [m]."""
        last = self.versions[-1] if self.versions else -1
        assert version > last, f"version {version} after those of {self.versions}"
        y = torch.cat([part["y"].double() for part in measured])
        loss = torch.cat([part["kl"].double() for part in measured])
        there = loss.isfinite()                          # a skipped update has measured nothing
        y = y[there].long()
        loss = loss[there]
        words = len(self.n)
        self.n += predicted.bincount(minlength=words)
        self.m += y.bincount(minlength=words)
        self.total += y.bincount(loss, minlength=words)
        self.versions.append(version)

    def open_window(self) -> None:
        words = len(self.chosen)
        self.versions: list[int] = []                    # one per step
        self.n = torch.zeros(words, dtype=torch.float64)
        self.m = torch.zeros(words, dtype=torch.float64)
        self.total = torch.zeros(words, dtype=torch.float64)

    def end_window(self, segments: list[Segment]) -> dict:
        """Choose, and begin a new window; the event for the log."""
        mean = self.total / self.m
        before = self.chosen
        if not self.flags.types:
            self.chosen = choose(self.n, self.m, mean, self.early, self.flags.k)
        first_mean = torch.where(self.entered.isnan(), mean, self.entered)
        self.entered = torch.where(self.chosen, first_mean, torch.nan)
        self.early = torch.where(self.early.isnan() & (self.m >= COUNT), mean, self.early)
        window = [self.versions[0], self.versions[-1]]
        rule = {"weight": self.flags.weight, "k": self.flags.k, "every": self.flags.every,
                "fixed": bool(self.flags.types), "count": COUNT, "persistent": PERSISTENT,
                "audited": AUDITED}
        types = (self.chosen | before).nonzero()[:, 0].tolist()
        self.summary = {"rule": rule, "versions": window,
                        "types": [asdict(self.about(v, mean, segments)) for v in types]}
        self.open_window()
        ids = self.chosen.nonzero()[:, 0].tolist()
        return {"what": "rock", "versions": window, "types": len(ids), "ids": ids}

    def about(self, v: int, mean: Tensor, segments: list[Segment]) -> TypeRecord:
        """What rocks.json says of a rock, or of a type that has just ceased to be one."""
        share = mean[v] * self.n[v] / (mean * self.n).nansum()
        return TypeRecord(
            id=v, word=self.tokenizer.convert_ids_to_tokens(v), count=int(self.n[v]),
            measured=int(self.m[v]), mean=finite(mean[v]), early=finite(self.early[v]),
            entered=finite(self.entered[v]), share=finite(share),
            weight=self.flags.weight if self.chosen[v] else 1.0,
            example=self.tokenizer.decode(context_of(v, segments)))

    def write(self) -> None:
        """Write <out>/rocks.json: the new one as a whole, or the old one stays."""
        out = Path(self.cfg.out)
        partial = out / ".rocks.json"
        partial.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
        partial.rename(out / "rocks.json")


@dataclass(frozen=True)
class TypeRecord:
    """A token type in rocks.json; None: not known."""
    id: int
    word: str
    count: int
    measured: int
    mean: float | None
    early: float | None
    entered: float | None
    share: float | None
    weight: float
    example: str


def choose(n: Tensor, m: Tensor, mean: Tensor, early: Tensor, k: int) -> Tensor:
    """The rocks, bool [V], from the statistics of a window.

    `early`: a type's mean of an earlier window, nan if it has none. A rock has COUNT measurements
    or more, and a mean above PERSISTENT times its early one. Its mean is above the median of all
    types that have as many measurements, and its R = mean n above their mean R: a word that is
    rarely said, and wrong when it is, has a high loss and hardly a share of it. Of these, the k
    with the largest R.
    """
    counted = m >= COUNT
    share = mean * n
    passes = counted & (mean > PERSISTENT * early)
    passes &= (mean > mean[counted].median()) & (share > share[counted].mean())
    order = torch.where(passes, share, -torch.inf).argsort(descending=True, stable=True)[:k]
    return torch.zeros_like(passes).index_fill_(0, order[passes[order]], True)


def audited(seed: int, uid: int, first: int, n: int) -> Tensor:
    """Which of a response's tokens first .. first + n - 1 are stored whatever they are, bool [n]:
    the same for everyone who asks."""
    u = uniforms(seed, SELECTION, [uid] * n, range(first, first + n), 1)
    return u[:, 0] < AUDITED


def fixed_types(text: str, tokenizer: Any) -> list[int]:
    """The ids of --rock.types: numbers are ids, anything else is a word of the tokenizer.

    Raises ValueError for one that is neither.
    """
    vocab = tokenizer.get_vocab()
    known = set(vocab.values())
    ids = []
    for item in text.split(","):
        i = int(item) if item.isdecimal() else vocab.get(item, -1)
        require(i in known, f"--rock.types {text}: {item!r} is neither an id nor a word of the "
                            "student's tokenizer (as its vocabulary spells it; a word that is a "
                            "number or has a comma goes by its id)")
        ids.append(i)
    return ids


def new_tokens(segments: list[Segment]) -> Tensor:
    """The new tokens of these segments [M]."""
    return torch.cat([s.new_tokens for s in segments]).long()


def context_of(v: int, segments: list[Segment]) -> list[int]:
    """Some tokens around the first place where type v is a new token."""
    for s in segments:
        places = (s.new_tokens == v).nonzero()[:, 0].tolist()
        if places:
            i = s.start + places[0]
            return s.tokens[max(0, i - 20):i + 5].tolist()
    return []


def finite(x: Tensor) -> float | None:
    return x.item() if x.isfinite() else None

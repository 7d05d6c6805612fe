"""
Rock Tokens (arXiv 2605.09253): token types whose loss is high and stays so are found, weighed by LAMBDA, or bypassed.

A position belongs to the type of the token that it predicts, v = y_t: its loss l_t is the logged `kl` of that very
row. Over a window of EVERY steps

    n(v)  all positions of v        m(v)  those of them that were measured        mean(v) = sum of l_t / m(v)
    R(v) = mean(v) n(v)             its share of the loss

At the end of a window the K types with the largest R(v) are the rocks, among those that pass `choose`. That rule is
ours: the paper's own filter, for consistency over contexts, is published without its thresholds. A window holds
successive versions of the student and is emptied at each choice, so that no mean mixes those before and after one.

Use: loss = sum of w_t l_t / number of all positions, w_t = LAMBDA at the rocks. The denominator stays: divided by the
sum of w_t, the others' gradients would grow by what the rocks are denied. LAMBDA = 0 bypasses: such a position is
neither stored nor put through an LM head, but for an audited 5%, which are measured at weight 0: a rock that is none
any more, or whose audit is too small to judge by, leaves the set, and is measured whole again.
OPRD's distance beside a divergence is not weighed.
What is left out: statistics by context; more slots for the room that bypassed rows leave. Tests: tests/test_rock.py
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cache import Segment, Slots
    from config import Config
    from estimators import Estimator

COUNT = 16            # fewest measurements of a mean that is judged
PERSISTENT = 0.8      # of its early mean, what a rock keeps
AUDITED = 0.05        # of the bypassed positions
AUDIT = 3             # a stream of random numbers, beside those of rollout.py and the teacher's


@dataclass(frozen=True)
class Rule:
    """--rock, read."""
    weight: float
    k: int
    every: int = 20


def parse(text: str) -> Rule:
    """LAMBDA,K[,EVERY]. Raises ValueError with the remedy."""
    try:
        weight, *counts = text.split(",")
        rule = Rule(float(weight), *map(int, counts))
    except (ValueError, TypeError):
        raise ValueError(f"--rock {text}: not LAMBDA,K[,EVERY] (example: 0,100 or 0.3,100,20)") from None
    if not (0 <= rule.weight < 1 <= min(rule.k, rule.every)):
        raise ValueError(f"--rock {text}: LAMBDA must be at least 0 and below 1, K and EVERY at least 1")
    return rule


def check(cfg: Config, row: Estimator) -> None:
    """Refuse flags that cannot be. Raises ValueError with the remedy."""
    if cfg.rock_set and not cfg.rock:
        raise ValueError(f"--rock-set {cfg.rock_set}: by what weight? (--rock LAMBDA,K)")
    if cfg.rock:
        parse(cfg.rock)
        if not row.head:
            raise ValueError(f"--rock {cfg.rock}: --estimator {cfg.estimator} has no loss at a token to weigh (--kl "
                             f"reverse --oprd-weight 1 has)")


def fixed(text: str, vocab: dict[str, int]) -> list[int]:
    """The ids of --rock-set: numbers are ids, all else words of the tokenizer. Raises ValueError with the remedy."""
    known = set(vocab.values())
    ids = [int(x) if x.isdecimal() else vocab.get(x, -1) for x in text.split(",")]
    for x, i in zip(text.split(","), ids):
        if i not in known:
            raise ValueError(f"--rock-set {text}: {x!r} is neither an id nor a word of the student's tokenizer (as its "
                             f"vocabulary spells them; a word that is a number or has a comma goes by its id)")
    return ids


# -- the bypass, where tokens are handed over --------------------------------------------------------

def audited(seed: int, uid: int, first: int, n: int) -> Tensor:
    """Which of a response's tokens first .. first + n - 1 are stored whatever they are, [n]: the same whoever asks."""
    return torch.from_numpy(np.random.default_rng([seed, uid, 0, AUDIT]).random(first + n)[first:] < AUDITED)


class Bypass:
    """The rocks as the rollout workers see them: chosen [V] in shared memory, written by learner 0 at a publish."""

    def __init__(self, words: int, seed: int):
        self.chosen, self.seed = torch.zeros(words, dtype=torch.bool).share_memory_(), seed

    def kept(self, tokens: Tensor, uid: int, first: int) -> Tensor:
        """Which of these tokens of a response, from its token `first` on, are stored, [k]."""
        return ~self.chosen[tokens.long()] | audited(self.seed, uid, first, len(tokens))


# -- statistics and choice, at the learner -----------------------------------------------------------

def choose(n: Tensor, m: Tensor, mean: Tensor, early: Tensor, k: int) -> Tensor:
    """The rocks, bool [V], by a window's statistics; early is a type's mean of an earlier window, nan if it has none.

    A rock has COUNT measurements or more, and a mean above PERSISTENT times its early one; its mean is above the
    median of all that have as many measurements, its R = mean n above their mean R: a word that is rarely said, and
    wrong when it is, has a high loss and no share of it. Of these, the k with the largest R.
    """
    counted, share = m >= COUNT, mean * n
    passes = counted & (mean > PERSISTENT * early)
    passes &= (mean > mean[counted].median()) & (share > share[counted].mean())
    order = torch.where(passes, share, -torch.inf).argsort(descending=True, stable=True)[:k]
    return torch.zeros_like(passes).index_fill_(0, order[passes[order]], True)


STATE = ("n", "m", "total", "early", "entered", "chosen")      # by type, [V]


class Rocks:
    """The statistics of a run and the set that they choose; --rock-set puts its own in the place of the choice.

    early: a type's first mean, of the first window that has COUNT measurements of it. entered: that of the choice that
    made it a rock, the last one before it was bypassed (in a fixed set, its first).
    """

    def __init__(self, cfg: Config, words: int, kept: dict[str, Tensor]):
        """`kept`: what `state` returned, of a run that goes on."""
        from transformers import AutoTokenizer
        self.rule, self.fixed = parse(cfg.rock), bool(cfg.rock_set)
        self.tokenizer, self.out = AutoTokenizer.from_pretrained(cfg.student), Path(cfg.out)
        self.early, self.entered = (torch.full((words,), torch.nan, dtype=torch.float64) for _ in range(2))
        self.chosen = torch.zeros(words, dtype=torch.bool)
        self.said: dict = {}                             # what rocks.json holds
        self.open_window()
        if self.fixed:
            self.chosen[fixed(cfg.rock_set, self.tokenizer.get_vocab())] = True
        if kept:
            for name in STATE:
                setattr(self, name, kept[f"rock/{name}"])
            self.versions = kept["rock/versions"].tolist()

    def state(self) -> list[tuple[str, Tensor]]:
        """For the checkpoint."""
        sums = [(f"rock/{name}", getattr(self, name)) for name in STATE]
        return [*sums, ("rock/versions", torch.tensor(self.versions))]

    def weight(self, y: Tensor) -> Tensor:
        """Of positions that predict the tokens y [m]."""
        return torch.where(self.chosen.to(y.device)[y.long()], self.rule.weight, 1.0)

    def share(self, segments: list[Segment]) -> float:
        """Of the positions of these segments, the rocks'."""
        return self.chosen[emitted(segments)].float().mean().item()

    def publish(self, slots: Slots) -> None:
        if slots.bypass:
            slots.bypass.chosen.copy_(self.chosen)

    def see(self, segments: list[Segment], measured: list[dict[str, Tensor]], version: int) -> list[dict]:
        """Enter a train batch and all learners' measurements, y and kl [m]; at a window's end choose, and return the
        event. Every learner gets the same, and comes to the same set."""
        assert not self.versions or version > self.versions[-1], f"version {version} after those of {self.versions}"
        y, loss = (torch.cat([part[name].double() for part in measured]) for name in ("y", "kl"))
        there = loss.isfinite()                          # a skipped update has measured nothing
        y, loss = y[there].long(), loss[there]
        self.n += emitted(segments).bincount(minlength=len(self.n))
        self.m += y.bincount(minlength=len(self.n))
        self.total += y.bincount(loss, minlength=len(self.n))
        self.versions.append(version)
        return [self.end_window(segments)] if len(self.versions) == self.rule.every else []

    def open_window(self) -> None:
        self.versions: list[int] = []                    # one a step
        self.n, self.m, self.total = (torch.zeros(len(self.chosen), dtype=torch.float64) for _ in range(3))

    def end_window(self, segments: list[Segment]) -> dict:
        mean, before = self.total / self.m, self.chosen
        if not self.fixed:
            self.chosen = choose(self.n, self.m, mean, self.early, self.rule.k)
        self.entered = torch.where(self.chosen, torch.where(self.entered.isnan(), mean, self.entered), torch.nan)
        self.early = torch.where(self.early.isnan() & (self.m >= COUNT), mean, self.early)
        window = [self.versions[0], self.versions[-1]]
        self.said = {"rule": asdict(self.rule) | {"fixed": self.fixed, "count": COUNT, "persistent": PERSISTENT,
                                                  "audited": AUDITED}, "versions": window,
                     "types": [self.about(v, mean, segments) for v in (self.chosen | before).nonzero()[:, 0].tolist()]}
        self.open_window()
        ids = self.chosen.nonzero()[:, 0].tolist()
        return {"what": "rock", "versions": window, "types": len(ids), "ids": ids}

    def about(self, v: int, mean: Tensor, segments: list[Segment]) -> dict:
        """What rocks.json says of a rock, or of a type that has just ceased to be one."""
        share = mean[v] * self.n[v] / (mean * self.n).nansum()
        numbers = {"mean": mean[v], "early": self.early[v], "entered": self.entered[v], "share": share}
        at = ((s.tokens, i) for s in segments for i in (s.tokens[s.start:] == v).nonzero()[:1, 0] + s.start)
        tokens, i = next(at, (torch.empty(0), 0))
        return {"id": v, "word": self.tokenizer.convert_ids_to_tokens(v), "count": int(self.n[v]),
                "measured": int(self.m[v]), **{k: x.item() if x.isfinite() else None for k, x in numbers.items()},
                "weight": self.rule.weight if self.chosen[v] else 1.0,
                "example": self.tokenizer.decode(tokens[max(0, int(i) - 20):int(i) + 5].tolist())}

    def write(self) -> None:
        """<out>/rocks.json, whole or as it was."""
        partial = self.out / ".rocks.json"
        partial.write_text(json.dumps(self.said, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.out / "rocks.json")


def emitted(segments: list[Segment]) -> Tensor:
    """The new tokens of these segments, [M]."""
    return torch.cat([s.tokens[s.start:] for s in segments]).long()

"""
The account of a run: tokens, seconds, lags, accuracies, across deaths of workers and resumptions.

Every token that a rollout worker draws ends up trained, in flight, dropped or lost. Left out: the
lines that are made of these numbers (steps.py); means over several runs (benchmarks/).
Tests: tests/test_account.py, tests/test_faults.py
"""
from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 10            # steps at either end of a run over which kl and entropy are averaged
Trained = list[tuple[int, int, int]]     # of every segment: uid, first response token, tokens


class Levels(NamedTuple):
    """Two metrics of a step, nats."""
    kl: float
    entropy: float


class Account:
    """Counts what the learner trains and what the rollout workers draw."""

    def __init__(self):
        self.steps = 0
        self.tokens = 0                                   # trained
        self.lag_max = 0
        self.lag_sum = 0.0                                # lag_mean * tokens, over the steps
        self.measured = 0                                 # steps with a finite kl
        self.first: list[Levels] = []                     # of the first WINDOW of these
        self.last: deque[Levels] = deque(maxlen=WINDOW)
        self.drawn: dict[str, int] = {}                   # rollout worker -> tokens, its own count
        self.handed: dict[str, int] = defaultdict(int)    # those of them that it has handed over
        self.preempted: dict[str, int] = {}               # rollout worker -> responses put aside
        self.drawn_before = 0                             # by workers that are gone
        self.preempted_before = 0                         # the same
        self.preempted_at_last_step = 0
        self.length: dict[int, int] = defaultdict(int)    # uid -> trained tokens of its response
        self.weight: dict[int, float] = defaultdict(float)     # the sum of their weights
        self.dropped = 0
        self.lost = 0
        self.accuracy: dict[tuple[str, int], float] = {}  # (student or teacher, step)
        self.resumed_at = 0                               # tokens trained before the last start
        self.wall_before = 0.0                            # seconds before the last start
        self.began = time.monotonic()
        self.last_step = self.began
        self.generated_at_last_step = 0

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return self.drawn_before + sum(self.drawn.values())

    def wall(self, now: float) -> float:
        """Seconds since the first ticket, over all resumptions."""
        return self.wall_before + now - self.began

    def start(self) -> None:
        """The clock starts: the first ticket is handed out now."""
        self.began = time.monotonic()
        self.last_step = self.began

    def enter(self, metrics: dict, trained: Trained = ()) -> None:
        """Add a step. `metrics` is a step line, or the learner's part of one; `trained` what is
        under that key of the line."""
        for uid, _, tokens in trained:
            self.length[uid] += tokens
            self.weight[uid] += tokens * metrics["token_weight"]
        self.steps += 1
        self.tokens += metrics["tokens"]
        self.lag_sum += metrics["lag_mean"] * metrics["tokens"]
        self.lag_max = max(self.lag_max, metrics["lag_max"])
        if metrics["kl"] is None or not math.isfinite(metrics["kl"]):     # a skipped step has none
            return
        levels = Levels(metrics["kl"], metrics["entropy"])
        self.measured += 1
        if len(self.first) < WINDOW:
            self.first.append(levels)
        self.last.append(levels)

    def rates(self, now: float) -> dict[str, float]:
        """The parent's clock readings for a step line. The next call counts from this one."""
        made = self.generated - self.generated_at_last_step
        seconds = now - self.last_step
        self.generated_at_last_step = self.generated
        self.last_step = now
        return {"gen_tok_s": made / seconds, "wall_s": self.wall(now)}

    def responses(self, begun: int) -> dict[str, float]:
        """What the parent knows of the responses, for a step line. `begun`: how many there are.
        The next call counts from this one."""
        preempted = self.preempted_before + sum(self.preempted.values())
        since = preempted - self.preempted_at_last_step
        self.preempted_at_last_step = preempted
        drawn_once = self.generated - self.lost
        return {"preempted": since, "length_begun": drawn_once / max(1, begun)}

    def weight_by_length(self) -> tuple[float, float]:
        """The mean weight of a trained token in the third of the responses that are shortest and
        in the third that are longest, relative to the mean of all. nan before the first step."""
        by_length = sorted(self.length, key=lambda uid: self.length[uid])
        third = max(1, len(by_length) // 3)

        def mean_weight(uids: Sequence[int]) -> float:
            tokens = sum(self.length[uid] for uid in uids)
            return sum(self.weight[uid] for uid in uids) / tokens if tokens else math.nan

        overall = mean_weight(by_length)
        return mean_weight(by_length[:third]) / overall, mean_weight(by_length[-third:]) / overall

    @property
    def window(self) -> int:
        """Steps at either end of the run whose KL is shown as before and after: no step is at both
        ends, except in a run of one."""
        return max(1, min(WINDOW, self.measured // 2))

    @property
    def kl_before(self) -> float:
        return mean([levels.kl for levels in self.first[:self.window]])

    @property
    def kl_after(self) -> float:
        return mean([levels.kl for levels in list(self.last)[-self.window:]])

    @property
    def entropy_before(self) -> float:
        return mean([levels.entropy for levels in self.first])

    @property
    def entropy_after(self) -> float:
        return mean([levels.entropy for levels in self.last])

    def worker_died(self, worker: str, taken_back: int) -> None:
        """Count as lost what the worker had not handed over, and `taken_back`: tokens that it had
        handed over and that its successor draws again."""
        self.preempted_before += self.preempted.pop(worker, 0)
        drawn = self.drawn.pop(worker, 0)
        self.drawn_before += drawn
        self.lost += drawn - self.handed.pop(worker, 0) + taken_back

    def counters(self) -> dict:
        """What a checkpoint has to keep, because no line of the log holds it at that time."""
        return {"generated": self.generated, "dropped": self.dropped,
                "wall_s": self.wall(self.last_step)}

    def resume(self, counters: dict, lines: list[dict]) -> None:
        """Go on from a checkpoint's counters and the log's lines.

        What was in flight then counts as lost, since it is drawn again.
        """
        for line in lines:
            if line["type"] == "step":
                self.enter(line, line["trained"])
            elif line["type"] == "eval":
                self.accuracy[line["who"], line["step"]] = line["accuracy"]
        self.drawn_before = counters["generated"]
        self.generated_at_last_step = counters["generated"]
        self.dropped = counters["dropped"]
        self.wall_before = counters["wall_s"]
        self.resumed_at = self.tokens
        self.lost = self.drawn_before - self.dropped - self.tokens


def mean(values: list[float]) -> float:
    """0 of no values."""
    return sum(values) / max(1, len(values))

"""
The books of a run: tokens, seconds, lags, answers, over deaths and resumptions; what the log's last line says.

What is left out: means over several runs; benchmarks/ has them. Tests: tests/test_faults.py
"""
from __future__ import annotations

import math
import time
from collections import defaultdict, deque

from record.metrics import DONE


class Account:
    """Every token that a rollout worker has drawn is trained, in flight, dropped or lost."""

    def __init__(self):
        self.steps = self.tokens = self.lag_max = 0
        self.lags = 0.0                                            # lag_mean * tokens
        self.first, self.last = [], deque(maxlen=10)               # (kl, entropy) of ten steps each
        self.drawn: dict[str, int] = {}                            # rollout worker -> tokens, by its own count
        self.handed: dict[str, int] = defaultdict(int)             # the same, of responses that it has handed over
        self.earlier = self.dropped = self.lost = self.seen = 0    # tokens; earlier: of workers that are gone
        self.accuracy: dict[tuple[str, int], float] = {}           # (who, step)
        self.resumed, self.wall_before = 0, 0.0                    # tokens and seconds before the last start
        self.began = self.last_step = time.monotonic()

    @property
    def generated(self) -> int:
        return self.earlier + sum(self.drawn.values())

    def wall(self, now: float) -> float:
        return self.wall_before + now - self.began

    def start(self) -> None:
        """The first ticket is handed out now."""
        self.began = self.last_step = time.monotonic()

    def step(self, m: dict, now: float) -> dict[str, float]:
        """Enter a step line; the two keys of it that are known here."""
        self.enter(m)
        made, seconds = self.generated - self.seen, now - self.last_step
        self.seen, self.last_step = self.generated, now
        return {"gen_tok_s": made / seconds, "wall_s": self.wall(now)}

    def enter(self, m: dict) -> None:
        self.steps, self.tokens = self.steps + 1, self.tokens + m["tokens"]
        self.lags, self.lag_max = self.lags + m["lag_mean"] * m["tokens"], max(self.lag_max, m["lag_max"])
        if m["kl"] is not None and math.isfinite(m["kl"]):         # a skipped step has none
            self.first += [(m["kl"], m["entropy"])] if len(self.first) < 10 else []
            self.last.append((m["kl"], m["entropy"]))

    def mean(self, which: str, column: int) -> float:
        """Of the first or last ten steps, the mean kl (0) or entropy (1)."""
        rows = getattr(self, which)
        return sum(row[column] for row in rows) / max(1, len(rows))

    def gone(self, worker: str, taken_back: int) -> None:
        """A worker has died: what it had not handed over, or is taken back, is lost: its successor draws it again."""
        drawn = self.drawn.pop(worker, 0)
        self.earlier, self.lost = self.earlier + drawn, self.lost + drawn - self.handed.pop(worker, 0) + taken_back

    def counters(self) -> dict:
        """What a checkpoint keeps and the log's lines do not say."""
        return dict(generated=self.generated, dropped=self.dropped, wall_s=self.wall(self.last_step))

    def resume(self, counters: dict, lines: list[dict]) -> None:
        """Go on from a checkpoint; what was in flight then is lost, and drawn again."""
        for line in lines:
            if line["type"] == "step":
                self.enter(line)
            if line["type"] == "eval":
                self.accuracy[line["who"], line["step"]] = line["accuracy"]
        self.earlier = self.seen = counters["generated"]
        self.dropped, self.wall_before, self.resumed = counters["dropped"], counters["wall_s"], self.tokens
        self.lost = self.earlier - self.dropped - self.tokens

    def totals(self, in_flight: int, busy: dict[str, float]) -> dict:
        """The log's last line; `busy` by role, of the time since the last start."""
        wall, since = max(1e-9, self.wall(self.last_step)), max(1e-9, self.last_step - self.began)
        totals = {
            "steps": self.steps, "tokens": self.tokens, "tokens_generated": self.generated,
            "tokens_trained": self.tokens, "tokens_in_flight": in_flight, "tokens_dropped": self.dropped,
            "tokens_lost": self.lost, "wall_s": wall, "overlap": sum(busy.values()), "busy": busy,
            "train_tok_s": self.tokens / wall, "gen_tok_s": self.generated / wall,
            "score_tok_s": (self.tokens - self.resumed) / since / max(1e-9, busy["teacher"]),
            "lag_mean": self.lags / max(1, self.tokens), "lag_max": self.lag_max,
            "kl_before": self.mean("first", 0), "kl_after": self.mean("last", 0),
            "accuracy_before": self.accuracy.get(("student", 0)),
            "accuracy_after": self.accuracy.get(("student", self.steps)),
            "accuracy_teacher": self.accuracy.get(("teacher", 0))}
        assert totals.keys() == DONE.keys(), totals.keys() ^ DONE.keys()
        return totals

"""
The parent of a run: starts the workers, routes slot numbers between them, hears what they report, ends them.

The decisions are cache.Ledger's and the algorithm is learner.Learner's: here is only who is told what, and what is
written down. Nothing of a model or a text is known here but what a `Job` says. What is left out: restarting a worker
that died; it ends the run with its name and its traceback. Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import signal
import time
from collections import defaultdict
from dataclasses import asdict, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import record
from cache import Ledger, Slots, Weights
from estimators import ESTIMATORS
from job import Job
from learner import METRICS
from tasks import prompt_number
from workers import Hand

if TYPE_CHECKING:
    from asyncopd import Config

INTERRUPTS = {signal.SIGINT, signal.SIGTERM}


class Run:
    """The parent: routes slots, keeps the record, ends the run. `loop` is the whole of the pipeline."""

    def __init__(self, cfg: Config, job: Job, where: dict[str, str], quiet: bool = False):
        estimator, dtype = ESTIMATORS[cfg.estimator], torch.bfloat16 if cfg.gpus else torch.float32
        self.cfg, self.job, self.where, self.quiet = cfg, job, where, quiet
        self.slot_bytes = estimator.bytes(cfg.mc_samples, cfg.top_k, job.hidden * dtype.itemsize)
        self.slots = Slots((cfg.max_ahead + 1) * cfg.batch, cfg.max_prompt, cfg.max_response,
                           estimator.columns(cfg.mc_samples, cfg.top_k),
                           job.hidden if estimator.support == "full" else 0, dtype)
        self.weights = Weights(job.layout, job.probe, dtype)
        self.ledger = Ledger(self.slots, cfg.batch, cfg.schedule, cfg.max_ahead, cfg.max_lag, cfg.overdue)
        self.log: record.Log | None = None
        self.hands: list[Hand] = []
        self.spans: list[tuple[str, str, float, float]] = []       # worker, what, from, to
        self.counters: list[tuple[float, str, dict]] = []          # time, name, values: curves of the trace
        self.generated: dict[str, int] = {}                        # rollout worker -> tokens it has drawn
        self.pushed: dict[str, dict] = {}                          # rollout worker -> its last push
        self.asked: set[str] = set()                               # who has an evaluation to report
        self.accuracy: dict[tuple[str, int], float] = {}           # (who, step)
        self.steps: list[dict] = []
        self.made = self.dropped = 0
        self.routing_s = 0.0                                       # seconds of the parent's own work

    def start(self) -> None:
        """Start the workers, wait until all can work, evaluate version 0."""
        cfg, where = self.cfg, self.where
        shared = {"rollout": (self.slots, self.weights, self.job.eval_prompts),
                  "teacher": (self.slots, self.job.eval_prompts), "learner": (self.slots, self.weights)}
        self.quiet or record.show_start(where, [
            [f"{len(self.slots)} slots", f"{self.slots.bytes / 2**20:,.1f} MiB"],
            [f"a token's scores ({cfg.estimator})", f"{self.slot_bytes:,} bytes"],
            ["published weights, twice", f"{self.weights.flat.nbytes / 2**20:,.1f} MiB"]],
            {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default})
        for name, device in where.items():
            self.hands.append(Hand(name, device, cfg, shared[name.rstrip("0123456789")]))
        self.log = record.Log(Path(cfg.out), cfg.steps, self.quiet)
        self.log.write("run", **record.provenance(asdict(cfg), {h.name: h.process.pid for h in self.hands}))
        waiting = set(where)
        while waiting:
            waiting -= {hand.name for hand, kind, _ in self.reports() if kind == "ready"}
        for hand in self.role("teacher")[:cfg.eval_teacher] + self.role("rollout")[:1]:
            self.evaluate(hand)
        self.hear_evaluations()
        self.began = self.last_step = time.monotonic()

    def role(self, role: str) -> list[Hand]:
        return [h for h in self.hands if h.role == role]

    def loop(self) -> None:
        """Give work, hear reports, until the last batch is trained."""
        while self.ledger.version < self.cfg.steps:
            start = time.monotonic()
            self.give_work()
            self.routing_s += time.monotonic() - start
            for hand, kind, body in self.reports():
                start = time.monotonic()
                self.handle(hand, kind, body)
                self.routing_s += time.monotonic() - start

    def give_work(self) -> None:
        hands = {h.name: h for h in self.hands}
        orders: dict[tuple[str, str], list] = defaultdict(list)         # (worker, what to do) -> slots
        for t in self.ledger.hand_out():
            hand = min(self.role("rollout"), key=lambda h: h.load)
            prompt = self.job.prompts[prompt_number(t.uid, len(self.job.prompts), self.cfg.seed)]
            self.slots.open(t.slot, t.uid, prompt if t.context is None else t.context, len(prompt), self.ledger.version)
            orders[hand.name, "take"].append((self.ledger.version if self.ledger.lockstep else None, t.slot))
            t.holder, hand.load = hand.name, hand.load + 1
        for t in self.ledger.to_score():
            hand = min(self.role("teacher"), key=lambda h: h.load)
            orders[hand.name, "score"].append(t.slot)
            t.holder, hand.load = hand.name, hand.load + 1
        late = defaultdict(list)
        for t in self.ledger.to_stop():
            late[t.holder].append(t.slot)
        for name, slots in late.items():
            hands[name].send(self.ledger.rule, (self.ledger.floor, slots))
        if batch := self.ledger.next_batch():
            orders["learner", "train"] = [t.slot for t in batch]
        for (name, order), body in orders.items():
            hands[name].send(order, body)

    def handle(self, hand: Hand, kind: str, body: dict) -> None:
        if kind == "generated":
            for s in body["slots"]:
                self.ledger.generated(s, body["finished"])
                if not body["finished"]:
                    self.log.write("event", what="cut", uid=self.ledger.tickets[s].uid, version=self.ledger.version,
                                   born=int(self.slots.born[s]), tokens=int(self.slots.length[s]))
        elif kind == "dropped":
            for s in body["slots"]:
                self.dropped += int(self.slots.length[s])
                self.ledger.dropped(s)
        elif kind == "scored":
            for s in body["slots"]:
                self.ledger.scored(s)
        elif kind == "trained":
            self.ledger.trained()                        # after the publish: a freed slot never meets older weights
            self.step_done(body["metrics"])
        hand.load -= len(body.get("slots", ()))

    def reports(self):
        """(hand, kind, body) of everything that has arrived, waiting up to a second; a dead worker ends the run."""
        by_pipe = {h.pipe: h for h in self.hands if not h.stopped}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)       # only here may an interrupt come: never in the
        try:                                                        # middle of a message or of a decision
            ready = wait(list(by_pipe), timeout=1.0)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        for pipe in ready:
            hand = by_pipe[pipe]
            try:
                kind, body, spans = pipe.recv()
            except (EOFError, ConnectionResetError):
                hand.process.join(5)
                raise RuntimeError(f"{hand.name} died with exit code {hand.process.exitcode}; "
                                   f"its output: {self.cfg.out}/{hand.name}.log") from None
            self.spans += [(hand.name, *s) for s in spans]
            hand.stopped = kind == "stopped"
            if kind == "crash":
                raise RuntimeError(f"{hand.name} crashed\n{body['traceback']}")
            if "tokens" in body:
                self.generated[hand.name] = body["tokens"]
            if kind == "pushed":
                self.pushed[hand.name] = body
            if kind == "evaluated":
                self.graded(hand, body)
            if kind == "warning":
                self.log.warn(hand.name, body["text"])
            yield hand, kind, body

    # -- evaluation and record ---------------------------------------------------------------------

    def evaluate(self, hand: Hand) -> None:
        """Ask for greedy answers to the held-out rows; not while the last ones are still to come."""
        if self.job.eval_prompts and hand.name not in self.asked:
            self.asked.add(hand.name)
            hand.send("evaluate")

    def hear_evaluations(self) -> None:
        while self.asked:
            for _ in self.reports():
                continue

    def graded(self, hand: Hand, body: dict) -> None:
        self.asked.discard(hand.name)
        texts, right = self.job.grade(body["answers"])
        who, step = ("teacher", 0) if hand.role == "teacher" else ("student", body["version"])
        self.accuracy[who, step] = sum(right) / len(right)
        self.log.write("eval", step=step, accuracy=self.accuracy[who, step], n=len(right), who=who,
                       examples=[dict(prompt=r.prompt, text=t, right=ok) for r, t, ok in
                                 list(zip(self.job.eval_rows, texts, right))[:3]])

    def step_done(self, metrics: dict) -> None:
        cfg, now, made = self.cfg, time.monotonic(), sum(self.generated.values())
        metrics |= {"gen_tok_s": (made - self.made) / (now - self.last_step), "wall_s": now - self.began,
                    "push_s": max(p["seconds"] for p in self.pushed.values())}
        metrics |= {f"engine_gap_{name}": max(p["gap"][i] for p in self.pushed.values())
                    for i, name in enumerate(("mean", "p95", "max"))}
        assert metrics.keys() == METRICS.keys(), metrics.keys() ^ METRICS.keys()
        self.made, self.last_step = made, now
        self.steps.append(metrics)
        self.counters += [
            (now, "slots", {"free": len(self.ledger.free)} | {s: len(t) for s, t in self.ledger.at.items()}),
            (now, "lag", {k: metrics[f"lag_{k}"] for k in ("min", "mean", "max")}),
            (now, "tokens per second", {k: metrics[f"{k}_tok_s"] for k in ("gen", "train")})]
        self.log.step(metrics)
        step = metrics["step"]
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            self.evaluate(self.role("rollout")[0])
        if cfg.save_every and step % cfg.save_every == 0:
            self.role("learner")[0].send("save", f"{cfg.out}/checkpoints/step-{{version}}")

    def finish(self) -> None:
        """The last evaluation, the student's folder, the totals."""
        cfg, steps, wall = self.cfg, self.steps, self.last_step - self.began
        self.role("learner")[0].send("save", f"{cfg.out}/student")
        self.hear_evaluations()
        self.evaluate(self.role("rollout")[0])
        self.stop()
        busy = record.busy_shares(self.spans, list(self.where), self.began, self.last_step)
        trained, generated = sum(m["tokens"] for m in steps), sum(self.generated.values())
        first, last = [m["kl"] for m in steps[:10]], [m["kl"] for m in steps[-10:]]
        totals = {
            "steps": len(steps), "tokens": trained, "tokens_generated": generated, "tokens_trained": trained,
            "tokens_in_flight": sum(int(self.slots.length[s]) for s in self.ledger.tickets),
            "tokens_dropped": self.dropped, "wall_s": wall,
            "overlap": sum(busy.values()), "busy": busy, "train_tok_s": trained / wall, "gen_tok_s": generated / wall,
            "score_tok_s": trained / wall / busy["teacher"],
            "lag_mean": sum(m["lag_mean"] * m["tokens"] for m in steps) / trained,
            "lag_max": max(m["lag_max"] for m in steps), "kl_before": sum(first) / len(first),
            "kl_after": sum(last) / len(last),
            "accuracy_before": self.accuracy.get(("student", 0)),
            "accuracy_after": self.accuracy.get(("student", cfg.steps)),
            "accuracy_teacher": self.accuracy.get(("teacher", 0))}
        assert totals.keys() == record.DONE.keys(), totals.keys() ^ record.DONE.keys()
        self.log.write("done", **totals)
        self.close()
        self.quiet or record.show_end(totals, cfg.out)

    def stop(self) -> None:
        """Every worker ends after the orders it has; then it is gone."""
        for hand in self.hands:
            hand.send("stop")
        while any(not h.stopped for h in self.hands):
            for _ in self.reports():
                continue

    def checkpoint(self, within_s: float) -> str:
        """Save the student as it is; the folder, or "" where the learner does not manage in time or was never there."""
        learner, limit = self.role("learner"), time.monotonic() + within_s
        if not self.steps or learner[0].stopped:
            return ""
        learner[0].send("save", f"{self.cfg.out}/checkpoints/step-{{version}}")
        while time.monotonic() < limit:
            for hand, kind, body in self.reports():
                self.handle(hand, kind, body)
                if kind == "saved":
                    return body["folder"]
        return ""

    def close(self) -> None:
        """No process is left, and the record is whole, whatever happened."""
        if self.log:
            record.write_trace(Path(self.cfg.out) / "trace.json", self.spans, self.counters)
            self.log.close()
            self.log = None
        for hand in self.hands:
            hand.process.join(5 if hand.stopped else 0)
            hand.process.kill()
        for hand in self.hands:
            hand.process.join()

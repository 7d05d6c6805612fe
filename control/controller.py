"""
The parent of a run: starts the workers, routes slot numbers between them, hears what they report, ends them.

The decisions are scheduler.Ledger's and the algorithm is learner.Learner's: here is only who is told what, and what is
written down. Nothing of a model or a text is known here but what a `Job` says. A rollout or teacher worker that dies is
started anew and its tickets are handed out again; a learner that dies ends the run, which can be resumed. What is left
out: moving a dead worker's tickets to its siblings. Tests: tests/test_pipeline.py, tests/test_faults.py
"""
from __future__ import annotations

import contextlib
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cache import Slots
from control import plan
from control.preflight import Job
from control.scheduler import Ledger, Ticket
from data.graders import Grading, summary
from data.prompts import prompt_number
from estimators import ESTIMATORS
from extensions.effopd import MIN_ESS
from extensions.rock import Bypass, parse
from models.loading import vocab_size
from record import checkpoint, report
from record.account import WINDOW, Account
from record.log import Log, rewind
from record.provenance import provenance
from record.steps import done_record, step_record
from record.timeline import Trace
from record.trackers import TRACKERS
from transport.process import Hand
from transport.weights import Weights

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from asyncopd import Config


class Ear:
    """The handler of SIGINT and SIGTERM: they are heard while the parent waits, never in the middle of a message or of
    a decision. Masking them would not do: a signal goes to any thread that has it open, and Python hands it on."""
    listening, told = True, False

    def __call__(self, *_) -> None:
        self.told = True
        if self.listening:
            self.hear()

    def hear(self) -> None:
        if self.told:
            self.told = False
            raise KeyboardInterrupt


EAR = Ear()


def role_of(name: str) -> str:
    """Of a worker: rollout0 is a rollout."""
    return name.rstrip("0123456789")


class Run:
    """The parent: routes slots, keeps the record, ends the run. `loop` is the whole of the pipeline."""

    def __init__(self, cfg: Config, job: Job, where: dict[str, str], quiet: bool = False):
        estimator, dtype = ESTIMATORS[cfg.estimator], torch.bfloat16 if cfg.gpus else torch.float32
        self.cfg, self.job, self.where, self.quiet = cfg, job, where, quiet
        self.slot_bytes = estimator.bytes(cfg.mc_samples, cfg.top_k, job.hidden * dtype.itemsize)
        bypass = Bypass(vocab_size(cfg.student), cfg.seed) if cfg.rock and not parse(cfg.rock).weight else None
        self.slots = Slots((cfg.max_ahead + 1) * cfg.batch, cfg.max_prompt, cfg.max_response,
                           estimator.columns(cfg.mc_samples, cfg.top_k),
                           job.hidden if estimator.support == "full" else 0, dtype, states=job.states, bypass=bypass)
        self.weights = Weights(job.layout, job.probe, dtype)
        self.ledger = Ledger(self.slots, cfg.batch, cfg.schedule, cfg.max_ahead, cfg.max_lag, cfg.overdue)
        self.log: Log | None = None
        self.trace: Trace | None = None
        self.hands: list[Hand] = []
        self.account = Account()
        self.pushed: dict[str, dict] = {}                          # rollout worker -> its last push
        self.asked: set[str] = set()                               # who has an evaluation to report
        self.gradings: dict[Connection, Grading] = {}              # what is being judged
        self.toll: dict[str, float] = {}                           # what a jump costs, until its barrier ends
        self.restarts = self.skips = 0                             # of workers; of updates, in a row
        self.saving: dict[str, checkpoint.State] = {}              # folder that the learner writes -> the parent's part
        self.saved = ""                                            # the last whole checkpoint
        self.ending = self.collapsed = self.unwritten = False
        self.routing_s = 0.0                                       # seconds of the parent's own work

    def start(self, resume: Path | None = None) -> None:
        """Start the workers, wait until all can work, evaluate version 0; or go on from a checkpoint."""
        cfg, where, out = self.cfg, self.where, Path(self.cfg.out)
        if resume:
            self.restore(resume)
        self.shared = {"rollout": (self.slots, self.weights, self.job.eval_prompts),
                       "teacher": (self.slots, self.job.eval_prompts),
                       "learner": (self.slots, self.weights, str(resume or ""), self.ledger.version)}
        (out / ".learners").unlink(missing_ok=True)      # by this file several learners find each other
        self.quiet or report.show_start(plan.why(cfg), plan.rows(*self.job.memory), [
            [f"{len(self.slots)} slots", f"{self.slots.bytes / 2**20:,.1f} MiB"],
            [f"a token's scores ({cfg.estimator})", f"{self.slot_bytes:,} bytes"],
            *[["a token's hidden states (OPRD)", f"{2 * self.job.states[1]:,} bytes"]] * (cfg.oprd_weight > 0),
            ["published weights, twice", f"{self.weights.flat.nbytes / 2**20:,.1f} MiB"]],
            {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default})
        self.quiet or report.show_prompt(self.job.notes, self.job.first_prompt)
        self.log = Log(out, cfg.steps, self.quiet, done=self.ledger.version)
        self.log.tracker = TRACKERS[cfg.log](out, asdict(cfg)) if cfg.log else None
        self.trace = Trace(out / "trace.json", {name: role_of(name) for name in where})
        for name in where:
            self.hands.append(self.worker(name))
        self.log.write("run", **provenance(asdict(cfg), {h.name: h.process.pid for h in self.hands}))
        resume and self.log.write("event", what="resumed", step=self.ledger.version, checkpoint=str(resume))
        while not all(h.ready for h in self.hands):
            self.hear()
        cfg.effopd and self.tell("learner", "validate", self.job.gate_prompts)
        if not resume:
            for hand in self.role("teacher")[:cfg.eval_teacher] + self.role("rollout")[:1]:
                self.evaluate(hand)
        elif cfg.eval_every and self.ledger.version % cfg.eval_every == 0:
            self.evaluate(self.role("rollout")[0])       # what was asked of it then may have been lost
        self.hear_evaluations()
        self.account.start()

    def worker(self, name: str) -> Hand:
        role = role_of(name)
        rank = [int(name[7:] or 0)] if role == "learner" else []
        return Hand(name, self.where[name], self.cfg, (*self.shared[role], *rank))

    def role(self, role: str) -> list[Hand]:
        return [h for h in self.hands if h.role == role]

    def tell(self, role: str, order: str, body) -> None:
        for hand in self.role(role):
            hand.send(order, body)

    def loop(self) -> None:
        """Give work, hear reports, until the last batch is trained."""
        while self.ledger.version < self.cfg.steps:
            start = time.monotonic()
            self.give_work()
            self.routing_s += time.monotonic() - start
            self.hear()

    def hear(self) -> None:
        """Wait for reports, at most a second, and do what they ask for."""
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
            orders[hand.name, "take"].append((self.ledger.due(t), t.slot))
            t.holder, hand.load = hand.name, hand.load + 1
        for t in self.ledger.to_score():
            hand = min(self.role("teacher"), key=lambda h: h.load)
            orders[hand.name, "score"].append(t.slot)
            t.holder, hand.load = hand.name, hand.load + 1
        late = defaultdict(list)
        for t in self.ledger.to_stop():
            late[t.holder].append(t.slot)
        for name, slots in late.items():
            hands[name].send(self.ledger.ending, (self.ledger.floor, slots))
        if batch := self.ledger.next_batch():
            orders |= {(h.name, "train"): [t.slot for t in batch] for h in self.role("learner")}
        if (old := self.ledger.to_weigh()) is not None:
            self.tell("learner", "weigh", [t.slot for t in old])
        for (name, order), body in orders.items():
            hands[name].send(order, body)

    def handle(self, hand: Hand, kind: str, body: dict) -> None:
        slots = body.get("slots", ())
        if kind in ("generated", "dropped"):
            self.account.handed[hand.name] += int(self.slots.length[slots].sum())
        if kind == "generated":
            for s in slots:
                self.ledger.generated(s, body["finished"])
                if not body["finished"]:
                    self.count("cut", s)
                    self.log.write("event", what="cut", uid=self.ledger.tickets[s].uid, version=self.ledger.version,
                                   born=int(self.slots.born[s]), tokens=int(self.slots.length[s]))
        elif kind == "dropped":
            self.drop(slots)
        elif kind == "scored":
            for s in slots:
                self.ledger.scored(s)
        elif kind == "trained":
            jump = any(e["what"] == "effopd" and e["k"] > 0 for e in body["metrics"]["events"])
            trained = self.ledger.trained(jump)
            nothing = dict.fromkeys(("cut", "cut_tokens", "dropped", "dropped_tokens"), 0)
            self.toll = nothing | {"seconds": -time.monotonic()} if jump else {}
            self.step_done(body["metrics"], trained)     # after the publish: a freed slot never meets older weights
        elif kind == "weighed":
            self.weighed(body["ess"])
        elif kind == "answers":
            grading = Grading(self.job.grade_gate, [[a] for a in body["answers"]], "gate", self.ledger.version + 1)
            self.gradings[grading.done] = grading
        elif kind == "saved":
            self.checkpoint_written(body)
        elif kind == "pushed":
            self.pushed[hand.name] = body
        elif kind == "evaluated":
            self.graded(hand, body)
        elif kind == "warning":
            self.log.warn(f"{hand.name}: {body['text']}", what="warning", worker=hand.name, why=body["text"])
        elif kind == "ready":
            hand.ready = True
        elif kind == "stopped":
            hand.stopped = True
        elif kind == "crash":
            hand.why = body["traceback"]
            for other in set(self.role("learner")) - {hand} if hand.role == "learner" else ():
                other.process.join(0.3)                  # of several learners, one may only have lost the other
                other.process.exitcode and self.died(other)
            if body["incurable"] or hand.role == "learner":
                raise RuntimeError(f"{hand.name} crashed\n{hand.why}")
        hand.load -= len(slots)
        if "tokens" in body:
            self.account.drawn[hand.name] = body["tokens"]

    def drop(self, slots: list[int]) -> None:
        """Throw away what these responses have; their slots are free."""
        for s in slots:
            self.account.dropped += int(self.slots.length[s])
            self.count("dropped", s)
            self.ledger.dropped(s)

    def count(self, what: str, slot: int) -> None:
        if self.toll:
            self.toll[what] += 1
            self.toll[f"{what}_tokens"] += int(self.slots.length[slot])

    def weighed(self, ess: dict[int, float]) -> None:
        """What was drawn before a jump is scored and weighed: the barrier ends."""
        self.drop([s for s, x in ess.items() if x < MIN_ESS])
        self.toll["seconds"] += time.monotonic()
        self.log.write("event", what="barrier", step=self.ledger.version, weighed=len(ess), **self.toll)
        self.toll = {}
        self.ledger.reopen()

    def reports(self) -> Iterator[tuple[Hand, str, dict]]:
        """(hand, kind, body) of all that has arrived, waiting up to a second. Notices who died and who stands still."""
        now, by_pipe = time.monotonic(), {h.pipe: h for h in self.hands if not h.stopped}
        EAR.listening = True
        try:
            EAR.hear()
            ready = wait([*by_pipe, *self.gradings], timeout=1.0)
        finally:
            EAR.listening = False
        for pipe in ready:
            if pipe in self.gradings:
                self.judged(self.gradings.pop(pipe))
                continue
            hand = by_pipe[pipe]
            try:
                kind, body, spans = pipe.recv()
            except (EOFError, OSError):                             # between two messages, in the middle of one
                self.died(hand)
                continue
            for span in spans:
                self.trace.span(hand.name, *span)
            yield hand, kind, body
        for hand in self.hands:
            if not hand.stopped and now - hand.pulse[0] > self.cfg.stall_s:
                hand.kill(f"has not moved for {self.cfg.stall_s:g} s (--stall-s), {self.doing(hand)}")

    # -- deaths ------------------------------------------------------------------------------------

    def doing(self, hand: Hand) -> str:
        """What a worker is waited for."""
        held = [t.slot for t in self.ledger.tickets.values() if t.holder == hand.name or t.stage == hand.role]
        return ("starting" if not hand.ready else f"evaluating, and holds slots {held}" if hand.name in self.asked else
                f"and holds slots {held}" if held else "with nothing to do")

    def died(self, hand: Hand) -> None:
        """Start a rollout or teacher worker anew, with the newest weights; what it held is handed out again."""
        hand.process.join(5)
        hand.process.kill()
        hand.process.join()
        why = hand.why or f"died with exit code {hand.process.exitcode}"
        if hand.role == "learner" or not hand.ready:
            raise RuntimeError(f"{hand.name} {why}; its output: {self.cfg.out}/{hand.name}.log")
        if self.restarts == self.cfg.max_restarts:
            raise RuntimeError(f"{hand.name} {why}, after {self.restarts} restarts (--max-restarts); its output: "
                               f"{self.cfg.out}/{hand.name}.log")
        self.restarts += 1
        handed_over = set(self.ledger.at["generated"])
        held = self.ledger.holder_died(hand.name)
        self.account.worker_died(hand.name, sum(int(self.slots.length[t.slot]) for t in held if t.slot in handed_over))
        for t in held:
            if t.stage == "rollout":
                self.slots.length[t.slot] = 0            # from its beginning
        new = self.worker(hand.name)
        new.ready = True                                 # it was once: what it is sent waits in its pipe
        self.hands[self.hands.index(hand)] = new
        self.log.warn(f"{hand.name} {why.strip().splitlines()[-1]}: restarted, {self.restarts} of "
                      f"{self.cfg.max_restarts}", what="restarted", worker=hand.name, why=why, pid=new.process.pid,
                      uids=[t.uid for t in held], version=self.ledger.version)
        if hand.name in self.asked:
            new.send("evaluate")
        if self.ending:
            new.send("stop")

    # -- evaluation and record ---------------------------------------------------------------------

    def evaluate(self, hand: Hand) -> None:
        """Ask for answers to the held-out rows; not while the last ones are still to come, nor for those of a version
        that were in the log before a resumption."""
        there = hand.role == "rollout" and ("student", self.ledger.version) in self.account.accuracy
        if self.job.eval_prompts and hand.name not in self.asked and not there:
            self.asked.add(hand.name)
            hand.send("evaluate")

    def hear_evaluations(self) -> None:
        while self.asked or self.gradings:
            self.hear()

    def graded(self, hand: Hand, body: dict) -> None:
        """Answers have come. They are judged in a thread, whose end is heard like any report."""
        self.asked.discard(hand.name)
        who, step = ("teacher", 0) if hand.role == "teacher" else ("student", body["version"])
        answers, k = body["answers"], len(body["answers"]) // len(self.job.eval_prompts)
        grading = Grading(self.job.grade, [answers[i:i + k] for i in range(0, len(answers), k)], who, step)
        self.gradings[grading.done] = grading

    def judged(self, grading: Grading) -> None:
        if grading.outcome is None:
            raise RuntimeError(f"grading the answers of step {grading.step} failed")
        texts, right = grading.outcome
        if grading.who == "gate":
            return self.tell("learner", "share", sum(k[0] for k in right) / len(right))
        said = summary(right)
        self.account.accuracy[grading.who, grading.step] = said["accuracy"]
        self.log.evaluation(grading.step, grading.who, said, list(zip(self.job.eval_rows, texts, right)))

    def step_done(self, metrics: dict, trained: list[Ticket]) -> None:
        cfg, now, skipped, events = self.cfg, time.monotonic(), metrics.pop("skipped"), metrics.pop("events")
        self.account.enter(metrics)
        segments = [(t.uid, int(self.slots.start[t.slot] - self.slots.prompt[t.slot]), int(self.slots.length[t.slot]))
                    for t in trained]
        metrics = step_record(metrics, self.account.rates(now), self.pushed.values(), len(skipped), segments)
        self.trace.fold(self.account.began)
        self.trace.curve("slots", now, {"free": len(self.ledger.free)} | {s: len(t) for s, t in self.ledger.at.items()})
        self.trace.curve("lag", now, {k: metrics[f"lag_{k}"] for k in ("min", "mean", "max")})
        self.trace.curve("tokens per second", now, {k: metrics[f"{k}_tok_s"] for k in ("gen", "train")})
        self.log.step(metrics)
        for event in events:
            self.log.write("event", step=metrics["step"], **event)
        self.watch(metrics["step"], skipped, {t.slot: t.uid for t in trained})
        step = metrics["step"]
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            self.evaluate(self.role("rollout")[0])
        if cfg.save_every and step % cfg.save_every == 0:
            self.order_checkpoint()

    def watch(self, step: int, skipped: list[dict], uids: dict[int, int]) -> None:
        """What a person should hear of: updates that could not be made, a student that has nothing left to say."""
        for s in skipped:
            prompts = [uids[slot] for slot in s["slots"]]
            self.log.warn(f"step {step}: an update was skipped, prompts {prompts}: {s['why']}",
                          what="skipped", step=step, uids=prompts, why=s["why"])
        self.skips = self.skips + len(skipped) if len(skipped) == min(self.cfg.minibatches, len(uids)) else 0
        if self.skips >= self.cfg.max_skips:
            raise RuntimeError(f"step {step}: {self.skips} updates in a row were not finite (--max-skips "
                               f"{self.cfg.max_skips}); the last good checkpoint is {self.saved or 'none'}")
        before, now = self.account.entropy_before, self.account.entropy_after
        if not self.collapsed and len(self.account.last) == WINDOW and now < 0.01 * before:
            self.collapsed = True
            self.log.warn(f"step {step}: the student's entropy has collapsed from {before:.3g} to {now:.3g} nats",
                          what="entropy", step=step, entropy=now)

    # -- checkpoints -------------------------------------------------------------------------------

    def order_checkpoint(self) -> None:
        """Have the learner write its part; the parent's is what is known now, at the version that it is of."""
        state = checkpoint.State(self.ledger.version, self.ledger.prompts, self.ledger.untrained(),
                                 self.account.counters())
        try:
            partial = checkpoint.unsealed(Path(self.cfg.out) / "checkpoints", state.version)
        except OSError as e:
            return self.unsaved(str(e))
        self.saving[str(partial)] = state
        self.tell("learner", "checkpoint", str(partial))

    def checkpoint_written(self, body: dict) -> None:
        """The learner has written what it was asked to; whatever went wrong, the last checkpoint is still there."""
        state, partial = self.saving.pop(body["folder"], None), Path(body["folder"])
        if state is None:                                # the student's folder, at the end
            if body["why"]:
                raise RuntimeError(f"the student could not be saved in {partial}: {body['why']}")
            return
        try:
            if body["version"] == state.version and not body["why"]:       # else the learner was a step ahead
                self.saved = str(checkpoint.seal(partial, state, self.cfg.keep))
        except checkpoint.UNWRITABLE as e:
            body["why"] = str(e)
        shutil.rmtree(partial, ignore_errors=True)
        if body["why"]:
            self.unsaved(body["why"])

    def unsaved(self, why: str) -> None:
        self.unwritten = True
        self.log.warn(f"no checkpoint at step {self.ledger.version}: {why}; the last one is {self.saved or 'none'}",
                      what="unsaved", step=self.ledger.version, why=why)

    def restore(self, folder: Path) -> None:
        state = checkpoint.read(folder)
        checkpoint.clear(folder.parent, state.version)
        self.account.resume(state.counters, rewind(Path(self.cfg.out) / "log.jsonl", state.version))
        self.ledger.resume(state.version, state.prompts, state.tickets)
        self.saved = str(folder)

    def interrupted(self) -> str:
        """Abandon the step and save, however long that takes; the newest checkpoint, or "" where there is none."""
        learner = self.role("learner")[:1]
        if not learner or not learner[0].ready or learner[0].stopped:
            return self.saved
        learner[0].pulse[1] = 1
        wanted = Path(self.cfg.out) / "checkpoints" / f"step-{self.ledger.version}"
        self.unwritten = False
        if self.ledger.version and self.saved != str(wanted):
            self.log.say("interrupted, writing a checkpoint; told a second time, it ends at once")
        while self.ledger.version and self.saved != str(wanted) and not self.unwritten:
            self.saving or self.order_checkpoint()
            self.hear()
            wanted = wanted.with_name(f"step-{self.ledger.version}")
        return self.saved

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """The last evaluation, the student's folder, the totals."""
        self.tell("learner", "export", f"{self.cfg.out}/student")
        self.hear_evaluations()
        self.evaluate(self.role("rollout")[0])
        self.hear_evaluations()                          # the learner is still there to be interrupted
        self.stop()
        in_flight = sum(int(self.slots.length[s]) for s in self.ledger.tickets)
        totals = done_record(self.account, in_flight, self.trace.busy(self.account.began, self.account.last_step))
        self.log.write("done", **totals)
        out = Path(self.cfg.out)
        (out / "student" / "README.md").write_text(report.model_card(out / "log.jsonl"), encoding="utf-8")
        self.close()
        self.quiet or report.show_end(totals, self.cfg.out)

    def stop(self) -> None:
        """Every worker ends after the orders it has; then it is gone."""
        self.ending = True
        for hand in self.hands:
            hand.send("stop")
        while self.gradings or not all(h.stopped for h in self.hands):
            self.hear()

    def close(self) -> None:
        """No process is left, and the record is whole, whatever happened."""
        for hand in self.hands:
            hand.process.join(5 if hand.stopped else 0)
            hand.process.kill()
        for hand in self.hands:
            hand.process.join()
        for part in (self.trace, self.log):
            with contextlib.suppress(OSError):           # a full disk
                part and part.close()
        self.trace = self.log = None
        (Path(self.cfg.out) / ".learners").unlink(missing_ok=True)
        for partial in self.saving:
            shutil.rmtree(partial, ignore_errors=True)

"""
The parent of a run: it sends orders to the workers, reads their reports, and ends them.

The scheduler decides which slots go where; the learner has the algorithm. Here is who gets which
order, and what follows from each report. The parent touches no model and no text except through a
`Job`.

    loop     hand out work, read reports, until the last batch is trained
    orders   rollout: take, cut, drop, evaluate, stop      teacher: score, evaluate, stop
             learner: train, examine, checkpoint, export, validation, validation_share, stop

What is left out: deaths and checkpoints (recovery.py), evaluations (evaluation.py), what is
written down (record/recorder.py). Tests: tests/test_pipeline.py, tests/test_faults.py
"""
from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from config import Config
from control import plan
from control.advice import AFTER, advice
from control.evaluation import Evaluation
from control.memory import allocate, show_start
from control.preflight import Job
from control.recovery import Checkpoints, Deaths
from control.router import Router
from control.scheduler import Scheduler, Ticket
from control.signals import SIGNALS
from control.watchdog import Watchdog
from learner import learner_worker
from record import report
from record.disk import write_text
from record.provenance import provenance
from record.recorder import Recorder
from rollout import rollout_worker
from teacher import teacher_worker
from transport.process import WorkerHandle, WorkerPool
from transport.shared import LearnerStart

WORKERS = {"rollout": rollout_worker, "teacher": teacher_worker, "learner": learner_worker}


class Controller:
    """Runs a job: `start`, `loop`, `finish`; `close` in any case."""

    def __init__(self, cfg: Config, job: Job, placements: Sequence[plan.Placement],
                 quiet: bool = False):
        """`placements`: control.plan.plan(cfg). `quiet`: print nothing and show no bar."""
        self.cfg = cfg
        self.job = job
        self.placements = placements
        self.quiet = quiet
        self.out = Path(cfg.out)
        self.shared = allocate(cfg, job)
        self.slots = self.shared.slots
        self.scheduler = Scheduler(self.slots, cfg.batch, cfg.schedule, cfg.max_ahead, cfg.max_lag,
                                   cfg.overdue)
        self.pool = WorkerPool()
        self.recorder = Recorder(self.out, {p.name: p.role for p in placements}, job.metrics)
        self.account = self.recorder.account
        self.evaluation = Evaluation(job, self.pool, self.recorder)
        self.checkpoints = Checkpoints(cfg, self.pool, self.scheduler, self.recorder)
        self.deaths = Deaths(cfg, self.pool, self.scheduler, self.slots, self.recorder)
        self.router = Router(job.prompts, cfg.seed, self.slots, self.scheduler, self.pool,
                             self.recorder)
        self.watchdog = Watchdog(cfg, self.account, self.recorder.warn)
        self.ending = False                      # every worker has its last order
        self.batches = 0                         # trained since this start
        self.routing_s = 0.0                     # seconds of the parent's own work
        self.handlers = {
            "ready": self.worker_ready, "stopped": self.worker_stopped, "warning": self.warning,
            "crash": self.crash, "pushed": self.pushed, "evaluated": self.evaluation.answered,
            "generated": self.router.generated, "dropped": self.router.dropped,
            "scored": self.router.scored, "flushed": self.router.flushed,
            "trained": self.trained, "trained along": nothing, "saved": self.checkpoint_written,
            "validation_answers": self.validation_answers}

    @property
    def saved(self) -> str:
        """The newest checkpoint; "" if there is none."""
        return self.checkpoints.saved

    # -- the beginning ----------------------------------------------------------------------------

    def start(self, resume: Path | None = None) -> None:
        """Start the workers, wait until all are ready, and evaluate.

        `resume`: the checkpoint from which the run continues.
        """
        cfg = self.cfg
        if resume is not None:
            self.checkpoints.restore(resume)
        if not self.quiet:
            show_start(cfg, self.job, self.shared)
        self.recorder.open(cfg.steps, done=self.scheduler.version, quiet=self.quiet,
                           tracker=cfg.log, config=asdict(cfg))
        self.start_workers(str(resume or ""))
        pids = {handle.name: handle.process.pid for handle in self.pool}
        self.recorder.log.write("run", **provenance(asdict(cfg), pids))
        if resume is not None:
            self.recorder.event("resumed", step=self.scheduler.version, checkpoint=str(resume))
        self.recorder.log.progress(f"loading models: {self.unready()}")
        for wave in plan.waves(cfg, list(self.placements)):
            self.load_models({p.name for p in wave})
        if self.job.validation_prompts:
            self.pool.broadcast("learner", "validation", self.job.validation_prompts)
        self.first_evaluations(resumed=resume is not None)
        self.account.start()
        self.recorder.log.begin()

    def unready(self) -> str:
        """The workers that are still loading, and the engine that a rollout worker starts."""
        names = {"rollout": f" ({self.cfg.engine})", "teacher": f" ({self.cfg.teacher_engine})"}
        return ", ".join(handle.name + names.get(handle.role, "") for handle in self.pool
                         if not handle.ready)

    def load_models(self, names: Collection[str]) -> None:
        """Let these workers load their models, and wait until they are ready."""
        for handle in self.pool:
            if handle.name in names:
                handle.let_load()
        while not all(handle.ready for handle in self.pool if handle.name in names):
            self.hear()

    def start_workers(self, checkpoint: str) -> None:
        """Their processes; each then waits for its wave."""
        self.meeting_point.unlink(missing_ok=True)
        for p in self.placements:
            args: tuple = (self.shared,)
            if p.role == "learner":
                args += (LearnerStart(p.index, checkpoint, self.scheduler.version),)
            self.pool.add(WorkerHandle(p.role, p.index, WORKERS[p.role], args, p.device, self.cfg))

    @property
    def meeting_point(self) -> Path:
        """The file by which several learners find each other."""
        return self.out / ".learners"

    def first_evaluations(self, resumed: bool) -> None:
        """Evaluate version 0, or after a resumption what the interruption may have lost."""
        every = self.cfg.eval.every
        if not resumed:
            if self.cfg.eval.teacher:
                self.evaluation.ask_teacher()
            self.evaluation.ask_student(0)
        elif every and self.scheduler.version % every == 0:
            self.evaluation.ask_student(self.scheduler.version)
        if self.evaluation.pending:
            by = " and ".join(sorted(self.evaluation.asked))
            self.recorder.log.progress("evaluation before the first step, by "
                                       f"{by}: {len(self.job.eval_prompts):,} prompts")
        self.hear_evaluations()

    # -- the loop ---------------------------------------------------------------------------------

    def loop(self) -> None:
        """Give work and read reports until the last batch is trained."""
        while self.scheduler.version < self.cfg.steps:
            start = time.monotonic()
            self.router.give_work()
            self.routing_s += time.monotonic() - start
            self.hear()

    def hear(self) -> None:
        """Wait for reports, at most a second, and do what follows from each."""
        now = time.monotonic()
        handles = self.pool.by_pipe()
        for pipe in SIGNALS.wait([*handles, *self.evaluation.pipes], timeout=1.0):
            if pipe in handles:
                self.read_report(handles[pipe])
            else:
                self.evaluation.finish_grading(pipe)
        self.deaths.kill_stalled(now, self.evaluation.asked)

    def read_report(self, handle: WorkerHandle) -> None:
        message = handle.receive()
        if message is None:
            self.restart(handle)
            return
        kind, body, spans = message
        self.recorder.spans(handle.name, spans)
        start = time.monotonic()
        self.handlers[kind](handle, body)
        self.routing_s += time.monotonic() - start

    # -- reports: one method for each kind --------------------------------------------------------

    def worker_ready(self, handle: WorkerHandle, body: dict) -> None:
        handle.ready = True
        rest = self.unready()
        if rest:
            self.recorder.log.progress(f"{handle.name} is ready, still loading: {rest}")

    def worker_stopped(self, handle: WorkerHandle, body: dict) -> None:
        handle.stopped = True
        if handle.role == "rollout":
            self.account.drawn[handle.name] = body["tokens"]
            self.account.preempted[handle.name] = body["preempted"]

    def warning(self, handle: WorkerHandle, body: dict) -> None:
        self.recorder.warn(f"{handle.name}: {body['text']}", what="warning", worker=handle.name,
                           why=body["text"])

    def crash(self, handle: WorkerHandle, body: dict) -> None:
        """The end of its pipe follows. RuntimeError if a new process would not help."""
        handle.why = body["traceback"]
        if handle.role == "learner":
            self.deaths.end_with_learner(handle)
        if body["incurable"] or handle.role == "learner":
            raise RuntimeError(f"{handle.name} crashed\n{handle.why}")

    def pushed(self, handle: WorkerHandle, body: dict) -> None:
        self.recorder.pushes[handle.name] = body

    def trained(self, handle: WorkerHandle, body: dict) -> None:
        """A batch is trained and published."""
        batch = self.router.trained(body["flush"])
        self.record_step(body, batch)
        step = self.scheduler.version
        uids = {t.slot: t.uid for t in batch}
        self.watchdog.see(step, body["skipped"], uids, self.saved)
        every = self.cfg.eval.every
        if every and step % every == 0 and step < self.cfg.steps:
            self.evaluation.ask_student(step)
        if self.cfg.save_every and step % self.cfg.save_every == 0:
            self.checkpoints.order()
        self.advise()

    def advise(self) -> None:
        """After the first batches of this start: say which split would be faster."""
        self.batches += 1
        if self.batches == AFTER:
            text = advice(self.cfg, self.recorder.busy())
            if text:
                self.recorder.warn(text, what="advice", why=text)

    def record_step(self, body: dict, batch: list[Ticket]) -> None:
        trained = []
        for t in batch:
            first = int(self.slots.start[t.slot] - self.slots.prompt[t.slot])
            trained.append((t.uid, first, int(self.slots.length[t.slot])))
        in_stages = {stage: len(tickets) for stage, tickets in self.scheduler.at.items()}
        self.recorder.step(body["metrics"], body["events"], len(body["skipped"]), trained,
                           slots={"free": len(self.scheduler.free), **in_stages},
                           begun=self.scheduler.prompts)

    def validation_answers(self, handle: WorkerHandle, body: dict) -> None:
        """Answers that the learner wants graded, in the step after the newest version."""
        self.evaluation.validate(body["answers"], self.scheduler.version + 1)

    def checkpoint_written(self, handle: WorkerHandle, body: dict) -> None:
        self.checkpoints.written(body["folder"], body["version"], body["why"])

    # -- deaths and interrupts --------------------------------------------------------------------

    def restart(self, handle: WorkerHandle) -> None:
        """Replace a worker that has died, and repeat the orders that were lost with it."""
        new = self.deaths.restart(handle)
        self.evaluation.ask_again(new)
        if self.ending:
            new.send("stop")

    def interrupted(self) -> str:
        """Abandon the step and save. Returns the newest checkpoint; "" if there is none."""
        return self.checkpoints.save_now(self.hear)

    # -- the end ----------------------------------------------------------------------------------

    def finish(self) -> None:
        """The last evaluation, the student's folder, the totals."""
        self.pool.broadcast("learner", "export", str(self.out / "student"))
        self.hear_evaluations()
        self.evaluation.ask_student(self.scheduler.version)
        self.hear_evaluations()                  # while there is a learner that can be interrupted
        self.stop()
        in_flight = sum(int(self.slots.length[s]) for s in self.scheduler.tickets)
        totals = self.recorder.done(in_flight)
        card = report.model_card(self.out / "log.jsonl")
        write_text(self.out / "student" / "README.md", card)
        self.close()
        if not self.quiet:
            report.show_end(totals, self.cfg.out)

    def hear_evaluations(self) -> None:
        while self.evaluation.pending:
            self.hear()

    def stop(self) -> None:
        """Let every worker end after the orders that it has, and wait for that."""
        self.ending = True
        for handle in self.pool:
            handle.send("stop")
        while self.evaluation.pipes or not all(handle.stopped for handle in self.pool):
            self.hear()

    def close(self) -> None:
        """No process is left and every file is closed, whatever has happened."""
        self.pool.close()
        self.recorder.close()
        for file in (self.meeting_point, *self.out.glob(".weights-*")):
            file.unlink(missing_ok=True)
        self.checkpoints.close()


def nothing(handle: WorkerHandle, body: dict) -> None:
    """A report that needs no answer."""

"""
Deaths, checkpoints and resumptions.

A rollout or teacher worker that dies is started again with the newest weights, and its tickets are
handed out again. A learner that dies ends the run, which can be resumed from its last checkpoint.

What is left out: giving a dead worker's tickets to other workers; the files
(record/checkpoint.py). Tests: tests/test_faults.py, tests/test_checkpoint.py
"""
from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from cache import Slots
from config import Config
from control.scheduler import Scheduler, Ticket
from record import checkpoint
from record.log import rewind
from record.recorder import Recorder
from transport.process import WorkerHandle, WorkerPool


class Deaths:
    """Notices workers that stand still, and starts successors of those that are gone."""

    def __init__(self, cfg: Config, pool: WorkerPool, scheduler: Scheduler, slots: Slots,
                 recorder: Recorder):
        self.cfg = cfg
        self.pool = pool
        self.scheduler = scheduler
        self.slots = slots
        self.recorder = recorder
        self.restarts = 0

    def kill_stalled(self, now: float, evaluating: Collection[str]) -> None:
        """Kill workers without a sign of life since --faults.stall-s before `now`.

        `evaluating`: the names of workers that are answering the evaluation prompts.
        """
        limit_s = self.cfg.faults.stall_s
        for handle in self.pool:
            if not handle.stopped and now - handle.pulse[0] > limit_s:
                work = self.work_of(handle, evaluating)
                handle.kill(f"has not moved for {limit_s:g} s (--faults.stall-s), {work}")

    def work_of(self, handle: WorkerHandle, evaluating: Collection[str]) -> str:
        """What a worker should be doing."""
        held = [t.slot for t in self.scheduler.tickets.values()
                if t.holder == handle.name or t.stage == handle.role]
        if not handle.ready:
            return "starting"
        if handle.name in evaluating:
            return f"evaluating, and holds slots {held}"
        if held:
            return f"and holds slots {held}"
        return "with nothing to do"

    def restart(self, handle: WorkerHandle) -> WorkerHandle:
        """Start the successor of a worker that is gone. RuntimeError if the run must end."""
        why = handle.end()
        output = f"its output: {self.cfg.out}/{handle.name}.log"
        if handle.role == "learner" or not handle.ready:
            raise RuntimeError(f"{handle.name} {why}; {output}")
        most = self.cfg.faults.restarts
        if self.restarts == most:
            raise RuntimeError(f"{handle.name} {why}, after {self.restarts} restarts "
                               f"(--faults.restarts); {output}")
        self.restarts += 1
        held = self.take_back(handle)
        new = handle.successor()
        new.ready = True                     # as before: what it is sent waits in its pipe
        self.pool.replace(handle, new)
        last_line = why.strip().splitlines()[-1]
        self.recorder.warn(f"{handle.name} {last_line}: restarted, {self.restarts} of {most}",
                           what="restarted", worker=handle.name, why=why, pid=new.process.pid,
                           uids=[t.uid for t in held], version=self.scheduler.version)
        return new

    def take_back(self, handle: WorkerHandle) -> list[Ticket]:
        """What a dead worker held; a rollout's tickets begin again."""
        handed_over = set(self.scheduler.at["generated"])
        held = self.scheduler.holder_died(handle.name)
        drawn_again = sum(int(self.slots.length[t.slot]) for t in held if t.slot in handed_over)
        self.recorder.account.worker_died(handle.name, drawn_again)
        for t in held:
            if t.stage == "rollout":
                self.slots.length[t.slot] = 0
        return held

    def end_with_learner(self, handle: WorkerHandle) -> None:
        """RuntimeError with the name of another learner that has died, if there is one.

        The crash of this one may mean only that it has lost the other.
        """
        for other in self.pool.role("learner"):
            if other is not handle:
                other.process.join(0.3)
                if other.process.exitcode:
                    self.restart(other)


class Checkpoints:
    """Orders checkpoints from the learners, completes them, and restores a run from one."""

    def __init__(self, cfg: Config, pool: WorkerPool, scheduler: Scheduler, recorder: Recorder):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.pool = pool
        self.scheduler = scheduler
        self.recorder = recorder
        self.pending: dict[str, checkpoint.State] = {}   # folder -> the parent's part
        self.saved = ""                                  # the newest complete checkpoint
        self.failed = False                              # the last one could not be written

    def order(self) -> None:
        """Have the learners write their part.

        The parent's part is what is known now, of the version that is being saved.
        """
        state = checkpoint.State(version=self.scheduler.version, prompts=self.scheduler.prompts,
                                 tickets=self.scheduler.untrained(),
                                 counters=self.recorder.account.counters())
        try:
            partial = checkpoint.unsealed(self.out / "checkpoints", state.version)
        except OSError as e:
            self.fail(str(e))
            return
        self.pending[str(partial)] = state
        self.pool.broadcast("learner", "checkpoint", str(partial))

    def written(self, folder: str, version: int, why: str) -> None:
        """The learner has written a folder, or failed to, and then `why` says the reason.

        The checkpoint before stays, whatever went wrong. RuntimeError if it was the student.
        """
        partial = Path(folder)
        state = self.pending.pop(folder, None)
        if state is None:                                # the student's folder, at the end
            if why:
                raise RuntimeError(f"the student could not be saved in {partial}: {why}")
            return
        try:
            if self.recorder.waiting and not why:
                why = "the log waits for room on the disk"       # and may not end before it
            if version == state.version and not why:     # else the learner was a step ahead
                self.saved = str(checkpoint.seal(partial, state, self.cfg.faults.keep))
        except checkpoint.UNWRITABLE as e:
            why = str(e)
        shutil.rmtree(partial, ignore_errors=True)
        if why:
            self.fail(why)

    def fail(self, why: str) -> None:
        self.failed = True
        step = self.scheduler.version
        self.recorder.warn(f"no checkpoint at step {step}: {why}; the last one is "
                           f"{self.saved or 'none'}", what="unsaved", step=step, why=why)

    def restore(self, folder: Path) -> None:
        """Let the run go on from a checkpoint; later ones and later lines of the log are
        removed.
        """
        state = checkpoint.read(folder)
        checkpoint.clear(folder.parent, state.version)
        lines = rewind(self.out / "log.jsonl", state.version)
        self.recorder.account.resume(state.counters, lines)
        self.scheduler.resume(state.version, state.prompts, state.tickets)
        self.saved = str(folder)

    def save_now(self, hear: Callable[[], None]) -> str:
        """Abandon the step and save, however long it takes. `hear` waits for reports.

        Returns the newest checkpoint; "" if there is none.
        """
        first = self.pool.role("learner")[:1]
        if not first or not first[0].ready or first[0].stopped:
            return self.saved
        first[0].hurry()
        self.failed = False
        if self.unsaved():
            self.recorder.log.say("interrupted, writing a checkpoint; a second interrupt ends the "
                                  "run at once")
        while self.unsaved() and not self.failed:
            if not self.pending:
                self.order()
            hear()
        return self.saved

    def unsaved(self) -> bool:
        """Is there a step after the newest checkpoint?"""
        version = self.scheduler.version
        return version > 0 and self.saved != str(self.out / "checkpoints" / f"step-{version}")

    def close(self) -> None:
        """Remove what was not completed."""
        for partial in self.pending:
            shutil.rmtree(partial, ignore_errors=True)

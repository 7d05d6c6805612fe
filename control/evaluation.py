"""
Evaluation: who is asked for answers, and who grades them.

A rollout worker answers the held-out prompts under its newest weights, and a teacher worker
answers them once. The answers are graded in a thread, so that the run goes on. Answers that an
extension wants graded, to training prompts, take the same way.

What is left out: grading itself (data/graders.py); how answers are generated (rollout.py,
teacher.py). Tests: tests/test_evaluation.py
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch.multiprocessing

from control.preflight import Grade, Job
from data.graders import summary
from record.recorder import Recorder
from transport.process import WorkerHandle, WorkerPool

Texts = list[list[str]]                  # [n][k]: k answers to each of n prompts
Right = list[list[bool]]                 # the same, graded
Answers = list[list[list[int]]]          # the same, as token ids


class Grading(threading.Thread):
    """Grades answers. Its end `done` becomes readable afterwards; `outcome` is None if it
    failed.
    """

    def __init__(self, grade: Grade, answers: Answers, step: int,
                 use: Callable[[Texts, Right], None]):
        """`use` is what the parent does with the outcome, in its own thread."""
        super().__init__(daemon=True)
        self.grade = grade
        self.answers = answers
        self.step = step
        self.use = use
        self.outcome: tuple[Texts, Right] | None = None
        self.done, self.end = torch.multiprocessing.Pipe(duplex=False)

    def run(self) -> None:
        try:
            self.outcome = self.grade(self.answers)
        finally:
            self.end.send(None)


class Evaluation:
    """Asks for answers, has them graded, writes the result."""

    def __init__(self, job: Job, pool: WorkerPool, recorder: Recorder):
        self.job = job
        self.pool = pool
        self.recorder = recorder
        self.asked: set[str] = set()                     # workers that have not answered yet
        self.answered_versions: set[int] = set()         # of the student, graded or about to be
        self.wanted = -1       # a later version to evaluate, once the worker has answered
        self.gradings: dict[Connection, Grading] = {}    # by the pipe that tells of their end

    @property
    def pipes(self) -> list[Connection]:
        """Where the end of a grading shows."""
        return list(self.gradings)

    @property
    def pending(self) -> bool:
        return bool(self.asked or self.gradings)

    def ask_student(self, version: int) -> None:
        """Ask the first rollout worker, unless this version was evaluated already, before a
        resumption for example. A worker that still answers is asked again afterwards."""
        known = ("student", version) in self.recorder.account.accuracy
        if known or version in self.answered_versions:
            return
        handle = self.pool.role("rollout")[0]
        if handle.name in self.asked:
            self.wanted = version
        self.ask(handle)

    def ask_teacher(self) -> None:
        self.ask(self.pool.role("teacher")[0])

    def ask(self, handle: WorkerHandle) -> None:
        """Ask for answers, unless the worker still has some to give."""
        if self.job.eval_prompts and handle.name not in self.asked:
            self.asked.add(handle.name)
            handle.send("evaluate")

    def ask_again(self, handle: WorkerHandle) -> None:
        """Repeat the question to the successor of a worker that has died."""
        if handle.name in self.asked:
            handle.send("evaluate")

    def answered(self, handle: WorkerHandle, body: dict) -> None:
        """Answers to the held-out prompts have arrived: k in a row for each."""
        self.asked.discard(handle.name)
        who = "student"
        step = body.get("version", 0)                    # a teacher has no versions
        if handle.role == "teacher":
            who = "teacher"
            step = 0
        else:
            self.answered_versions.add(step)
            if self.wanted > step:
                self.ask(handle)
            self.wanted = -1
        answers = body["answers"]
        k = len(answers) // len(self.job.eval_prompts)
        by_prompt = [answers[i:i + k] for i in range(0, len(answers), k)]
        self.start(self.job.grade, by_prompt, step, partial(self.record, who, step))

    def validate(self, answers: list[list[int]], step: int) -> None:
        """Answers of the learner, one to each validation prompt. It waits for their grades."""
        self.start(self.job.grade_validation, [[a] for a in answers], step, self.send_share)

    def start(self, grade: Grade, answers: Answers, step: int,
              use: Callable[[Texts, Right], None]) -> None:
        grading = Grading(grade, answers, step, use)
        self.gradings[grading.done] = grading
        grading.start()

    def finish_grading(self, pipe: Connection) -> None:
        """The grading behind this pipe has ended. RuntimeError if it failed."""
        grading = self.gradings.pop(pipe)
        if grading.outcome is None:
            raise RuntimeError(f"grading the answers of step {grading.step} failed")
        grading.use(*grading.outcome)

    def record(self, who: str, step: int, texts: Texts, right: Right) -> None:
        """Write an evaluation."""
        answered = list(zip(self.job.eval_rows, texts, right))
        self.recorder.evaluation(step, who, summary(right), answered)

    def send_share(self, texts: Texts, right: Right) -> None:
        """Send the share of right answers to the learners."""
        share = sum(verdicts[0] for verdicts in right) / len(right)
        self.pool.broadcast("learner", "validation_share", share)

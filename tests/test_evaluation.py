"""Who is asked for answers, and how they are graded while the run goes on."""
import threading
from types import SimpleNamespace

import pytest

from control.evaluation import Evaluation, Grading


class Worker:
    """Remembers what it was sent."""

    def __init__(self, role: str):
        self.role = role
        self.name = f"{role}0"
        self.orders = []

    def send(self, order, body=None):
        self.orders.append((order, body))


class Pool:
    def __init__(self, *workers):
        self.workers = workers

    def role(self, role):
        return [w for w in self.workers if w.role == role]

    def broadcast(self, role, order, body=None):
        for w in self.role(role):
            w.send(order, body)


def evaluation(grade=None):
    """An evaluation of two prompts, and what it records."""
    job = SimpleNamespace(eval_prompts=[[1], [2]], eval_rows=["row 1", "row 2"], grade=grade, grade_validation=grade)
    records = []
    recorder = SimpleNamespace(account=SimpleNamespace(accuracy={}), evaluation=lambda *record: records.append(record))
    return Evaluation(job, Pool(Worker("rollout"), Worker("teacher"), Worker("learner")), recorder), records


def finish(e: Evaluation) -> None:
    pipe, = e.pipes
    assert pipe.poll(10)
    e.finish_grading(pipe)


def right_if_even(answers):
    return [[str(a) for a in k] for k in answers], [[sum(a) % 2 == 0 for a in k] for k in answers]


def test_answers_are_graded_while_the_run_goes_on_and_a_grader_that_fails_is_noticed(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    go = threading.Event()
    slow = Grading(lambda answers: go.wait(10) and ([["text"]], [[True]]), [[[1]]], 3, lambda texts, right: None)
    broken = Grading(lambda answers: answers[1], [], 3, lambda texts, right: None)
    for grading in (slow, broken):
        grading.start()
    assert not slow.done.poll(0.05) and slow.outcome is None, "nobody waited"
    go.set()
    assert slow.done.poll(10) and slow.outcome == ([["text"]], [[True]])
    assert broken.done.poll(10) and broken.outcome is None
    broken.join()
    assert failed[0].exc_type is IndexError


def test_a_failed_grading_ends_the_run_with_its_step(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    e, _ = evaluation(lambda answers: answers[9])
    e.answered(e.pool.workers[0], {"version": 7, "answers": [[1], [2]]})
    with pytest.raises(RuntimeError, match="step 7"):
        finish(e)


def test_a_version_is_evaluated_once_and_a_successor_is_asked_again():
    e, records = evaluation(right_if_even)
    rollout = e.pool.workers[0]
    e.ask_student(4)
    e.ask_student(4)
    assert rollout.orders == [("evaluate", None)] and e.pending
    successor = Worker("rollout")
    e.ask_again(successor)
    assert successor.orders == [("evaluate", None)]
    e.answered(successor, {"version": 4, "answers": [[2], [3], [4], [6]]})       # two to each prompt
    finish(e)
    assert not e.pending
    (step, who, summary, answered), = records
    assert (step, who, summary["accuracy"]) == (4, "student", 0.75)
    assert answered[0] == ("row 1", ["[2]", "[3]"], [True, False])
    e.recorder.account.accuracy["student", 4] = 0.75
    e.ask_student(4)
    assert rollout.orders == [("evaluate", None)], "it is in the log"
    e.ask_again(successor)
    assert successor.orders == [("evaluate", None)], "it has answered"


def test_a_version_that_is_due_during_an_answer_is_evaluated_after_it_and_none_twice():
    """--eval.every 1 of three steps that are faster than an evaluation: 0, 1, 2, 3."""
    e, _ = evaluation(right_if_even)
    rollout = e.pool.workers[0]

    def answer(version):
        e.answered(rollout, {"version": version, "answers": [[2], [3]]})

    e.ask_student(0)
    answer(0)
    e.ask_student(1)
    e.ask_student(2)                       # it still answers for version 1
    answer(1)
    assert len(rollout.orders) == 3 and e.asked == {"rollout0"}
    e.ask_student(3)
    answer(3)                              # it has loaded the newest version, which covers 2 and 3
    assert len(rollout.orders) == 3 and not e.asked
    e.ask_student(3)
    assert len(rollout.orders) == 3, "at the end: version 3 is answered, though perhaps not graded yet"


def test_the_teacher_is_recorded_at_step_0():
    e, records = evaluation(right_if_even)
    e.ask_teacher()
    e.answered(e.pool.workers[1], {"answers": [[2], [3]]})
    finish(e)
    assert [(step, who, s["k"]) for step, who, s, _ in records] == [(0, "teacher", 1)]


def test_the_learner_gets_the_share_of_right_answers_and_the_log_nothing():
    e, records = evaluation(right_if_even)
    e.validate([[2], [3], [4], [5]], step=3)
    finish(e)
    assert e.pool.workers[2].orders == [("validation_share", 0.5)] and not records

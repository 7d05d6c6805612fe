"""The toy and tasks from files: rows to train on, rows to evaluate on, answers."""
import json
import random

import pytest

from data import tasks, toy


def test_the_toys_worked_solution_is_right_and_graded_right():
    for i in range(200):
        row, solution = toy.toy_row(random.Random(i))
        a, b = map(int, row.prompt.rstrip("=").split("+"))
        assert row.answer == str(a + b) and toy.toy_grade(solution, row.answer)
        steps, carry = solution.split(";")[0].split(","), 0
        for step in steps:
            left, total = step.split("=")
            x, y, c = map(int, left.split("+"))
            assert c == carry and x + y + c == int(total)
            carry = int(total) // 10
    assert not toy.toy_grade("8+7+0=15;126", "125") and not toy.toy_grade("", "125")


def test_the_toys_evaluation_rows_are_not_trained_on():
    task = tasks.load_task("toy", eval_n=50)
    evaluated = {r.prompt for r in task.eval}
    assert len(task.eval) == 50 and not evaluated & {r.prompt for r in task.train}


def test_the_toys_tokenizer_reads_and_writes_every_symbol():
    tokenizer = toy.toy_tokenizer()
    text = toy.SYMBOLS
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) == len(set(ids)) and tokenizer.decode(ids) == text


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_rows_come_from_a_file_under_the_given_keys(tmp_path):
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(30)]
    name = write(tmp_path / "t.jsonl", rows)
    task = tasks.load_task(name, prompt_key="question", eval_n=200)
    assert len(task.train) == 27 and [r.prompt for r in task.eval] == ["q27", "q28", "q29"]


def test_rows_without_an_answer_are_trained_on_and_not_graded(tmp_path):
    name = write(tmp_path / "t.jsonl", [{"prompt": "a"}] * 20)
    task = tasks.load_task(name)
    assert len(task.train) == 20 and task.eval == []
    rows = [{"prompt": f"q{i}", "answer": "1" if i % 2 else None} for i in range(40)]
    task = tasks.load_task(write(tmp_path / "m.jsonl", rows))
    assert [r.prompt for r in task.eval] == ["q37", "q39"]
    assert len(task.train) == 38, "none is lost"


def test_rows_of_the_evaluation_are_not_trained_on(tmp_path):
    train = write(tmp_path / "t.jsonl", [{"prompt": f"q{i}", "answer": "1"} for i in range(10)])
    held = write(tmp_path / "e.jsonl", [{"prompt": f"q{i}", "answer": "1"} for i in range(8, 12)])
    task = tasks.load_task(train, eval_name=held)
    assert [r.prompt for r in task.train] == [f"q{i}" for i in range(8)] and len(task.eval) == 4
    with pytest.raises(ValueError, match="none is left to train on"):
        tasks.load_task(train, eval_name=train)


def test_the_filter_applies_to_the_rows_to_train_on_only(tmp_path):
    rows = [{"prompt": f"q{i}", "level": i, "answer": "1"} for i in range(10)]
    train = write(tmp_path / "t.jsonl", rows)
    held = write(tmp_path / "e.jsonl", [{"prompt": "e", "answer": "1"}])
    task = tasks.load_task(train, eval_name=held, filter="level>=4 and level!=9")
    assert [r.prompt for r in task.train] == ["q4", "q5", "q6", "q7", "q8"]
    assert [r.prompt for r in task.eval] == ["e"]

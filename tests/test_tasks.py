"""Prompts, answers, order and grading."""
import json
import random

import pytest

import tasks


def test_the_toys_worked_solution_is_right_and_graded_right():
    for i in range(200):
        row, solution = tasks.toy_row(random.Random(i))
        a, b = map(int, row.prompt.rstrip("=").split("+"))
        assert row.answer == str(a + b) and tasks.toy_grade(solution, row.answer)
        steps, carry = solution.split(";")[0].split(","), 0
        for step in steps:
            left, total = step.split("=")
            x, y, c = map(int, left.split("+"))
            assert c == carry and x + y + c == int(total)
            carry = int(total) // 10
    assert not tasks.toy_grade("8+7+0=15;126", "125") and not tasks.toy_grade("", "125")


def test_the_toys_evaluation_rows_are_not_trained_on():
    task = tasks.load_task("toy", eval_n=50)
    assert len(task.eval) == 50 and not {r.prompt for r in task.eval} & {r.prompt for r in task.train}


def test_the_toys_tokenizer_reads_and_writes_every_symbol():
    tokenizer = tasks.toy_tokenizer()
    text = tasks.SYMBOLS
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) == len(set(ids)) and tokenizer.decode(ids) == text


def test_every_epoch_hands_out_every_prompt_once_in_an_order_of_its_own():
    epochs = [[tasks.prompt_number(uid, 7, seed=3) for uid in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    assert epochs[0] == [tasks.prompt_number(uid, 7, seed=3) for uid in range(7)], "the order is a function of the seed"
    assert epochs[0] != [tasks.prompt_number(uid, 7, seed=4) for uid in range(7)]


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_rows_come_from_a_file_with_keys_of_ones_own(tmp_path):
    name = write(tmp_path / "t.jsonl", [{"question": f"q{i}", "answer": str(i)} for i in range(30)])
    task = tasks.load_task(name, prompt_key="question", eval_n=200)
    assert len(task.train) == 27 and [r.prompt for r in task.eval] == ["q27", "q28", "q29"]


def test_rows_without_an_answer_are_trained_on_and_not_graded(tmp_path):
    name = write(tmp_path / "t.jsonl", [{"prompt": "a"}] * 20)
    task = tasks.load_task(name)
    assert task.train and task.eval == []


@pytest.mark.parametrize("lines, complaint", [
    ([{"prompt": "a"}, "{not json"], ":2: not JSON"),
    ([{"prompt": "a"}, {"text": "b"}], ":2: no text under --prompt-key 'prompt' .there is: text"),
    ([{"prompt": 3}], ":1: no text"),
    (["[1, 2]"], ":1: no text"),
    ([], "holds no rows"),
])
def test_a_bad_file_is_refused_with_its_line(tmp_path, lines, complaint):
    with pytest.raises(ValueError, match=complaint):
        tasks.load_task(write(tmp_path / "t.jsonl", lines))


@pytest.mark.parametrize("text, answer, right", [
    ("so it is 72", "#### 72", True), ("#### 72", "48/2 = 24\n#### 72", True), ("#### 72.0", "72", True),
    (r"thus \boxed{72}", "72", True), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True), ("$1,234", "1234", True),
    ("the answer is 71", "72", False), ("", "72", False), ("72 or 73", "72", False), ("####", "72", False),
    ("-5", "5", False), ("no number", "", False),
])
def test_final_answers_are_compared_as_numbers_or_text(text, answer, right):
    assert tasks.grade_final(text, answer) is right

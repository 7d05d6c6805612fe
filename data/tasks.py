"""
A task: rows to train on, rows to evaluate on, and a grader that says whether a text answers a row.

    toy                      additions of 2 and 3 digits, made here (data/toy.py); nothing is downloaded
    FILE.jsonl, FILE.parquet a row a line, or a table; keys by --prompt-key and --answer-key
    hf:NAME[:CONFIG][:SPLIT] a dataset of the Hugging Face hub or in a folder, through `datasets`
What is left out: tools, several turns, reward models. Distillation needs prompts; answers are only for the evaluation.
Tests: tests/test_tasks.py
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from data.graders import MathGrader
from data.prompts import Row, read_rows
from data.toy import toy_grade, toy_row


@dataclass(frozen=True)
class Task:
    train: list[Row]
    eval: list[Row]                        # graded rows only, whose prompts are not in `train`
    grade: Callable[[str, str], bool]      # (response text, answer) -> correct?


def load_task(name: str, *, prompt_key="prompt", answer_key="answer", filter="", eval_name="", eval_n=200) -> Task:
    """The task called `name`, of the rows that pass the filter; `eval_name` is read as it is. Raises ValueError."""
    if name == "toy":
        if filter:
            raise ValueError(f"--filter {filter!r}: the toy's rows have no keys to filter by")
        return toy_task(eval_n)
    train = read_rows(name, prompt_key, answer_key, filter)
    if eval_name:
        held_out = read_rows(eval_name, prompt_key, answer_key)
    else:                                  # hold out the end of the rows, at most a tenth of them
        split = len(train) - min(eval_n, len(train) // 10)
        train, held_out = train[:split] + [r for r in train[split:] if not r.answer], train[split:]
    held_out = [r for r in held_out if r.answer][:eval_n]
    seen = {r.prompt for r in held_out}
    kept = [r for r in train if r.prompt not in seen]
    if not kept:
        raise ValueError(f"{name}: every prompt is evaluated on, none is left to train on (another --eval-task, or a "
                         f"lower --eval-n)")
    return Task(kept, held_out, MathGrader())


def toy_task(eval_n: int) -> Task:
    held_out = [toy_row(random.Random(f"eval-{i}"))[0] for i in range(eval_n)]
    seen = {row.prompt for row in held_out}
    train = [toy_row(random.Random(f"train-{i}"))[0] for i in range(20_000)]
    return Task([row for row in train if row.prompt not in seen], held_out, toy_grade)

"""
A task: rows to train on, rows to evaluate on, and a grader that says whether a text answers a row.

    toy                      additions of 2 and 3 digits, made here (data/toy.py); no download
    FILE.jsonl               one row per line; the keys are set by --data.prompt-key and --data.answer-key
    FILE.parquet             a table, with the same keys
    hf:NAME[:CONFIG][:SPLIT] a data set of the Hugging Face hub or in a folder, through `datasets`

Distillation needs prompts only; answers are for the evaluation. Left out: tools, several turns,
reward models. Tests: tests/test_tasks.py
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
    eval: list[Row]                        # rows with an answer whose prompts are not in `train`
    grade: Callable[[str, str], bool]      # (response text, answer) -> is it right?


def load_task(name: str, *, prompt_key: str = "prompt", answer_key: str = "answer",
              filter: str = "", eval_name: str = "", eval_n: int = 200) -> Task:
    """The task called `name`, with at most eval_n rows to evaluate on.

    These come from `eval_name` or, without one, from the end of the rows. `filter` applies to the
    rows of `name` only. Raises ValueError if a file cannot be read or no row is left to train on.
    """
    if name == "toy":
        if filter:
            raise ValueError(f"--data.filter {filter!r}: the toy's rows have no keys to filter by")
        return toy_task(eval_n)
    train = read_rows(name, prompt_key, answer_key, filter)
    if eval_name:
        held_out = read_rows(eval_name, prompt_key, answer_key)
    else:
        train, held_out = split_off_the_end(train, eval_n)
    evaluated = [row for row in held_out if row.answer][:eval_n]
    prompts = {row.prompt for row in evaluated}
    kept = [row for row in train if row.prompt not in prompts]
    if not kept:
        raise ValueError(f"{name}: the evaluation uses every prompt, none is left to train on "
                         "(set another --data.eval-task or a lower --eval.n)")
    return Task(kept, evaluated, MathGrader())


def split_off_the_end(rows: list[Row], n: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and the last n of `rows`, at most a tenth of them, to evaluate on.

    Rows of the end that have no answer cannot be graded and are trained on as well.
    """
    start = len(rows) - min(n, len(rows) // 10)
    end = rows[start:]
    return rows[:start] + [row for row in end if not row.answer], end


def toy_task(eval_n: int) -> Task:
    held_out = [toy_row(random.Random(f"eval-{i}"))[0] for i in range(eval_n)]
    prompts = {row.prompt for row in held_out}
    train = [toy_row(random.Random(f"train-{i}"))[0] for i in range(20_000)]
    return Task([row for row in train if row.prompt not in prompts], held_out, toy_grade)

"""
Preflight, the texts: prompts to train on, rows to evaluate, rows that an extension validates with.

Tests: tests/test_job.py, tests/test_bad_input.py
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from config import Config, Data, require
from data import tasks
from data.prompts import Row, encode
from extension import Extensions
from models.loading import stop_ids

Pair = tuple[Row, list[int]]                 # a row and the token ids of its prompt
Answers = list[list[list[int]]]              # by row and answer, token ids


@dataclass(frozen=True)
class Texts:
    """The rows of a task whose prompts are neither empty nor too long."""
    train: list[Pair]
    evaluation: list[Pair]
    notes: list[str]

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt for _, prompt in self.train]

    @property
    def eval_prompts(self) -> list[list[int]]:
        return [prompt for _, prompt in self.evaluation]

    @property
    def eval_rows(self) -> list[Row]:
        return [row for row, _ in self.evaluation]


def load_task(cfg: Config) -> tasks.Task:
    """Raises ValueError where a file cannot be read, where no row is left, and where no row has
    an answer under a key that was asked for."""
    data = cfg.data
    task = tasks.load_task(cfg.task, prompt_key=data.prompt_key, answer_key=data.answer_key,
                           filter=data.filter, eval_name=data.eval_task, eval_n=cfg.eval.n)
    answered = any(row.answer for row in (*task.train, *task.eval))
    require(answered or data.answer_key == Data().answer_key,
            f"--data.answer-key {data.answer_key!r}: no row of {cfg.task} has an answer there")
    return task


def read_texts(cfg: Config, tokenizer: Any, task: tasks.Task) -> Texts:
    """Raises ValueError where no prompt fits or, with --data.long-prompts refuse, where one does
    not."""
    pairs = encoded(cfg, tokenizer, task.train)
    filled = [(row, prompt) for row, prompt in pairs if row.prompt.strip() and prompt]
    require(filled, f"--task {cfg.task}: every prompt is empty")
    train = within(cfg, filled)
    require(train, f"--max-prompt {cfg.max_prompt}: every prompt of {cfg.task} is longer")
    notes = []
    if len(filled) < len(pairs):
        notes.append(f"{len(pairs) - len(filled):,} of {len(pairs):,} prompts are empty: left out")
    if len(train) < len(filled):
        what = (f"{len(filled) - len(train):,} of {len(pairs):,} prompts are longer than "
                f"--max-prompt {cfg.max_prompt}")
        require(cfg.data.long_prompts == "skip", f"--data.long-prompts refuse: {what}")
        notes.append(f"{what}: left out")
    if cfg.data.thinking and not tokenizer.chat_template:
        notes.append("--data.thinking has no effect: --student has no chat template")
    return Texts(train, within(cfg, encoded(cfg, tokenizer, task.eval)), notes)


def encoded(cfg: Config, tokenizer: Any, rows: list[Row]) -> list[Pair]:
    """The rows with the tokens of their prompts."""
    prompts = encode(rows, tokenizer, template=cfg.data.template, suffix=cfg.data.suffix,
                     thinking=cfg.data.thinking)
    return list(zip(rows, prompts))


def within(cfg: Config, pairs: list[Pair]) -> list[Pair]:
    """Those whose prompts are neither empty nor too long."""
    return [(row, prompt) for row, prompt in pairs if 0 < len(prompt) <= cfg.max_prompt]


def validation_pairs(cfg: Config, extensions: Extensions, texts: Texts) -> list[Pair]:
    """The first training rows with an answer, as many as the extensions want to have graded."""
    if extensions.validation_rows == 0:
        return []
    answered = [(row, prompt) for row, prompt in texts.train if row.answer]
    names = ",".join(e.name for e in extensions if e.validation_rows > 0)
    require(answered, f"--extend {names}: needs rows with an answer, and no row of {cfg.task} has "
                      "one (--data.answer-key names their key)")
    return answered[:extensions.validation_rows]


def grader(cfg: Config, tokenizer: Any, task: tasks.Task,
           rows: list[Row]) -> Callable[[Answers], tuple]:
    """A function from the token ids of k answers to each of `rows` to their texts, and whether
    these are right."""
    ends = set(stop_ids(cfg.student, cfg.teacher))

    def grade(answers: Answers) -> tuple[list[list[str]], list[list[bool]]]:
        texts = [decoded(of_row) for of_row in answers]
        right = [graded(of_row, row) for of_row, row in zip(texts, rows)]
        return texts, right

    def graded(of_row: list[str], row: Row) -> list[bool]:
        return [task.grade(text, row.answer) for text in of_row]

    def decoded(of_row: list[list[int]]) -> list[str]:
        without_ends = [[token for token in answer if token not in ends] for answer in of_row]
        return tokenizer.batch_decode(without_ends, skip_special_tokens=True)

    return grade

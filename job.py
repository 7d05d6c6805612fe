"""
What a run works on: the models and texts that the flags name, checked before a process starts or a weight is loaded.

What is left out: the flags themselves (asyncopd.py), reading and grading texts (tasks.py). Tests: tests/test_cli.py
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import plan
import tasks
from estimators import ESTIMATORS
from tasks import Row
from teacher import stop_ids, vocab_size

if TYPE_CHECKING:
    from asyncopd import Config

ROOT = Path(__file__).resolve().parent


def refuse(message: str):
    """Bad input: one line that names the value and the remedy, exit code 2."""
    raise ValueError(message)


@dataclass(frozen=True)
class Job:
    """What a run works on, after every check: all that the parent knows of models and texts."""
    prompts: list[list[int]]                     # token ids
    eval_prompts: list[list[int]]
    eval_rows: list[Row]
    grade: Callable[[list[list[int]]], tuple[list[str], list[bool]]]      # answers' ids -> their texts, right or not
    layout: dict[str, torch.Size]                # the student's parameters
    probe: list[int]                             # tokens on which an engine proves a push
    hidden: int                                  # width of the teacher
    memory: tuple[list[plan.Need], dict[str, float]] = ((), {})      # what every worker takes; what is free


def prepare(cfg: Config) -> tuple[Config, Job]:
    """Models and texts, checked, without loading a weight. The toy's models are made here on first use."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    if cfg.task == "toy" and not cfg.student:
        student, teacher = tasks.toy_models(ROOT / "runs")
        cfg = replace(cfg, student=student, teacher=cfg.teacher or teacher)
    task = tasks.load_task(cfg.task, prompt_key=cfg.prompt_key, answer_key=cfg.answer_key, eval_file=cfg.eval_task,
                           eval_n=cfg.eval_n)
    for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as e:
            refuse(f"{flag} {name}: neither a model folder nor on the hub ({str(e).splitlines()[0]})")
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    same_words(tokenizer, AutoTokenizer.from_pretrained(cfg.teacher))
    prompts = [p for p in tasks.encode(task.train, tokenizer, cfg.prompt_suffix) if 0 < len(p) <= cfg.max_prompt]
    prompts or refuse(f"--max-prompt {cfg.max_prompt}: every prompt of {cfg.task} is longer")
    if len(prompts) < len(task.train):
        print(f"{len(task.train) - len(prompts):,} of {len(task.train):,} prompts left out: empty, or longer than "
              f"--max-prompt {cfg.max_prompt}")
    graded = [(row, p) for row, p in zip(task.eval, tasks.encode(task.eval, tokenizer, cfg.prompt_suffix))
              if 0 < len(p) <= cfg.max_prompt]
    for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
        room = getattr(AutoConfig.from_pretrained(name).get_text_config(), "max_position_embeddings", None)
        if room and cfg.max_prompt + cfg.max_response > room:
            refuse(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response}: more than the {room} tokens "
                   f"of {flag} {name}")
    refuse_slow_teacher(cfg)
    ends = set(stop_ids(cfg.student))

    def grade(answers: list[list[int]]) -> tuple[list[str], list[bool]]:
        texts = tokenizer.batch_decode([[t for t in a if t not in ends] for a in answers], skip_special_tokens=True)
        return texts, [task.grade(text, row.answer) for text, (row, _) in zip(texts, graded)]

    free = plan.free_gb()
    needs = plan.memory(cfg, *(plan.Shape.of(AutoConfig.from_pretrained(m)) for m in (cfg.student, cfg.teacher)),
                        free.get("gpu", 0.0))
    plan.check(needs, free)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.student))
    return replace(cfg, top_k=min(cfg.top_k, vocab_size(cfg.student), vocab_size(cfg.teacher))), Job(
        prompts=prompts, eval_prompts=[p for _, p in graded], eval_rows=[row for row, _ in graded], grade=grade,
        layout={name: p.shape for name, p in model.named_parameters()},
        probe=(prompts[0] + prompts[-1] + prompts[0])[:min(64, cfg.max_prompt + cfg.max_response)],
        hidden=AutoConfig.from_pretrained(cfg.teacher).get_text_config().hidden_size, memory=(needs, free))


def refuse_slow_teacher(cfg: Config) -> None:
    """On a CPU vLLM returns a position's best words or all of them, and these as Python numbers: a million a second."""
    few = ESTIMATORS[cfg.estimator].support in ("sampled", "teacher_topk")
    if cfg.teacher_engine == "vllm" and cfg.gpus == 0 and not few and (words := vocab_size(cfg.teacher)) > 10_000:
        refuse(f"--teacher-engine vllm: on a CPU {cfg.estimator} moves all {words:,} words of every position, a few "
               f"tokens per second (--teacher-engine hf)")


def same_words(student, teacher) -> None:
    """Distillation compares probabilities id by id: both tokenizers must give every id the same word."""
    s, t = student.get_vocab(), teacher.get_vocab()
    if s != t:
        word = next(w for w in sorted(s.keys() | t.keys(), key=lambda w: s.get(w, t.get(w))) if s.get(w) != t.get(w))
        refuse(f"--student and --teacher do not share a vocabulary: {word!r} is {s.get(word)} in the student's and "
               f"{t.get(word)} in the teacher's")

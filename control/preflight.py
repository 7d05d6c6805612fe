"""
What a run works on: the models and texts that the flags name, checked before a process starts or a weight is loaded.

What is left out: the flags themselves (asyncopd.py), reading texts (prompts.py), grading them (graders.py).
Tests: tests/test_cli.py
"""
from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from control import plan
from data import tasks, toy
from data.prompts import Row, check_same_vocabulary, check_special_tokens, encode, prompt_number
from estimators import ESTIMATORS
from extensions import oprd, rock
from extensions.effopd import PROMPTS
from models import footprint
from models.loading import stop_ids, vocab_size

if TYPE_CHECKING:
    from asyncopd import Config

ROOT = Path(__file__).resolve().parent.parent
HUB_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja"]     # beside the weights: configuration, tokenizer, template


def refuse(message: str):
    """Bad input: one line that names the value and the remedy, exit code 2."""
    raise ValueError(message)


@dataclass(frozen=True)
class Job:
    """What a run works on, after every check: all that the parent knows of models and texts."""
    prompts: list[list[int]]                     # token ids
    eval_prompts: list[list[int]]
    eval_rows: list[Row]
    grade: Callable[[list[list[list[int]]]], tuple[list[list[str]], list[list[bool]]]]   # ids of k answers to each
                                                 # of eval_prompts -> their texts, right or not
    layout: dict[str, torch.Size]                # the student's parameters
    probe: list[int]                             # tokens on which an engine proves a push
    hidden: int                                  # width of the teacher
    states: tuple[int, int] = (0, 0)             # of its states in a slot: positions, values for each
    memory: tuple[list[plan.Need], dict[str, float]] = ((), {})      # what every worker takes; what is free
    notes: tuple[str, ...] = ()                  # what a person should know before the run
    first_prompt: str = ""                       # as the models read it
    gate_prompts: list[list[int]] = ()           # of the training rows that --effopd accuracy samples and grades
    grade_gate: Callable | None = None           # like `grade`, for these


def prepare(cfg: Config) -> tuple[Config, Job]:
    """Models and texts, checked, without loading a weight. The toy's models are made here on first use."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    if cfg.task == "toy" and not cfg.student:
        student, teacher = toy.toy_models(ROOT / "runs")
        cfg = replace(cfg, student=student, teacher=cfg.teacher or teacher)
    task = tasks.load_task(cfg.task, prompt_key=cfg.prompt_key, answer_key=cfg.answer_key, filter=cfg.filter,
                           eval_name=cfg.eval_task, eval_n=cfg.eval_n)
    for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
        check_model(flag, name)
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    cfg.rock_set and rock.fixed(cfg.rock_set, tokenizer.get_vocab())
    notes = check_tokenizers(cfg, tokenizer, [row.prompt for row in task.train[:8]])
    how = dict(template=cfg.prompt_template, suffix=cfg.prompt_suffix, thinking=cfg.thinking)
    train = [(row, p) for row, p in zip(task.train, encode(task.train, tokenizer, **how))
             if 0 < len(p) <= cfg.max_prompt]
    prompts, gate = [p for _, p in train], [pair for pair in train if pair[0].answer][:PROMPTS]
    gate or cfg.effopd != "accuracy" or refuse(f"--effopd accuracy: no row of {cfg.task} has an answer (--effopd kl "
                                               "needs none)")
    prompts or refuse(f"--max-prompt {cfg.max_prompt}: every prompt of {cfg.task} is longer")
    if out := len(task.train) - len(prompts):
        what = f"{out:,} of {len(task.train):,} prompts are empty or longer than --max-prompt {cfg.max_prompt}"
        cfg.long_prompts == "skip" or refuse(f"--long-prompts refuse: {what}")
        notes.append(f"{what}: left out")
    graded = [(row, p) for row, p in zip(task.eval, encode(task.eval, tokenizer, **how))
              if 0 < len(p) <= cfg.max_prompt]
    for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
        room = getattr(AutoConfig.from_pretrained(name).get_text_config(), "max_position_embeddings", None)
        if room and cfg.max_prompt + cfg.max_response > room:
            refuse(f"--max-prompt {cfg.max_prompt} and --max-response {cfg.max_response}: more than the {room} tokens "
                   f"of {flag} {name}")
    refuse_slow_teacher(cfg)
    ends = set(stop_ids(cfg.student, cfg.teacher))

    def grade(rows: list[Row], answers: list[list[list[int]]]) -> tuple[list[list[str]], list[list[bool]]]:
        texts = [tokenizer.batch_decode([[t for t in a if t not in ends] for a in k], skip_special_tokens=True)
                 for k in answers]
        return texts, [[task.grade(text, row.answer) for text in k] for k, row in zip(texts, rows)]

    free = footprint.free_gb()
    shapes = [footprint.Shape.of(AutoConfig.from_pretrained(m)) for m in (cfg.student, cfg.teacher)]
    oprd.check(cfg, *shapes)
    notes += oprd.note(cfg, ESTIMATORS[cfg.estimator])
    own = cfg.oprd_weight or cfg.effopd == "accuracy"    # these generate in transformers, whatever --engine is
    if own and getattr(AutoConfig.from_pretrained(cfg.student).get_text_config(), "sliding_window", None):
        refuse(f"--student {cfg.student}: has a sliding window, which OPRD and --effopd accuracy would ignore")
    needs = plan.memory(cfg, *shapes, free.get("gpu", 0.0))
    plan.check(needs, free)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.student))
    learned = shapes[0].adapters(cfg.lora_rank) if cfg.lora_rank else shapes[0].P
    check_disk(cfg, shapes[0].P, learned)
    return replace(cfg, top_k=min(cfg.top_k, vocab_size(cfg.student), vocab_size(cfg.teacher))), Job(
        prompts=prompts, eval_prompts=[p for _, p in graded], eval_rows=[row for row, _ in graded],
        grade=partial(grade, [row for row, _ in graded]),
        gate_prompts=[p for _, p in gate], grade_gate=partial(grade, [row for row, _ in gate]),
        layout={name: p.shape for name, p in model.named_parameters()},
        probe=(prompts[0] + prompts[-1] + prompts[0])[:min(64, cfg.max_prompt + cfg.max_response)],
        hidden=shapes[1].H, states=oprd.shape(cfg, *shapes), memory=(needs, free),
        notes=tuple(notes), first_prompt=tokenizer.decode(prompts[prompt_number(0, len(prompts), cfg.seed)]))


def check_model(flag: str, name: str) -> None:
    """Refuse what is no model: no configuration, no tokenizer, or in a folder no whole safetensors."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoTokenizer
    try:
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)
    except Exception as e:                               # each loader has its own ways to fail on a damaged file
        refuse(f"{flag} {name}: neither a model folder nor on the hub ({type(e).__name__}: {first_line(e)})")
    words = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in words):
        refuse(f"{flag} {name}: holds no tokenizer (none of {', '.join(words)})")
    files = sorted(Path(name).glob("*.safetensors"))
    if Path(name).is_dir() and not files:
        refuse(f"{flag} {name}: holds no .safetensors (a pickle is not read: save_pretrained converts it)")
    for file in files:
        try:
            safe_open(file, "pt").keys()
        except (OSError, SafetensorError) as e:
            refuse(f"{flag} {file}: damaged ({first_line(e)})")


def fetch(cfg: Config) -> None:
    """Models of the hub, on this machine before a worker wants them: once, where a person sees it, and without a limit
    (--stall-s is for workers)."""
    from huggingface_hub import snapshot_download
    for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
        try:
            Path(name).is_dir() or snapshot_download(name, allow_patterns=["model*.safetensors", *HUB_TEXTS])
        except Exception as e:                           # of the network, of the hub, of the disk
            refuse(f"{flag} {name}: could not be downloaded ({type(e).__name__}: {first_line(e)})")


def check_disk(cfg: Config, parameters: int, learned: int) -> None:
    """Refuse a disk that cannot hold the student and, where they are asked for, its checkpoints and one more. What lies
    in --out already is among them, or goes."""
    half, kept = cfg.gpus > 0, min(cfg.keep or cfg.steps, cfg.steps // cfg.save_every) + 1 if cfg.save_every else 0
    student = parameters * (2 if half else 4)
    more = learned * (12 if half else 8)                 # AdamW's moments, float32 masters
    more += 4 * parameters if cfg.effopd else 0          # the weights before a jump
    need = student + kept * (student + more)
    there = next(p for p in (Path(cfg.out), *Path(cfg.out).absolute().parents) if p.exists())
    ours = Path(cfg.out).rglob("*") if cfg.resume or cfg.overwrite else ()
    free = shutil.disk_usage(there).free + sum(p.stat().st_size for p in ours if p.is_file())
    need < free or refuse(f"--out {cfg.out}: {need / 1e9:,.1f} GB for the student and {kept} checkpoints (--keep), "
                          f"where {free / 1e9:,.1f} are free")


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0]


def refuse_slow_teacher(cfg: Config) -> None:
    """On a CPU vLLM returns a position's best words or all of them, and these as Python numbers: a million a second."""
    few = ESTIMATORS[cfg.estimator].support in ("sampled", "teacher_topk")
    if cfg.teacher_engine == "vllm" and cfg.gpus == 0 and not few and (words := vocab_size(cfg.teacher)) > 10_000:
        refuse(f"--teacher-engine vllm: on a CPU {cfg.estimator} moves all {words:,} words of every position, a few "
               f"tokens per second (--teacher-engine hf)")


def check_tokenizers(cfg: Config, ours, texts: list[str]) -> list[str]:
    """Refuse models that cannot be compared word by word; what a person should know of the two, a line each."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(cfg.teacher)
    check_same_vocabulary(ours, theirs, texts)
    notes, words = [], max(ours.get_vocab().values()) + 1
    rows = {"student": vocab_size(cfg.student), "teacher": vocab_size(cfg.teacher)}
    for role, n in rows.items():
        n >= words or refuse(f"--{role} {getattr(cfg, role)}: its head has {n:,} rows for {words:,} words")
    if len(set(rows.values())) > 1:
        notes.append(f"{words:,} words in {rows['student']:,} rows of the student and {rows['teacher']:,} of the "
                     "teacher: the others are padding")
    return notes + check_special_tokens(ours, theirs, (stop_ids(cfg.student), stop_ids(cfg.teacher)))

"""
Preflight, the models: folders and hub names, tokenizers, lengths, downloads. No weight is loaded.

Tests: tests/test_job.py, tests/test_bad_input.py
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config, require
from control.command_line import Given
from data.prompts import check_same_vocabulary, check_special_tokens
from engines.table import CPU_HEAD_SIZES
from estimators import ESTIMATORS
from models.footprint import Shape
from models.loading import stop_ids, text_config, vocab_size

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
                   "vocab.txt")
DOWNLOADED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
SLOW_WORDS = 10_000          # a larger vocabulary is too slow in vLLM on a CPU


def named_models(cfg: Config) -> tuple[tuple[str, str], tuple[str, str]]:
    """(flag, folder or hub name) of the student and of the teacher."""
    return ("--student", cfg.student), ("--teacher", cfg.teacher)


def check_models(cfg: Config, texts: list[str]) -> tuple[Any, list[str]]:
    """The student's tokenizer, and notes on the two models. Both must encode `texts` alike."""
    from transformers import AutoTokenizer
    for flag, name in named_models(cfg):
        check_model(flag, name)
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    return tokenizer, check_tokenizers(cfg, tokenizer, texts)


def check_model(flag: str, name: str) -> None:
    """Refuse a name without configuration or tokenizer, and a folder without whole weights."""
    from transformers import AutoConfig, AutoTokenizer
    try:
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)
    except Exception as e:                       # each loader fails in its own ways
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise ValueError(f"{flag} {name}: neither a model folder nor on the hub "
                         f"({reason})") from None
    if Path(name).is_dir():
        check_folder(flag, Path(name))


def check_folder(flag: str, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open
    require(any((folder / file).exists() for file in TOKENIZER_FILES),
            f"{flag} {folder}: holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    files = sorted(folder.glob("*.safetensors"))
    require(files, f"{flag} {folder}: holds no .safetensors (a pickle is not read: "
                   "save_pretrained converts it)")
    for file in files:
        try:
            safe_open(file, "pt").keys()
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{flag} {file}: damaged ({first_line(e)})") from None


def check_tokenizers(cfg: Config, ours: Any, texts: list[str]) -> list[str]:
    """Refuse models that cannot be compared word by word; notes on how their words differ."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(cfg.teacher)
    check_same_vocabulary(ours, theirs, texts)
    words = max(ours.get_vocab().values()) + 1
    rows = {"student": vocab_size(cfg.student), "teacher": vocab_size(cfg.teacher)}
    for role, n in rows.items():
        require(n >= words,
                f"--{role} {getattr(cfg, role)}: its head has {n:,} rows for {words:,} words")
    notes = []
    if rows["student"] != rows["teacher"]:
        notes.append(f"{words:,} words in {rows['student']:,} rows of the student and "
                     f"{rows['teacher']:,} of the teacher: the others are padding")
    ends = (stop_ids(cfg.student), stop_ids(cfg.teacher))
    return notes + check_special_tokens(ours, theirs, ends)


def fit_models(cfg: Config, given: Given) -> tuple[Config, list[str]]:
    """Lengths that the models have positions for, and numbers of words that they have; notes."""
    room = positions(cfg, text_config(cfg.student), text_config(cfg.teacher))
    cfg, notes = fit_lengths(cfg, given, room)
    words = min(vocab_size(cfg.student), vocab_size(cfg.teacher))
    if cfg.top_k > words:
        if "top_k" in given:
            notes.append(f"--top-k {cfg.top_k}: as many as there are words, {words:,}")
        cfg = replace(cfg, top_k=words)
    if cfg.draws == "optimal" and cfg.mc_samples > words:        # all of them are kept
        cfg = replace(cfg, mc_samples=words)
    return cfg, notes


def positions(cfg: Config, student: Any, teacher: Any) -> dict[str, int | None]:
    """How many tokens of prompt and response either model takes, by flag and name; None where its
    configuration does not say.
    """
    room = {f"--student {cfg.student}": getattr(student, "max_position_embeddings", None)}
    of_teacher = getattr(teacher, "max_position_embeddings", None)
    if of_teacher and cfg.teacher_engine == "vllm":      # draws a token after every text that it scores
        room[f"--teacher {cfg.teacher} in vLLM"] = of_teacher - 1
    else:
        room[f"--teacher {cfg.teacher}"] = of_teacher
    return room


def fit_lengths(cfg: Config, given: Given,
                room: Mapping[str, int | None]) -> tuple[Config, list[str]]:
    """Lengths that were not given, made to fit where their defaults do not: a quarter of the
    positions for the prompt, as far as it is not given, and the rest for the response.

    `room`: the positions of both models, by flag. Returns notes too. Raises ValueError where
    lengths that were given do not fit.
    """
    fitted = cfg
    least = min((n for n in room.values() if n), default=None)
    if least is not None and cfg.max_prompt + cfg.max_response > least:
        prompt, response = cfg.max_prompt, cfg.max_response
        if "max_prompt" not in given and "max_response" not in given:
            prompt = min(prompt, least // 4)
        elif "max_prompt" not in given:
            prompt = max(1, least - response)
        if "max_response" not in given:
            response = max(1, min(response, least - prompt))
        fitted = replace(cfg, max_prompt=prompt, max_response=response)
    for flag, n in room.items():
        require(not n or fitted.max_prompt + fitted.max_response <= n,
                f"--max-prompt {fitted.max_prompt} and --max-response {fitted.max_response}: more "
                f"than the {n} tokens of {flag}")
    if fitted == cfg:
        return cfg, []
    return fitted, [f"--max-prompt {fitted.max_prompt} and --max-response {fitted.max_response}: "
                    f"the models take {least} tokens of both together"]


def check_slow_teacher(cfg: Config) -> None:
    """On a CPU vLLM returns a position's best words, or all of them as Python numbers, a million
    a second."""
    few = ESTIMATORS[cfg.estimator].support in ("sampled", "teacher_topk")
    if cfg.teacher_engine != "vllm" or cfg.gpus > 0 or few:
        return
    words = vocab_size(cfg.teacher)
    require(words <= SLOW_WORDS,
            f"--teacher-engine vllm: on a CPU {cfg.estimator} moves all {words:,} words of every "
            "position, a few tokens per second (--teacher-engine hf)")


def check_head_size(cfg: Config) -> None:
    """On a CPU vLLM computes attention for some widths of a head only, and would say so at the
    first token."""
    if cfg.gpus > 0:
        return
    for flag, engine, role, name in (("--engine", cfg.engine, "--student", cfg.student),
                                     ("--teacher-engine", cfg.teacher_engine, "--teacher",
                                      cfg.teacher)):
        width = head_size(name)
        require(engine != "vllm" or width in CPU_HEAD_SIZES,
                f"{flag} vllm: on a CPU it needs attention heads of a width among "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}, and those of {role} {name} are {width} "
                f"wide ({flag} hf)")


def head_size(name: str) -> int:
    """Width of an attention head."""
    config = text_config(name)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shape_of(name: str) -> Shape:
    from transformers import AutoConfig
    return Shape.of(AutoConfig.from_pretrained(name))


def fetch(cfg: Config) -> None:
    """Download models of the hub before a worker needs them: once, where a person sees it, and
    without a time limit (--faults.stall-s is for workers)."""
    from huggingface_hub import snapshot_download
    for flag, name in named_models(cfg):
        if Path(name).is_dir():
            continue
        try:
            snapshot_download(name, allow_patterns=list(DOWNLOADED))
        except Exception as e:                   # of the network, of the hub, of the disk
            reason = f"{type(e).__name__}: {first_line(e)}"
            raise ValueError(f"{flag} {name}: could not be downloaded ({reason})") from None


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [""])[0]

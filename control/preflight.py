"""
Everything that is checked before a process starts and a weight is loaded. The result is a `Job`.

Here is the order of the checks; each subject has a file of its own:

    preflight_gpu.py        that GPUs and a compiler can be used
    preflight_models.py     models, tokenizers, lengths, downloads
    preflight_prompts.py    prompts, evaluation rows, grading
    preflight_memory.py     memory and disk

Bad input is a ValueError. What is left out: the flags by themselves (resolve.py); the run folder
(record/run_folder.py).
Tests: tests/test_job.py, tests/test_bad_input.py
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from config import Config, require
from control import no_effect, plan
from control.command_line import NOTHING, Given
from control.estimate import fit_split
from control.preflight_gpu import check_gpus
from control.preflight_memory import check_disk, check_memory
from control.preflight_models import (
    check_head_size,
    check_models,
    check_slow_teacher,
    fit_models,
    shape_of,
)
from control.preflight_prompts import grader, load_task, read_texts, validation_pairs
from data import toy
from data.prompts import Row, prompt_number
from extension import Extension, Extensions, ModelPair, SlotTensor, prepared_file
from models.footprint import free_gb
from models.loading import text_config
from record.metrics import METRICS
from transport.process import alone

ROOT = Path(__file__).resolve().parent.parent
Grade = Callable[[list[list[list[int]]]], tuple[list[list[str]], list[list[bool]]]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run works on, after every check: all that the parent knows of models and texts."""
    prompts: list[list[int]]                     # token ids
    eval_prompts: list[list[int]]
    eval_rows: list[Row]
    grade: Grade                                 # of k answers to each of eval_prompts
    layout: dict[str, torch.Size]                # the student's parameters
    probe: list[int]                             # tokens that prove that new weights have arrived
    hidden: int                                  # width of the teacher
    # of the extensions: tensors of every slot, tensors in shared memory, keys of a step line
    slot_tensors: dict[str, SlotTensor] = field(default_factory=dict)
    shared_tensors: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    memory: tuple[list[plan.Need], dict[str, float]] = ((), {})      # by worker; free by device
    notes: tuple[str, ...] = ()                  # what a person should know before the run
    first_prompt: str = ""                       # as the models read it
    # answered by an extension, graded by the parent
    validation_prompts: list[list[int]] = field(default_factory=list)
    grade_validation: Grade | None = None


def prepare(cfg: Config, given: Given = NOTHING) -> tuple[Config, Job]:
    """Check models and texts without loading a weight. The toy's models are made on first use.

    Returns the flags, with the folders of the toy, with lengths that fit and with a top_k that
    both vocabularies allow, and the job. Raises ValueError.
    """
    check_gpus(cfg)
    cfg = with_toy_models(cfg)
    task = load_task(cfg)
    tokenizer, model_notes = check_models(cfg, [row.prompt for row in task.train[:8]])
    cfg, fit_notes = fit_models(cfg, given)
    texts = read_texts(cfg, tokenizer, task)
    check_slow_teacher(cfg)
    check_head_size(cfg)
    models = ModelPair(student=shape_of(cfg.student), teacher=shape_of(cfg.teacher),
                       student_config=text_config(cfg.student),
                       teacher_config=text_config(cfg.teacher))
    free = free_gb()
    cfg, split_notes = fit_split(cfg, given, models, free, free.get("gpu", 0.0))
    extensions = Extensions.load(cfg)
    extension_notes = extensions.check(models)
    check_teacher_states(cfg, extensions)
    check_metrics(cfg, extensions)
    validation = validation_pairs(cfg, extensions, texts)
    added = plan.additions(cfg, extensions, models)
    memory = check_memory(cfg, models, added)
    check_disk(cfg, models.student, added)
    first = prompt_number(0, len(texts.prompts), cfg.seed)
    return cfg, Job(
        prompts=texts.prompts,
        eval_prompts=texts.eval_prompts,
        eval_rows=texts.eval_rows,
        grade=grader(cfg, tokenizer, task, texts.eval_rows),
        layout=student_layout(cfg.student),
        probe=probe_tokens(texts.prompts, limit=cfg.max_prompt + cfg.max_response),
        hidden=models.teacher.H,
        slot_tensors=dict(added.slot_tensors),
        shared_tensors=extensions.shared_tensors(models),
        metrics=extensions.metrics,
        memory=memory,
        notes=(*no_effect.notes(cfg, given), *model_notes, *fit_notes, *texts.notes,
               *split_notes, *extension_notes),
        first_prompt=tokenizer.decode(texts.prompts[first]),
        validation_prompts=[prompt for _, prompt in validation],
        grade_validation=grader(cfg, tokenizer, task, [row for row, _ in validation]))


def with_toy_models(cfg: Config) -> Config:
    """--task toy brings its own student, and its own teacher unless one is given."""
    if cfg.task != "toy" or cfg.student:
        return cfg
    student, teacher = toy.toy_models(ROOT / "runs")
    return replace(cfg, student=student, teacher=cfg.teacher or teacher)


def student_layout(folder: str) -> dict[str, torch.Size]:
    """The shape of every parameter, from a model without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: p.shape for name, p in model.named_parameters()}


def probe_tokens(prompts: list[list[int]], limit: int) -> list[int]:
    """A sequence of 2 to 64 tokens, shorter than `limit` if it can be: vLLM draws one more."""
    return (prompts[0] + prompts[-1] + prompts[0])[:min(64, max(2, limit - 1))]


# -- extensions ----------------------------------------------------------------------------------

def check_teacher_states(cfg: Config, extensions: Extensions) -> None:
    """Hidden states exist in transformers only."""
    readers = [e.name for e in extensions if e.teacher_layers]
    require(cfg.teacher_engine == "hf" or not readers,
            f"--teacher-engine {cfg.teacher_engine}: --extend {','.join(readers)} needs the "
            "teacher's hidden states, which it does not give (--teacher-engine hf does)")


def check_metrics(cfg: Config, extensions: Extensions) -> None:
    """A key of a step line has one meaning."""
    taken = sorted(extensions.metrics.keys() & METRICS.keys())
    require(not taken, f"--extend {cfg.extend}: {', '.join(taken)} in METRICS is a key that every "
                       "step line has")


def prepare_extensions(cfg: Config, job: Job) -> dict[Path, bytes]:
    """The work of every `Extension.prepare`, each in a process of its own, on the first teacher's
    device.

    Returns the files to write into the run folder, by path: the tensors as safetensors. Raises
    ValueError where an extension refuses the models or prompts.
    """
    device = next(worker.device for worker in plan.plan(cfg) if worker.role == "teacher")
    files = {}
    for e in Extensions.load(cfg):
        if type(e).prepare is Extension.prepare:
            continue
        data = alone(prepare_one, cfg, (e.name, job.prompts), device)
        if data:
            files[prepared_file(cfg, e.name)] = data
    return files


def prepare_one(cfg: Config, body: tuple[str, list[list[int]]], device: str,
                dtype: torch.dtype) -> bytes:
    """In that process. Returns bytes, because the memory of a tensor would go with the process."""
    name, prompts = body
    extension = next(e for e in Extensions.load(cfg) if e.name == name)
    tensors = extension.prepare(prompts, device, dtype)
    if tensors is None:
        return b""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})

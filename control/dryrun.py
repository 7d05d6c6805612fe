"""
--dry-run: what a run would be, from the flags and two model configurations. No weight is read and
no GPU is needed.

The memory is that of plan.py, the seconds are those of estimate.py.
What is left out: the texts (no prompt is read) and disks.
Tests: tests/test_dryrun.py
"""
from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, slot_count
from control import no_effect, plan
from control.command_line import NOTHING, Given
from control.estimate import (
    GPU,
    Machine,
    estimate,
    expected_lengths,
    fit_split,
    gpu,
    idle_parameters,
    this_cpu,
)
from control.preflight import ROOT, check_teacher_states
from control.preflight_models import first_line, fit_lengths, positions
from estimators import ESTIMATORS
from extension import Extensions, ModelPair
from models import footprint
from models.footprint import Shape
from record import report
from record.report import table

WORK = {"rollout": "generate", "teacher": "score", "learner": "learn"}


@dataclass(frozen=True)
class KnownModel:
    """What a configuration says of a model."""
    shape: Shape
    config: Any              # of its language model
    active: int              # parameters that a token meets: of a mixture of experts, not all
    source: str              # where the configuration is from


def show(cfg: Config, given: Given = NOTHING) -> None:
    """Print the plan of a run. Raises ValueError where the run itself would."""
    student = known_model("student", cfg.student)
    teacher = known_model("teacher", cfg.teacher)
    models = ModelPair(student=student.shape, teacher=teacher.shape, student_config=student.config,
                       teacher_config=teacher.config)
    cfg, length_notes = fit_lengths(cfg, given, positions(cfg, student.config, teacher.config))
    free, gpu_gb, owner = gpu_memory(cfg)
    cfg, split_notes = fit_split(cfg, given, models, free, gpu_gb)
    extensions = Extensions.load(cfg)
    notes = [*no_effect.notes(cfg, given), *length_notes, *split_notes, *extensions.check(models)]
    check_teacher_states(cfg, extensions)
    added = plan.additions(cfg, extensions, models)

    needs = plan.memory(cfg, student.shape, teacher.shape, gpu_gb, added)
    report.show("dry run: the flags and two model configurations were read, nothing else\n\nmodels")
    report.show(table(model_rows(cfg, student, teacher)))
    for note in notes:
        report.show(f"  {note}")
    size = f"; {owner} {gpu_gb:g} GB" if cfg.gpus > 0 else ""
    report.show(f"\nwho runs where, and what it takes at most{size}")
    report.show(f"  {plan.why(cfg)}")
    report.show(table(plan.rows(needs, free)))
    if cfg.gpus == 0:
        report.show(f"  {sum(n.gb for n in needs):,.2f} GB in all, of the same memory")
    report.show("\npipeline")
    report.show(table(pipeline_rows(cfg, teacher.shape, added, needs)))
    machine = gpu(cfg) if cfg.gpus > 0 else this_cpu(cfg)
    seconds, running = estimate(cfg, models, needs, machine)
    report.show("\n" + bottleneck(cfg, seconds, running, machine))
    plan.check(needs, free)


def gpu_memory(cfg: Config) -> tuple[dict[str, float], float, str]:
    """GB free by device, the size of a GPU, and whose GPU it is: this machine's, if it has as many
    as --gpus."""
    here = footprint.free_gb()
    devices = [f"cuda:{i}" for i in range(cfg.gpus)]
    if f"cuda:{cfg.gpus - 1}" in here:
        return {device: here[device] for device in devices}, here["gpu"], "this machine's"
    return dict.fromkeys(devices, GPU["gb"]), GPU["gb"], "GPUs assumed to have"


# -- tables ---------------------------------------------------------------------------------------

def model_rows(cfg: Config, student: KnownModel, teacher: KnownModel) -> list[list[str]]:
    rows = [["", "billion parameters", "per token", "layers", "width", "words",
             "configuration from"]]
    named = (("student", cfg.student, student), ("teacher", cfg.teacher, teacher))
    for role, name, model in named:
        shape = model.shape
        rows.append([f"{role}  {name or 'the toy'}", f"{shape.P / 1e9:.4g}",
                     f"{model.active / 1e9:.4g}", str(shape.L), str(shape.H), f"{shape.V:,}",
                     model.source])
    return rows


def pipeline_rows(cfg: Config, teacher: Shape, added: plan.Additions,
                  needs: list[plan.Need]) -> list[list[str]]:
    estimator = ESTIMATORS[cfg.estimator]
    scores = estimator.bytes(cfg.mc_samples, cfg.top_k, teacher.H * plan.itemsize(cfg))
    sizes = plan.row_bytes(added.slot_tensors)
    tensors = [[f"bytes per row of {name}", f"{size:,}"] for name, size in sizes.items()]
    shared = next(n for n in needs if n.worker == "shared")
    return [["slots, (max-ahead + 1) x batch", f"{slot_count(cfg):,}"],
            ["dtype of compute", cfg.dtype],
            [f"bytes per token of {cfg.estimator}", f"{scores:,}"],
            *tensors,
            ["kB per slot", f"{shared.parts['cache'] / slot_count(cfg) * 1e6:,.0f}"],
            ["lag, versions", expected_lag(cfg)]]


def expected_lag(cfg: Config) -> str:
    if cfg.schedule == "sync":
        return "0, no overlap"
    if cfg.schedule == "step-off":
        return f"{cfg.max_ahead}"
    if cfg.overdue == "keep":
        return f"mean about {cfg.max_ahead}, unbounded"
    return f"mean about {cfg.max_ahead}, at most {cfg.max_lag} ({cfg.overdue})"


# -- models ---------------------------------------------------------------------------------------

@functools.cache
def known_model(role: str, name: str) -> KnownModel:
    """A model by its configuration alone: from a folder, the cache, the hub or shapes.json."""
    config, source = configuration(role, name)
    shape = Shape.of(config)
    active = shape.P - idle_parameters(config, shape)
    return KnownModel(shape, config.get_text_config(), active, source)


def configuration(role: str, name: str) -> tuple[Any, str]:
    """A transformers configuration, and where it is from."""
    from transformers import AutoConfig
    if not name:
        from data import toy
        recipe = toy.TOY[role]
        model = toy.small_model(toy.toy_tokenizer(), layers=recipe["layers"],
                                hidden=recipe["hidden"], seed=recipe["seed"])
        return model.config, "toy.TOY"
    shipped = json.loads((ROOT / "configs" / "shapes.json").read_text())
    try:         # a shipped configuration needs no network; another one may come from the hub
        config = AutoConfig.from_pretrained(name, local_files_only=name in shipped)
    except (OSError, ValueError) as e:
        if name not in shipped:
            raise ValueError(f"--{role} {name}: neither a model folder nor on the hub "
                             f"({first_line(e)})") from None
        return AutoConfig.for_model(**shipped[name]), "configs/shapes.json"
    return config, "its folder" if Path(name).exists() else "the hub"


# -- the bottleneck -------------------------------------------------------------------------------

def bottleneck(cfg: Config, seconds: dict[str, float], running: int, machine: Machine) -> str:
    """The estimate as text. Roles on one GPU take turns; with --schedule sync all of them do. On a
    CPU they share the cores.
    """
    busy: dict[str, float] = defaultdict(float)
    workers = plan.plan(cfg)
    for worker in workers:
        busy[worker.device] += seconds[WORK[worker.role]]
    in_turn = cfg.schedule == "sync" or (len(busy) == 1 and cfg.gpus > 0)
    turns = ", one role after the other" if in_turn else ""
    if in_turn:
        whole = sum(seconds.values())
    elif cfg.gpus > 0:
        whole = max(busy.values())
    else:
        whole = max(*seconds.values(), sum(busy.values()) / machine.at_once)
        turns = ", all roles on the same cores"
    slowest = max(seconds, key=seconds.get)
    prompt, response = expected_lengths(cfg)
    return "\n".join([
        f"expected bottleneck: an estimate, for responses of {response:,.0f} tokens after prompts "
        f"of {prompt:,.0f}, {machine.name}",
        table([["seconds per train batch", *seconds],
               ["", *(f"{s:,.1f}" for s in seconds.values())]]),
        f"  the others wait for: {slowest}. {whole:,.1f} s a batch{turns}, "
        f"{run_time(whole * cfg.steps)} for {cfg.steps} batches",
        f"  {running} responses at a time per rollout worker"])


def run_time(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h"

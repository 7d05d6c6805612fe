"""
--dry-run: what a run would be, from the flags and two model configurations. No weight is read and
no GPU is needed.

The memory is that of plan.py. On GPUs the seconds are an estimate from the peaks of one GPU (`GPU`,
`SHARE`) and a guess at the length of responses: they say which role the others will wait for, not
how long a run takes. On a CPU two numbers are measured here and now, and prompts and responses
count with their greatest length: the time of a run, for responses that long.

What is left out: the texts (no prompt is read), disks, and the links between GPUs.
Tests: tests/test_dryrun.py
"""
from __future__ import annotations

import functools
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config
from control import no_effect, plan
from control.command_line import NOTHING, Given
from control.preflight import ROOT, check_teacher_states
from control.preflight_models import first_line, fit_lengths
from estimators import ESTIMATORS
from extension import Extensions, ModelPair
from models import footprint
from models.footprint import Shape
from record import report
from record.report import table

# An H100 SXM: memory, peak by dtype, peak of its memory; and guesses: the share of these peaks that
# a well-fed model reaches, and the part of --max-prompt and --max-response that is used
GPU = {"gb": 80.0, "flops": {"bfloat16": 989e12, "float32": 67e12}, "bytes_s": 3.35e12}
SHARE = {"flops": 0.4, "bytes_s": 0.6}
LENGTH = {"prompt": 0.25, "response": 0.5}
# The share of what `this_cpu` measures that a model reaches: products of matrices and reading are
# not all that it does
CPU_SHARE = {"flops": 0.6, "bytes_s": 0.8}
WORK = {"rollout": "generate", "teacher": "score", "learner": "learn"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one worker computes and reads per second, and how it is described."""
    flops: float
    bytes_s: float
    name: str
    at_once: float = math.inf                    # workers that the cores serve without loss


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
    room = {f"--{role} {name}": getattr(model.config, "max_position_embeddings", None)
            for role, name, model in (("student", cfg.student, student),
                                      ("teacher", cfg.teacher, teacher))}
    cfg, length_notes = fit_lengths(cfg, given, room)
    extensions = Extensions.load(cfg)
    notes = [*no_effect.notes(cfg, given), *length_notes, *extensions.check(models)]
    check_teacher_states(cfg, extensions)
    added = plan.additions(cfg, extensions, models)

    free, gpu_gb, owner = gpu_memory(cfg)
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
    seconds, running = estimate(cfg, student.shape, teacher, needs, machine)
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
    slots = (cfg.max_ahead + 1) * cfg.batch
    scores = estimator.bytes(cfg.mc_samples, cfg.top_k, teacher.H * plan.itemsize(cfg))
    sizes = plan.row_bytes(added.slot_tensors)
    tensors = [[f"bytes per row of {name}", f"{size:,}"] for name, size in sizes.items()]
    shared = next(n for n in needs if n.worker == "shared")
    return [["slots, (max-ahead + 1) x batch", f"{slots:,}"],
            ["dtype of compute", cfg.dtype],
            [f"bytes per token of {cfg.estimator}", f"{scores:,}"],
            *tensors,
            ["kB per slot", f"{shared.parts['cache'] / slots * 1e6:,.0f}"],
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


def idle_parameters(config: Any, shape: Shape) -> int:
    """Those of the experts that a token does not meet, three matrices each."""
    c = config.get_text_config()
    experts = getattr(c, "num_experts", 0) or 0
    if experts == 0:
        return 0
    idle = experts - c.num_experts_per_tok
    return idle * shape.L * 3 * shape.H * c.moe_intermediate_size


# -- the bottleneck -------------------------------------------------------------------------------

def gpu(cfg: Config) -> Machine:
    flops = GPU["flops"][cfg.dtype]
    return Machine(flops=flops * SHARE["flops"], bytes_s=GPU["bytes_s"] * SHARE["bytes_s"],
                   name=f"on GPUs with {flops / 1e12:,.0f} TFLOP/s\n"
                        f"and {GPU['bytes_s'] / 1e12:g} TB/s, of which a model reaches "
                        f"{SHARE['flops']:.0%} and {SHARE['bytes_s']:.0%}; not counted: kernel "
                        "launches, Python, pushes")


def this_cpu(cfg: Config) -> Machine:
    """What a worker gets of this machine as it is now, other work included: half of the cores, as
    in transport/process.py."""
    cores = usable_cores()
    threads = max(1, cores // 2)
    flops, bandwidth = measured(threads, getattr(torch, cfg.dtype))
    return Machine(flops=flops * CPU_SHARE["flops"], bytes_s=bandwidth * CPU_SHARE["bytes_s"],
                   at_once=cores / threads,
                   name=f"on {threads} of {cores} cores each, measured\nnow: "
                        f"{flops / 1e9:,.0f} GFLOP/s and {bandwidth / 1e9:,.0f} GB/s, of which a "
                        f"model reaches {CPU_SHARE['flops']:.0%} and {CPU_SHARE['bytes_s']:.0%}; "
                        "not counted: the start, evaluations, saving")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def measured(threads: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product of matrices, and bytes read per second; the best of five times."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(1024, 1024, dtype=dtype)
        row = torch.ones(1, 8192, dtype=dtype)
        matrix = torch.ones(8192, 8192, dtype=dtype)         # too large for any cache
        product_s = min(seconds_of(lambda: a @ a) for _ in range(5))
        read_s = min(seconds_of(lambda: row @ matrix) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return 2 * 1024 ** 3 / product_s, matrix.nbytes / read_s


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def estimate(cfg: Config, student: Shape, teacher: KnownModel, needs: list[plan.Need],
             machine: Machine) -> tuple[dict[str, float], int]:
    """Seconds per train batch of every role, and the responses that run at the same time in a
    rollout worker.

    Per sequence of n tokens a model with P parameters computes 2 P n and, in its attention,
    2 L A n^2; the learner three times that, or four times if it computes layers again. A step of
    generation reads the weights and the keys and values of every running response once.
    """
    prompt, response = expected_lengths(cfg)
    flops = machine.flops
    size = plan.itemsize(cfg)

    def forward(shape: Shape, parameters: int) -> float:
        n = prompt + response
        return cfg.batch * (2 * parameters * n + 2 * shape.L * shape.A * n ** 2) / flops

    rollout = next(n for n in needs if n.worker == "rollout0")
    room = rollout.parts["cache"] * 1e9 / student.cached(size)             # tokens
    slots = (cfg.max_ahead + 1) * cfg.batch
    running = max(1, int(min(cfg.max_running, slots / cfg.rollouts, room / (prompt + response))))
    held = size * student.P + running * (prompt + response / 2) * student.cached(size)
    engine_step = max(held / machine.bytes_s, 2 * running * student.P / flops)
    passes = 4 if cfg.gradient_checkpointing else 3
    seconds = {"generate": cfg.batch * response / (cfg.rollouts * running / engine_step),
               "score": forward(teacher.shape, teacher.active) / cfg.teachers,
               "learn": passes * forward(student, student.P) / cfg.learners}
    return seconds, running


def expected_lengths(cfg: Config) -> tuple[float, float]:
    """Tokens of a prompt and of a response: a guess; on a CPU, where lengths are small, the most.
    """
    if cfg.gpus == 0:
        return cfg.max_prompt, cfg.max_response
    return LENGTH["prompt"] * cfg.max_prompt, LENGTH["response"] * cfg.max_response


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

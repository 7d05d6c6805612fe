"""
--dry-run: what a run would be, from the flags and two model configurations. No weight is read and
no GPU is needed.

The memory is that of plan.py. The seconds are an estimate from the peaks of one GPU (`GPU`,
`SHARE`) and a guess at the length of responses: they say which role the others will wait for, not
how long a run takes.

What is left out: the texts (no prompt is read), disks, and the links between GPUs.
Tests: tests/test_dryrun.py
"""
from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    report.show("\npipeline")
    report.show(table(pipeline_rows(cfg, teacher.shape, added, needs)))
    if cfg.gpus > 0:
        seconds, running = estimate(cfg, student.shape, teacher, needs)
        report.show("\n" + bottleneck(cfg, seconds, running))
    else:
        report.show("\nno estimate of the bottleneck on a CPU")
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

def estimate(cfg: Config, student: Shape, teacher: KnownModel,
             needs: list[plan.Need]) -> tuple[dict[str, float], int]:
    """Seconds per train batch of every role, and the responses that run at the same time in a
    rollout worker.

    Per sequence of n tokens a model with P parameters computes 2 P n and, in its attention,
    2 L A n^2; the learner three times that, or four times if it computes layers again. A step of
    generation reads the weights and the keys and values of every running response once.
    """
    prompt, response = expected_lengths(cfg)
    flops = GPU["flops"][cfg.dtype] * SHARE["flops"]
    size = plan.itemsize(cfg)
    bandwidth = GPU["bytes_s"] * SHARE["bytes_s"]

    def forward(shape: Shape, parameters: int) -> float:
        n = prompt + response
        return cfg.batch * (2 * parameters * n + 2 * shape.L * shape.A * n ** 2) / flops

    rollout = next(n for n in needs if n.worker == "rollout0")
    room = rollout.parts["cache"] * 1e9 / student.cached(size)             # tokens
    slots = (cfg.max_ahead + 1) * cfg.batch
    running = max(1, int(min(cfg.max_running, slots / cfg.rollouts, room / (prompt + response))))
    held = size * student.P + running * (prompt + response / 2) * student.cached(size)
    engine_step = max(held / bandwidth, 2 * running * student.P / flops)
    passes = 4 if cfg.gradient_checkpointing else 3
    seconds = {"generate": cfg.batch * response / (cfg.rollouts * running / engine_step),
               "score": forward(teacher.shape, teacher.active) / cfg.teachers,
               "learn": passes * forward(student, student.P) / cfg.learners}
    return seconds, running


def expected_lengths(cfg: Config) -> tuple[float, float]:
    """Tokens of a prompt and of a response: a guess."""
    return LENGTH["prompt"] * cfg.max_prompt, LENGTH["response"] * cfg.max_response


def bottleneck(cfg: Config, seconds: dict[str, float], running: int) -> str:
    """The estimate as text. Roles on one device take turns; with --schedule sync all of them do.
    """
    busy: dict[str, float] = defaultdict(float)
    for worker in plan.plan(cfg):
        busy[worker.device] += seconds[WORK[worker.role]]
    in_turn = cfg.schedule == "sync" or len(busy) == 1
    whole = sum(seconds.values()) if in_turn else max(busy.values())
    turns = ", one role after the other" if in_turn else ""
    slowest = max(seconds, key=seconds.get)
    prompt, response = expected_lengths(cfg)
    return "\n".join([
        f"expected bottleneck: an estimate, for responses of {response:,.0f} tokens after prompts "
        f"of {prompt:,.0f}, on GPUs with {GPU['flops'][cfg.dtype] / 1e12:,.0f} TFLOP/s",
        f"and {GPU['bytes_s'] / 1e12:g} TB/s, of which a model reaches {SHARE['flops']:.0%} and "
        f"{SHARE['bytes_s']:.0%}; not counted: kernel launches, Python, pushes",
        table([["seconds per train batch", *seconds],
               ["", *(f"{s:,.1f}" for s in seconds.values())]]),
        f"  the others wait for: {slowest}. {whole:,.1f} s a batch{turns}, "
        f"{whole * cfg.steps / 3600:,.1f} h for {cfg.steps} batches",
        f"  {running} responses at a time per rollout worker"])

"""
--dry-run: what a run would be, from the flags and two model configurations. No weight is read and no GPU is needed.

The memory is plan.py's. The seconds are an estimate from five numbers of one GPU (`GPU`) and a guess at the length of
responses, and say which role will be waited for, not how long a run takes. What is left out: the texts (no prompt is
read), disks, and the links between GPUs. Tests: tests/test_dryrun.py
"""
from __future__ import annotations

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from control import plan
from control.preflight import ROOT, refuse
from estimators import ESTIMATORS
from extensions import oprd
from models import footprint
from models.footprint import Shape
from record.report import table

if TYPE_CHECKING:
    from asyncopd import Config

GPU = {"gb": 80.0, "flops": 989e12, "bytes_s": 3.35e12}      # an H100 SXM: memory; its peaks in bf16 and of its memory
SHARE = {"flops": 0.4, "bytes_s": 0.6}                       # of these peaks, what a well-fed model reaches: a guess
LENGTH = {"prompt": 0.25, "response": 0.5}                   # of --max-prompt and --max-response: a guess


def show(cfg: Config) -> None:
    """Print the plan of a run. Raises ValueError where it cannot be, as the run itself would."""
    named = {"student": cfg.student, "teacher": cfg.teacher}
    known = {role: model(role, name) for role, name in named.items()}
    student, teacher = (known[role][0] for role in named)
    oprd.check(cfg, student, teacher)
    here, last = footprint.free_gb(), f"cuda:{cfg.gpus - 1}"
    gb, whose = (here["gpu"], "this machine's") if last in here else (GPU["gb"], "GPUs assumed to have")
    needs = plan.memory(cfg, student, teacher, gb)
    free = {f"cuda:{i}": here[f"cuda:{i}"] if last in here else gb for i in range(cfg.gpus)}
    print("dry run: the flags and two model configurations were read, nothing else\n\nmodels")
    print(table([["", "billion parameters", "per token", "layers", "width", "words", "configuration from"]] + [
        [f"{role}  {name or 'the toy'}", f"{shape.P / 1e9:.4g}", f"{active / 1e9:.4g}", str(shape.L), str(shape.H),
         f"{shape.V:,}", source] for (role, name), (shape, active, source) in zip(named.items(), known.values())]))
    print("\nwho runs where, and what it takes at most" + (f"; {whose} {gb:g} GB" if cfg.gpus else ""))
    print(f"  {plan.why(cfg)}")
    print(table(plan.rows(needs, free)))
    row, slots = ESTIMATORS[cfg.estimator], (cfg.max_ahead + 1) * cfg.batch
    scores = row.bytes(cfg.mc_samples, cfg.top_k, teacher.H * (2 if cfg.gpus else 4))
    lag = {"sync": "0, no overlap", "step-off": f"{cfg.max_ahead}", "async": f"mean about {cfg.max_ahead}, " + (
        "unbounded" if cfg.overdue == "keep" else f"at most {cfg.max_lag} ({cfg.overdue})")}[cfg.schedule]
    print("\npipeline")
    print(table([["slots, (max-ahead + 1) x batch", f"{slots:,}"],
                 [f"bytes per token of {cfg.estimator}", f"{scores:,}"],
                 *[["bytes per token of OPRD's states", f"{2 * oprd.shape(cfg, student, teacher)[1]:,}"]] * (
                     cfg.oprd_weight > 0),
                 ["kB per slot", f"{needs[-1].parts['cache'] / slots * 1e6:,.0f}"],
                 ["lag, versions", lag]]))
    print("\n" + estimate(cfg, student, teacher, known["teacher"][1], needs) if cfg.gpus else
          "\nno estimate of the bottleneck on a CPU", flush=True)
    plan.check(needs, free)


@functools.cache
def model(role: str, name: str) -> tuple[Shape, int, str]:
    """Shape, parameters that a token meets, and where they are from: a folder, the cache or the hub, shapes.json."""
    from transformers import AutoConfig
    shipped = json.loads((ROOT / "configs" / "shapes.json").read_text())
    if not name:
        from data import toy
        made = {k: toy.TOY[role][k] for k in ("layers", "hidden", "seed")}
        config, source = toy.small_model(toy.toy_tokenizer(), **made).config, "toy.TOY"
    else:
        try:     # what is shipped needs no network; what is not may come from the hub
            config = AutoConfig.from_pretrained(name, local_files_only=name in shipped)
            source = "its folder" if Path(name).exists() else "the hub"
        except (OSError, ValueError) as e:
            name in shipped or refuse(f"--{role} {name}: neither a model folder nor on the hub "
                                      f"({str(e).splitlines()[0]})")
            config, source = AutoConfig.for_model(**shipped[name]), "configs/shapes.json"
    shape, c = Shape.of(config), config.get_text_config()
    idle = getattr(c, "num_experts", 0) or 0
    idle = idle and idle - c.num_experts_per_tok           # experts that a token does not meet, three matrices each
    return shape, shape.P - idle * shape.L * 3 * shape.H * getattr(c, "moe_intermediate_size", 0), source


def estimate(cfg: Config, student: Shape, teacher: Shape, active: int, needs: list[plan.Need]) -> str:
    """Seconds per train batch and role, and who is waited for. Per sequence of n tokens a model with P parameters
    computes 2 P n and, in its attention, 2 L A n^2; the learner three times that, or four if it computes layers again.
    A step of generation reads the weights and every running response's keys and values once."""
    Q, R = LENGTH["prompt"] * cfg.max_prompt, LENGTH["response"] * cfg.max_response
    flops, bandwidth = GPU["flops"] * SHARE["flops"], GPU["bytes_s"] * SHARE["bytes_s"]

    def forward(shape: Shape, parameters: int) -> float:
        return cfg.batch * (2 * parameters * (Q + R) + 2 * shape.L * shape.A * (Q + R) ** 2) / flops

    room = next(n.parts["cache"] for n in needs if n.worker == "rollout0") * 1e9 / student.cached(2)      # tokens
    ahead = (cfg.max_ahead + 1) * cfg.batch
    running = max(1, int(min(cfg.max_running, ahead / cfg.rollouts, room / (Q + R))))
    step = (2 * student.P + running * (Q + R / 2) * student.cached(2)) / bandwidth
    step = max(step, 2 * running * student.P / flops)
    seconds = {"generate": cfg.batch * R / (cfg.rollouts * running / step),
               "score": forward(teacher, active) / cfg.teachers,
               "learn": (3 + cfg.gradient_checkpointing) * forward(student, student.P) / cfg.learners}
    role, busy = {"rollout": "generate", "teacher": "score", "learner": "learn"}, defaultdict(float)
    for worker, device in plan.plan(cfg).items():
        busy[device] += seconds[role[worker.rstrip("0123456789")]]
    worst, in_turn = max(seconds, key=seconds.get), cfg.schedule == "sync" or len(busy) == 1
    whole = sum(seconds.values()) if in_turn else max(busy.values())       # roles on one device take turns
    return "\n".join([
        f"expected bottleneck: an estimate, for responses of {R:,.0f} tokens after prompts of {Q:,.0f}, on GPUs with "
        f"{GPU['flops'] / 1e12:,.0f} TFLOP/s",
        f"and {GPU['bytes_s'] / 1e12:g} TB/s, of which a model reaches {SHARE['flops']:.0%} and {SHARE['bytes_s']:.0%};"
        " not counted: kernel launches, Python, pushes",
        table([["seconds per train batch", *seconds], ["", *(f"{s:,.1f}" for s in seconds.values())]]),
        f"  the others wait for: {worst}. {whole:,.1f} s a batch{', one role after the other' if in_turn else ''}, "
        f"{whole * cfg.steps / 3600:,.1f} h for {cfg.steps} batches",
        f"  {running} responses at a time per rollout worker"])

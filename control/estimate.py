"""
What a train batch takes, before it is run: seconds of every role, and the split of the GPUs that follows.

On GPUs the seconds are an estimate from the peaks of one GPU (`GPU`, `SHARE`) and a guess at the length of responses:
they say which role the others will wait for, not how long a run takes. On a CPU two numbers are measured here and now,
and prompts and responses count with their greatest length: the time of a run, for responses that long.

What is left out: the links between GPUs, kernel launches, Python, pushes.
Tests: tests/test_dryrun.py, tests/test_split.py
"""
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from config import Config, most_running
from control import plan
from control.command_line import Given
from extension import ModelPair
from models.footprint import Shape
from transport.process import threads_of

# An H100 SXM: memory, peak by dtype, peak of its memory; and guesses: the share of these peaks that
# a well-fed model reaches, and the part of --max-prompt and --max-response that is used
GPU = {"gb": 80.0, "flops": {"bfloat16": 989e12, "float32": 67e12}, "bytes_s": 3.35e12}
SHARE = {"flops": 0.4, "bytes_s": 0.6}
LENGTH = {"prompt": 0.25, "response": 0.5}
# The share of what `this_cpu` measures that a model reaches: products of matrices and reading are
# not all that it does. The learner of configs/smollm2.yaml reached about 70% of the products on a
# CPU without AVX-512, and 80% on one with it
CPU_SHARE = {"flops": 0.76, "bytes_s": 0.8}
REPEATS = 20                     # of what is measured; the fastest counts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one worker computes and reads per second, and how it is described."""
    flops: float
    bytes_s: float
    name: str
    at_once: float = math.inf                    # workers that the cores serve without loss


def idle_parameters(config: Any, shape: Shape) -> int:
    """Those of the experts that a token does not meet, three matrices each."""
    c = config.get_text_config()
    experts = getattr(c, "num_experts", 0) or 0
    if experts == 0:
        return 0
    idle = experts - c.num_experts_per_tok
    return idle * shape.L * 3 * shape.H * c.moe_intermediate_size


# -- the machine -------------------------------------------------------------------------------

def gpu(cfg: Config) -> Machine:
    flops = GPU["flops"][cfg.dtype]
    return Machine(flops=flops * SHARE["flops"], bytes_s=GPU["bytes_s"] * SHARE["bytes_s"],
                   name=f"on GPUs with {flops / 1e12:,.0f} TFLOP/s\n"
                        f"and {GPU['bytes_s'] / 1e12:g} TB/s, of which a model reaches "
                        f"{SHARE['flops']:.0%} and {SHARE['bytes_s']:.0%}; not counted: kernel "
                        "launches, Python, pushes")


def this_cpu(cfg: Config) -> Machine:
    """What a worker gets of this machine as it is now, other work included."""
    cores = usable_cores()
    threads = threads_of(cfg, cores)
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
    """FLOP/s of a product of matrices, and bytes read per second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(1024, 1024, dtype=dtype)
        row = torch.ones(1, 8192, dtype=dtype)
        matrix = torch.ones(8192, 8192, dtype=dtype)         # too large for any cache
        product_s = min(seconds_of(lambda: a @ a) for _ in range(REPEATS))
        read_s = min(seconds_of(lambda: row @ matrix) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(before)
    return 2 * 1024 ** 3 / product_s, matrix.nbytes / read_s


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def estimate(cfg: Config, models: ModelPair, needs: list[plan.Need],
             machine: Machine, share: float = LENGTH["response"]) -> tuple[dict[str, float], int]:
    """Seconds per train batch of every role, and the responses that run at the same time in a
    rollout worker.

    Per sequence of n tokens a model with P parameters computes 2 P n and, in its attention,
    2 L A n^2; the learner three times that, or four times if it computes layers again. A step of
    generation reads the weights and the keys and values of every running response once.
    """
    student, teacher = models.student, models.teacher
    active = teacher.P - idle_parameters(models.teacher_config, teacher)
    prompt, response = expected_lengths(cfg, share)
    flops = machine.flops
    size = plan.itemsize(cfg)

    def forward(shape: Shape, parameters: int) -> float:
        n = prompt + response
        return cfg.batch * (2 * parameters * n + 2 * shape.L * shape.A * n ** 2) / flops

    rollout = next(n for n in needs if n.worker == "rollout0")
    room = rollout.parts["cache"] * 1e9 / student.cached(size)             # tokens
    running = max(1, int(min(most_running(cfg), room / (prompt + response))))
    held = size * student.P + running * (prompt + response / 2) * student.cached(size)
    engine_step = max(held / machine.bytes_s, 2 * running * student.P / flops)
    passes = 4 if cfg.gradient_checkpointing else 3
    seconds = {"generate": cfg.batch * response / (cfg.rollouts * running / engine_step),
               "score": forward(teacher, active) / cfg.teachers,
               "learn": passes * forward(student, student.P) / cfg.learners}
    return seconds, running


def expected_lengths(cfg: Config, share: float = LENGTH["response"]) -> tuple[float, float]:
    """Tokens of a prompt and of a response: a guess; on a CPU, where lengths are small, the most.
    """
    if cfg.gpus == 0:
        return cfg.max_prompt, cfg.max_response
    return LENGTH["prompt"] * cfg.max_prompt, share * cfg.max_response


# -- the split of the GPUs ------------------------------------------------------------------------

COUNTS = ("rollouts", "teachers", "learners")
SHARES = (1 / 8, 1 / 4, 1 / 2)                   # of --max-response, that responses may turn out to use


def fit_split(cfg: Config, given: Given, models: ModelPair, free: Mapping[str, float],
              gpu_gb: float) -> tuple[Config, list[str]]:
    """Of three GPUs or more, a split that is fast by the estimate, among those that fit into what
    is free. How long responses will be is not known: each split is compared with the best one for
    responses of several lengths (`SHARES`), and the one whose worst ratio is least is taken. Counts
    that somebody has given stay, and so do those of a run that is resumed; the work of an extension
    is in no estimate. Returns a note too if it is not the paper's.

    free      GB by device; a GPU that is not there counts as an empty one
    gpu_gb    the size of a GPU
    """
    if cfg.gpus <= 2 or cfg.resume or cfg.extend:
        return cfg, []
    possible = []
    seconds = []                                                 # by split, for each of SHARES
    for split in splits(cfg, given):
        needs = plan.memory(split, models.student, models.teacher, gpu_gb)
        if fits(needs, split.gpus, free, gpu_gb):
            possible.append(split)
            seconds.append([batch_seconds(split, models, needs, share) for share in SHARES])
    if not possible:
        return cfg, []
    least = [min(times) for times in zip(*seconds)]
    worst = [max(s / best for s, best in zip(times, least)) for times in seconds]
    ratio, best = min(zip(worst, possible), key=lambda pair: pair[0])
    now = worst[possible.index(cfg)] if cfg in possible else math.inf
    if now < 1.05 * ratio:                                       # an estimate is no closer
        return cfg, []
    lengths = " to ".join(f"{share * cfg.max_response:,.0f}" for share in (SHARES[0], SHARES[-1]))
    before = f"up to {now:.2f} x" if cfg in possible else "do not fit"
    return best, [f"--rollouts {best.rollouts} --teachers {best.teachers} --learners "
                  f"{best.learners}: by the estimate of --dry-run at most {ratio:.2f} x slower than "
                  f"the best split for responses of {lengths} tokens; {cfg.rollouts}, "
                  f"{cfg.teachers} and {cfg.learners}: {before}"]


def splits(cfg: Config, given: Given) -> Iterator[Config]:
    """Every way to use all GPUs, with the counts that were given; LoRA has one learner."""
    fixed = [name for name in COUNTS if name in given]
    if cfg.lora_rank:
        fixed.append("learners")
    for teachers in range(1, cfg.gpus // cfg.teacher_gpus + 1):
        for learners in range(1, cfg.gpus + 1):
            rollouts = cfg.gpus - teachers * cfg.teacher_gpus - learners
            other = replace(cfg, rollouts=rollouts, teachers=teachers, learners=learners)
            if rollouts > 0 and all(getattr(other, name) == getattr(cfg, name) for name in fixed):
                yield other


def fits(needs: list[plan.Need], gpus: int, free: Mapping[str, float], gpu_gb: float) -> bool:
    """Whether every GPU has room for what its workers take."""
    taken = dict.fromkeys((f"cuda:{i}" for i in range(gpus)), 0.0)
    for need in needs:
        if need.device in taken:
            taken[need.device] += need.gb
    return all(gb <= free.get(device, gpu_gb) for device, gb in taken.items())


def batch_seconds(cfg: Config, models: ModelPair, needs: list[plan.Need], share: float) -> float:
    """Of the slowest role, where every worker has a GPU of its own; of all, if they take turns.
    `share`: of --max-response, that responses use."""
    seconds, _ = estimate(cfg, models, needs, gpu(cfg), share)
    return sum(seconds.values()) if cfg.schedule == "sync" else max(seconds.values())

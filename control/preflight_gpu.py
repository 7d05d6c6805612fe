"""
Preflight, the GPUs: that CUDA starts, that each GPU of the run computes in its dtype, and that vLLM finds a compiler.

It comes before anything is downloaded. GPUs are tried in a process of its own: a parent that has used one keeps a part
of its memory. What is left out: whether models fit (preflight_memory.py).
Tests: tests/test_preflight_gpu.py
"""
from __future__ import annotations

import os
import shutil

import torch

from config import Config, require
from control.preflight_models import first_line
from models.footprint import nvidia_smi
from transport.process import alone

COMPILERS = ("gcc", "clang")
LIMIT_S = 120                                    # for a product on every GPU
BF16 = (8, 0)                                    # compute capability from which a GPU has it


def check_gpus(cfg: Config) -> None:
    """Raises ValueError with what is wrong and what to do."""
    if cfg.gpus == 0:
        return
    for flag, engine in (("--engine", cfg.engine), ("--teacher-engine", cfg.teacher_engine)):
        if engine == "vllm":
            check_compiler(flag)
    numbers = ",".join(str(i) for i in range(cfg.gpus))
    try:
        alone(try_gpus, cfg, None, f"cuda:{numbers}", limit_s=LIMIT_S)
    except TimeoutError:
        raise ValueError(f"--gpus {cfg.gpus}: no answer from the GPUs within {LIMIT_S} s; {installed()}") from None


def check_compiler(flag: str) -> None:
    """Triton, by which vLLM compiles kernels, takes what CC names, and without it one of COMPILERS."""
    named = os.environ.get("CC", "")
    wanted = [named] if named else COMPILERS
    require(any(shutil.which(name) for name in wanted),
            f"{flag} vllm: no C compiler was found ({' or '.join(wanted)}), and kernels are compiled when they first "
            f"run (install gcc, or name a compiler in CC; {flag} hf needs none)")


def try_gpus(cfg: Config, data: None, device: str, dtype: torch.dtype) -> None:
    """One product on every GPU. For `alone`: `device` names all of them."""
    for number in device.removeprefix("cuda:").split(","):
        what = f"--gpus {cfg.gpus}: GPU {number} cannot be used"
        try:
            capability = torch.cuda.get_device_capability(int(number))
            x = torch.ones(64, 64, dtype=dtype, device=f"cuda:{number}")
            right = (x @ x).eq(64).all().item()
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"{what}: {first_line(e)}; {installed()} (--gpus 0 runs on the CPU)") from None
        require(right, f"{what}: it multiplies wrongly; {installed()}")
        require(dtype != torch.bfloat16 or capability >= BF16,
                f"{what} in bf16: its compute capability is {capability[0]}.{capability[1]}, which bf16 needs to be "
                f"{BF16[0]}.{BF16[1]} at least (--dtype float32)")


def installed() -> str:
    """What has to fit together."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    drivers = sorted({row[0] for row in nvidia_smi("driver_version")})
    driver = f"NVIDIA driver {', '.join(drivers)}" if drivers else "no NVIDIA driver answers"
    return f"torch {torch.__version__} is {built}, {driver}"

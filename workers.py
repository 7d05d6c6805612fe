"""
A worker is a process with a pipe: how it starts, on which cores or GPU, and how its end reaches the parent.

Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from typing import TYPE_CHECKING

import torch

from cache import Link, ParentGone
from learner import learner_worker
from rollout import rollout_worker
from teacher import teacher_worker

if TYPE_CHECKING:
    from asyncopd import Config

WORKERS = {"rollout": rollout_worker, "teacher": teacher_worker, "learner": learner_worker}


def guarded(name: str, pipe, log: str, cfg: Config, device: str, args: tuple) -> None:
    """Process target: whatever the worker raises reaches the parent with its traceback; only the parent prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # these are for the parent, which stops us in order
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1), os.dup2(sink, 2)
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, len(cores) // 2))
        if name.startswith("rollout"):                   # vLLM binds its threads to cores: leave the rest the others
            core = cores[int(name[7:]) % max(1, len(cores) - 1)]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
    else:
        i, seen = int(device.split(":")[1]), os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"], device = seen.split(",")[i] if seen else str(i), "cuda:0"
    link = Link(pipe)
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        WORKERS[name.rstrip("0123456789")](cfg, link, *args, device, dtype)
    except ParentGone:
        pass
    except BaseException:
        link.send("crash", traceback=traceback.format_exc())
        raise


class Hand:
    """A worker as its parent sees it."""

    def __init__(self, name: str, device: str, cfg: Config, args: tuple):
        spawn = multiprocessing.get_context("spawn")
        self.name, self.role, self.load, self.stopped = name, name.rstrip("0123456789"), 0, False
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=guarded, name=name, daemon=True,
                                     args=(name, theirs, f"{cfg.out}/{name}.log", cfg, device, args))
        self.process.start()
        theirs.close()

    def send(self, order: str, body=None) -> None:
        with contextlib.suppress(BrokenPipeError):       # a worker that is gone: what it left in the pipe says why
            self.pipe.send((order, body))

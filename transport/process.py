"""
A worker is a process with a pipe: how it starts, on which cores or GPU, its pulse, and how its end reaches the parent.

Tests: tests/test_pipeline.py, tests/test_faults.py
"""
from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learner import learner_worker
from rollout import rollout_worker
from teacher import teacher_worker
from transport.link import Incurable, Link, ParentGone

if TYPE_CHECKING:
    from config import Config

# -- a worker's end --------------------------------------------------------------------------------

# -- its life --------------------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1
WORKERS = {"rollout": rollout_worker, "teacher": teacher_worker, "learner": learner_worker}


def guarded(name: str, pipe: Connection, pulse: Tensor, log: str, cfg: Config, device: str, args: tuple) -> None:
    """Process target: whatever the worker raises reaches the parent with its traceback; only the parent prints."""
    device, dtype = belong(log, device)
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, len(cores) // 2))
        if name.startswith("rollout"):                   # vLLM binds its threads to cores: leave the rest the others
            core = cores[int(name[7:]) % max(1, len(cores) - 1)]
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
    link = Link(pipe, pulse)
    try:
        WORKERS[name.rstrip("0123456789")](cfg, link, *args, device, dtype)
    except ParentGone:
        pass
    except BaseException as e:
        link.send("crash", traceback=traceback.format_exc(), incurable=isinstance(e, Incurable))
        raise


def belong(log: str, device: str) -> tuple[str, torch.dtype]:
    """How a process begins: it ends with its parent, which alone hears signals and prints, and sees its own GPUs only.
    What these are called then, and the dtype of compute there."""
    if sys.platform == "linux":                          # a killed parent takes its workers along, busy or not
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)                                  # it was killed before that
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # these are for the parent, which stops us in order
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1), os.dup2(sink, 2)
    if device == "cpu":
        return device, torch.float32
    os.environ["CUDA_VISIBLE_DEVICES"], device = visible(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return device, torch.bfloat16


def alone(fn: Callable, cfg: Config, data: object, device: str) -> bytes:
    """fn(cfg, data, device, dtype) in a process of its own: a parent that touches a GPU keeps a part of it.

    A ValueError there is one here, any other end a RuntimeError.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=answer, args=(theirs, fn, cfg, data, device), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        found = RuntimeError(f"{fn.__module__}.{fn.__name__} died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def answer(pipe: Connection, fn: Callable, cfg: Config, data: object, device: str) -> None:
    """Process target of `alone`."""
    device, dtype = belong(os.devnull, device)
    try:
        found = fn(cfg, data, device, dtype)
    except ValueError as e:
        found = e
    except BaseException:
        pipe.send(RuntimeError(f"{fn.__module__}.{fn.__name__} crashed\n{traceback.format_exc()}"))
        raise
    pipe.send(found)


def visible(device: str, seen: str | None) -> tuple[str, str]:
    """What a worker is to see of the GPUs that its parent sees, and what its own are called then: cuda:4,5 -> cuda:0,1.
    """
    wanted = device.removeprefix("cuda:").split(",")
    return (",".join(seen.split(",")[int(i)] if seen else i for i in wanted),
            "cuda:" + ",".join(map(str, range(len(wanted)))))


class Hand:
    """A worker as its parent sees it."""

    def __init__(self, name: str, device: str, cfg: Config, args: tuple):
        spawn = multiprocessing.get_context("spawn")
        self.name, self.role, self.load, self.limit_s = name, name.rstrip("0123456789"), 0, cfg.faults.stall_s
        self.ready = self.stopped = False
        self.why = ""                                    # why it died or was killed, where that is known
        self.pulse = torch.tensor([time.monotonic(), 0.0], dtype=torch.float64).share_memory_()
        self.pipe, theirs = spawn.Pipe()
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as end:      # a message may stop in its middle, too
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(cfg.faults.stall_s) + 1, 0))
        self.process = spawn.Process(target=guarded, name=name, daemon=True,
                                     args=(name, theirs, self.pulse, f"{cfg.out}/{name}.log", cfg, device, args))
        self.process.start()
        theirs.close()

    def send(self, order: str, body=None) -> None:
        """An order. To a worker that does not read any more there is nothing to say: the end of its pipe says why."""
        if not select.select([], [self.pipe], [], self.limit_s)[1]:
            self.kill(f"has not read its orders for {self.limit_s:g} s (--faults.stall-s)")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((order, body))

    def kill(self, why: str) -> None:
        self.why = why
        self.process.kill()
        self.process.join()

"""
Worker processes: how one starts, which cores or GPUs it uses, and how its end reaches the parent.

A worker is any function (cfg, link, *args, device, dtype) that can be pickled. Processes are
started by the forkserver method of torch.multiprocessing: one process imports the large libraries
and every worker is a copy of it, so that they are imported once and not by each.

What is left out: what a worker does, and what is done about its death (control/).
Tests: tests/test_pipeline.py, tests/test_faults.py
"""
from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from config import Config, compute_dtype
from data.printable import PrintableFile
from transport.link import Incurable, Link, ParentGone

Worker = Callable[..., None]

YIELD = 5                      # how much nicer the engine hf is than the others: nice(2)

# What the server imports before it makes the first copy: libraries, none of which uses a GPU when
# it is imported. A copy of a process that has used one could not.
PRELOADED = ["torch", "transformers.models.auto.modeling_auto", "transformers.generation"]


def processes() -> Any:
    """How processes and their pipes are made."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_server() -> None:
    """Let the server import its libraries now, while the parent has other things to do."""
    processes()
    forkserver.ensure_running()


# -- in the new process --------------------------------------------------------------------------

def worker_main(role: str, index: int, worker: Worker, pipe: Connection, pulse: Tensor, log: str,
                cfg: Config, device: str, args: tuple) -> None:
    """The target of a worker's process. Whatever the worker raises is sent to the parent."""
    device = begin(log, device)
    if device == "cpu":
        use_cores(role, index, cfg)
    link = Link(pipe, pulse)
    link.wait_for_turn()
    try:
        worker(cfg, link, *args, device, compute_dtype(cfg))
    except ParentGone:
        pass
    except BaseException as e:
        link.send("crash", traceback=traceback.format_exc(), incurable=isinstance(e, Incurable))
        raise


def begin(log: str, device: str) -> str:
    """What every process does first.

    It ends with its parent, leaves signals and the terminal to it, and sees only its own GPUs.
    Returns its device, by the name that is valid in this process.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # for the parent, which stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout = PrintableFile(1)                    # a traceback may hold text of a model
    sys.stderr = PrintableFile(2)
    if device == "cpu":
        return device
    visible, device = visible_gpus(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return device


def end_with_parent() -> None:
    """Wait for the parent's death and die of it, whatever this process is doing."""
    wait([torch.multiprocessing.parent_process().sentinel])
    os._exit(1)


def use_cores(role: str, index: int, cfg: Config) -> None:
    """The cores of a worker on a CPU: torch.set_num_threads, and for vLLM, which binds its threads
    to cores, their numbers. vLLM gets one while other roles work, so that the rest are free.

    The engine hf lets teacher and learner go first, which have work only if it has given them some.
    With an equal share of the cores it may run ahead of them, until most responses wait for the
    others and a step has few rows, each of which costs more then. So a run is faster, and its data
    fresher. vLLM needs its share: a row costs it more.
    """
    cores = sorted(os.sched_getaffinity(0))
    threads = threads_of(cfg, len(cores))
    torch.set_num_threads(threads)
    if cfg.schedule == "sync":
        bound = [cores[(index * threads + i) % len(cores)] for i in range(threads)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, bound)))
    elif role == "rollout":
        core = cores[index % max(1, len(cores) - 1)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
        if cfg.engine == "hf":
            os.nice(YIELD)


def threads_of(cfg: Config, cores: int) -> int:
    """Of each worker on a CPU. In a synchronous run one role works at a time and has all cores;
    otherwise a worker has half of them, since the others work too."""
    if cfg.schedule == "sync":
        return max(1, cores // max(cfg.rollouts, cfg.teachers, cfg.learners))
    return max(1, cores // 2)


def visible_gpus(device: str, visible: str | None) -> tuple[str, str]:
    """CUDA_VISIBLE_DEVICES of a worker, and the name of its device under it.

    `visible` is the parent's CUDA_VISIBLE_DEVICES. Example: cuda:4,5 -> ("4,5", "cuda:0,1").
    """
    numbers = device.removeprefix("cuda:").split(",")
    if visible:
        of_parent = visible.split(",")
        own = [of_parent[int(number)] for number in numbers]
    else:
        own = numbers
    renamed = ",".join(str(i) for i in range(len(numbers)))
    return ",".join(own), f"cuda:{renamed}"


# -- a worker, as its parent sees it -------------------------------------------------------------

def worker_name(role: str, index: int) -> str:
    """rollout0, teacher0, learner, learner1: the names in the log."""
    if role == "learner" and index == 0:
        return "learner"
    return f"{role}{index}"


class WorkerHandle:
    """A worker process, its pipe and its pulse."""

    def __init__(self, role: str, index: int, worker: Worker, args: tuple, device: str,
                 cfg: Config):
        self.role = role
        self.index = index
        self.name = worker_name(role, index)
        self.worker = worker
        self.args = args
        self.device = device
        self.cfg = cfg
        self.load = 0                        # slots that it has been sent and has not returned
        self.ready = False                   # its model is loaded
        self.stopped = False                 # its last order is done
        self.why = ""                        # why it died or was killed, where that is known
        pulse = [time.monotonic(), 0.0, 0.0]
        self.pulse = torch.tensor(pulse, dtype=torch.float64).share_memory_()
        context = processes()
        self.pipe, theirs = context.Pipe()
        limit_receive(self.pipe, cfg.faults.stall_s)
        self.process = context.Process(
            target=worker_main, name=self.name, daemon=True,
            args=(role, index, worker, theirs, self.pulse, f"{cfg.out}/{self.name}.log", cfg,
                  device, args))
        self.process.start()
        theirs.close()

    def successor(self) -> WorkerHandle:
        """A new process for the same work."""
        new = WorkerHandle(self.role, self.index, self.worker, self.args, self.device, self.cfg)
        new.let_load()
        return new

    def let_load(self) -> None:
        """Let it load its model; until then it waits."""
        self.pulse[2] = 1

    def send(self, order: str, body: Any = None) -> None:
        """Send an order. A worker that has ended gets none; the end of its pipe tells why."""
        limit_s = self.cfg.faults.stall_s
        _, writable, _ = select.select([], [self.pipe], [], limit_s)
        if not writable:
            self.kill(f"has not read its orders for {limit_s:g} s (--faults.stall-s)")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send((order, body))

    def receive(self) -> tuple[str, dict, list] | None:
        """A report: kind, body, spans. None if the worker has died, between two messages or within
        one.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def hurry(self) -> None:
        """Ask it to abandon what it is doing; Link.hurried."""
        self.pulse[1] = 1

    def kill(self, why: str) -> None:
        self.why = why
        self.process.kill()
        self.process.join()

    def end(self) -> str:
        """Wait until it is gone, and return why."""
        self.process.join(5)
        self.process.kill()
        self.process.join()
        return self.why or f"died with exit code {self.process.exitcode}"


def limit_receive(pipe: Connection, seconds: float) -> None:
    """Let a message that stops in its middle end with an OSError after about so many seconds."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        limit = struct.pack("ll", int(seconds) + 1, 0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


class WorkerPool:
    """All workers of a run."""

    def __init__(self):
        self.handles: list[WorkerHandle] = []

    def __iter__(self) -> Iterator[WorkerHandle]:
        return iter(self.handles)

    def add(self, handle: WorkerHandle) -> None:
        self.handles.append(handle)

    def replace(self, old: WorkerHandle, new: WorkerHandle) -> None:
        self.handles[self.handles.index(old)] = new

    def role(self, role: str) -> list[WorkerHandle]:
        return [h for h in self.handles if h.role == role]

    def broadcast(self, role: str, order: str, body: Any = None) -> None:
        """Send an order to every worker of a role."""
        for handle in self.role(role):
            handle.send(order, body)

    def by_pipe(self) -> dict[Connection, WorkerHandle]:
        """The workers that may still send something."""
        return {h.pipe: h for h in self.handles if not h.stopped}

    def close(self) -> None:
        """No process is left afterwards. Those that have stopped get five seconds to end."""
        for handle in self.handles:
            handle.process.join(5 if handle.stopped else 0)
            handle.process.kill()
        for handle in self.handles:
            handle.process.join()


# -- one function in a process of its own --------------------------------------------------------

def alone(fn: Callable, cfg: Config, data: object, device: str,
          limit_s: float | None = None) -> Any:
    """fn(cfg, data, device, dtype) in a process of its own, because a parent that has used a GPU
    keeps a part of its memory.

    Raises the ValueError that fn raises; RuntimeError if it ends in any other way; TimeoutError
    after `limit_s`.
    """
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=alone_main, args=(theirs, fn, cfg, data, device), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise TimeoutError(f"{fn.__module__}.{fn.__name__}: no answer within {limit_s} s")
        found = ours.recv()
    except EOFError:
        process.join()
        name = f"{fn.__module__}.{fn.__name__}"
        found = RuntimeError(f"{name} died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def alone_main(pipe: Connection, fn: Callable, cfg: Config, data: object, device: str) -> None:
    """The target of the process of `alone`."""
    device = begin(os.devnull, device)
    try:
        found = fn(cfg, data, device, compute_dtype(cfg))
    except ValueError as e:
        found = e
    except BaseException:
        name = f"{fn.__module__}.{fn.__name__}"
        pipe.send(RuntimeError(f"{name} crashed\n{traceback.format_exc()}"))
        raise
    pipe.send(found)

"""
Two processes that pass tensors: the learner, which sends, and one rollout worker, which receives.

Each pair is a process group of its own, outside of torch's default group, which the learners and
vLLM have for themselves. So a rollout worker that dies takes nobody along, and its successor makes
a new pair. The backend follows from the device: nccl between GPUs, gloo on a CPU.

What is left out: who sends what, and when (direct.py). Tests: tests/test_direct.py
"""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LIMIT_S = 30.0           # of one transfer: one whose other end neither dies nor answers is given up
PATIENCE = timedelta(hours=1)    # of NCCL's own watchdog, which would end the process
SENDER, RECEIVER = 0, 1


class Lost(Exception):
    """The other end is gone, or does not answer."""


class Pair:
    """One end of a pair; both ends must make it at the same time, and wait for each other."""

    def __init__(self, rank: int, meeting: str, device: torch.device):
        """`meeting`: a file that does not exist yet, through which both find each other. They
        listen on the loopback interface only."""
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        self.device = device
        store = dist.FileStore(meeting, 2)
        try:
            self.group = new_group(store, rank, device)
            first = torch.zeros(1, dtype=torch.uint8, device=device)
            if rank == SENDER:           # NCCL connects at the first transfer, in which both wait
                work = self.group.send([first], RECEIVER, 0)
            else:
                work = self.group.recv([first], SENDER, 0)
        except RuntimeError as e:
            raise Lost(str(e)) from e
        try:
            self.finish(work, alive=lambda: True)
        except Lost:
            self.give_up()
            raise

    def begin_to_receive(self, x: Tensor) -> dist.Work:
        try:
            return self.group.recv([x], SENDER, 0)
        except RuntimeError as e:
            raise Lost(str(e)) from e

    def send(self, x: Tensor, alive: Callable[[], bool]) -> None:
        try:
            work = self.group.send([x], RECEIVER, 0)
        except RuntimeError as e:
            raise Lost(str(e)) from e
        self.finish(work, alive)

    def finish(self, work: dist.Work, alive: Callable[[], bool]) -> None:
        """Until the transfer is done. Raises Lost, and then this pair must be given up.

        gloo notices a process that has died. NCCL would wait for ever, so `alive` is asked
        meanwhile.
        """
        end = time.monotonic() + LIMIT_S
        try:
            if self.device.type == "cpu":
                work.wait(timedelta(seconds=LIMIT_S))
                return
            while not work.is_completed():
                if not alive() or time.monotonic() > end:
                    raise Lost("a transfer was not completed")
                time.sleep(1e-4)
            work.wait()                              # what this thread queues next comes after it
        except RuntimeError as e:
            raise Lost(str(e)) from e

    def give_up(self) -> None:
        """End whatever is under way, on the GPU too."""
        with contextlib.suppress(RuntimeError):
            self.group.abort()


def new_group(store: dist.Store, rank: int, device: torch.device) -> dist.ProcessGroup:
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=LIMIT_S))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = PATIENCE
    return dist.ProcessGroupNCCL(store, rank, 2, options)

"""
Published weights: how the student gets from the learner to the rollout workers.

A transport is anything with the methods of `WeightTransport`; TRANSPORTS holds them by name, and
IN_USE is the one that runs use. There is one, shared memory on the same machine.

What is left out: other machines; copies from GPU to GPU. Tests: tests/test_cache.py
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from transport.checksum import checksum
from transport.published import Published


class WeightTransport(Protocol):
    """Made by the parent and passed to every worker. The learner publishes, the rollouts read.

    probe   a fixed sequence of tokens. With each version the learner publishes its log-probs of
            them, and a checksum of each tensor; an engine that has loaded the version proves it by
            reproducing these numbers.
    """
    probe: list[int]

    @property
    def version(self) -> int:
        """The newest published version; -1 before the first."""

    @property
    def nbytes(self) -> int:
        """Bytes of one version."""

    def publish(self, parameters: dict[str, Tensor], version: int, probe_logp: Tensor,
                gather: Callable[[Tensor], Tensor]) -> None:
        """Make a version readable. `gather` makes a parameter whole that is sharded."""

    def holds(self, version: int) -> bool:
        """Can this version still be read, or will it be, once it is published?"""

    def read(self, version: int | None = None) -> Published:
        """The newest version, or exactly the one asked for. Its tensors may be read in place:
        whoever has used them asks `holds` afterwards whether they were still those."""


def unsharded(parameter: Tensor) -> Tensor:
    """The `gather` of a learner that holds all parameters."""
    return parameter


class Weights:
    """Two versions in shared memory, so that a reader never keeps a half-written one.

    flat         [2, P] in the dtype the engines compute in; version v lies in half v % 2
    probe_logp   [2, len(probe) - 1], of the version in the same half
    checksums    [2, number of tensors], of the version in the same half
    clock        [2]: the version being written, and the newest that is published
    """

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype):
        self.layout = layout
        self.probe = probe
        size = sum(shape.numel() for shape in layout.values())
        self.flat = torch.zeros(2, size, dtype=dtype).share_memory_()
        self.probe_logp = torch.zeros(2, len(probe) - 1).share_memory_()
        self.checksums = torch.zeros(2, len(layout), dtype=torch.int64).share_memory_()
        self.clock = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    @property
    def version(self) -> int:
        return int(self.clock[1])

    @property
    def nbytes(self) -> int:
        return self.flat[0].nbytes

    def holds(self, version: int) -> bool:
        return int(self.clock[0]) < version + 2

    def views(self, half: int) -> dict[str, Tensor]:
        """The parameters in one of the halves, by name."""
        views = {}
        start = 0
        for name, shape in self.layout.items():
            end = start + shape.numel()
            views[name] = self.flat[half, start:end].view(shape)
            start = end
        return views

    def publish(self, parameters: dict[str, Tensor], version: int, probe_logp: Tensor,
                gather: Callable[[Tensor], Tensor] = unsharded) -> None:
        assert parameters.keys() == self.layout.keys(), parameters.keys() ^ self.layout.keys()
        half = version % 2
        self.clock[0] = version
        for i, (name, view) in enumerate(self.views(half).items()):
            whole = gather(parameters[name].detach())
            if whole.is_cuda:                    # cast there, so that half of the bytes travel
                whole = whole.to(view.dtype)
            view.copy_(whole)
            self.checksums[half, i] = checksum(whole if whole.is_cuda else view)
        self.probe_logp[half] = probe_logp
        self.clock[1] = version

    def read(self, version: int | None = None) -> Published:
        """The tensors are views."""
        while True:
            wanted = self.version if version is None else version
            assert wanted >= 0, "nothing is published yet"
            half = wanted % 2
            checksums = dict(zip(self.layout, self.checksums[half].tolist()))
            probe_logp = self.probe_logp[half].clone()
            if self.holds(wanted):
                return Published(wanted, self.views(half), checksums, probe_logp)
            assert version is None, (f"version {version} was overwritten by {int(self.clock[0])} "
                                     "while it was read")


TRANSPORTS: dict[str, Callable[..., WeightTransport]] = {"shared-memory": Weights}
IN_USE = "shared-memory"

"""
What every transport of weights promises, and what those here have in common: the two newest
versions of the student, and a clock in shared memory that tells which of them can be read.

What is left out: where the numbers lie and how they travel (weights.py, direct.py).
Tests: tests/test_cache.py, tests/test_direct.py
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from transport.checksum import copy_and_sum
from transport.published import Published

ALIGNED = 64             # bytes: no word of a checksum and no line of a cache spans two tensors


class WeightTransport(Protocol):
    """Made by the parent and passed to every worker. The learner publishes, the rollouts read.

    layout  the shapes of the published tensors, by name
    probe   a fixed sequence of tokens. With each version the learner publishes its log-probs of
            them, and a checksum of each tensor; an engine that has loaded the version proves it by
            reproducing these numbers.
    """
    layout: dict[str, torch.Size]
    probe: list[int]

    @property
    def version(self) -> int:
        """The newest published version; -1 before the first."""

    @property
    def nbytes(self) -> int:
        """Bytes of one version."""

    def attach(self, device: str) -> None:
        """First call of a process that publishes or reads: where its model computes."""

    def publish(self, parameters: Mapping[str, Tensor], version: int, probe_logp: Tensor,
                gather: Callable[[Tensor], Tensor]) -> None:
        """Make a version readable. `gather` makes a parameter whole that is sharded."""

    def holds(self, version: int) -> bool:
        """Can this version still be read, or will it be, once it is published?"""

    def read(self, version: int | None = None) -> Published:
        """The newest version, or exactly the one asked for. Its tensors may be read in place:
        whoever has used them asks `holds` afterwards whether they were still those."""

    def close(self) -> None:
        """The last call of the learner: what is being read may be read to its end."""


def unsharded(parameter: Tensor) -> Tensor:
    """The `gather` of a learner that holds all parameters."""
    return parameter


class TwoVersions(ABC):
    """Version v lies in half v % 2, so that a reader never keeps a half-written one.

    starts       by name, where a tensor begins in a half: numbers, not bytes
    size         numbers of a half
    probe_logp   [2, len(probe) - 1], of the version in the same half
    checksums    [2, number of tensors], of the version in the same half
    clock        [2]: the version being written, and the newest that is published

    These tensors lie in shared memory. A subclass has the halves themselves: `write` and `tensors`.
    """

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype):
        self.layout = layout
        self.probe = probe
        self.dtype = dtype
        self.starts, self.size = arranged(layout, dtype)
        self.probe_logp = torch.zeros(2, len(probe) - 1).share_memory_()
        self.checksums = torch.zeros(2, len(layout), dtype=torch.int64).share_memory_()
        self.clock = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    @property
    def version(self) -> int:
        return int(self.clock[1])

    @property
    def nbytes(self) -> int:
        return sum(shape.numel() for shape in self.layout.values()) * self.dtype.itemsize

    def holds(self, version: int) -> bool:
        return int(self.clock[0]) < version + 2

    def publish(self, parameters: Mapping[str, Tensor], version: int, probe_logp: Tensor,
                gather: Callable[[Tensor], Tensor] = unsharded) -> None:
        assert parameters.keys() == self.layout.keys(), parameters.keys() ^ self.layout.keys()
        half = version % 2
        self.clock[0] = version
        self.checksums[half] = self.write(half, parameters, gather)
        self.probe_logp[half] = probe_logp
        self.clock[1] = version

    @abstractmethod
    def write(self, half: int, parameters: Mapping[str, Tensor],
              gather: Callable[[Tensor], Tensor]) -> Tensor:
        """Fill a half; returns the checksums [number of tensors] once all of it is there."""

    @abstractmethod
    def tensors(self, half: int) -> Mapping[str, Tensor]:
        """What lies in a half, by name."""

    def read(self, version: int | None = None) -> Published:
        while True:
            wanted = self.version if version is None else version
            assert wanted >= 0, "nothing is published yet"
            half = wanted % 2
            checksums = dict(zip(self.layout, self.checksums[half].tolist()))
            probe_logp = self.probe_logp[half].clone()
            if self.holds(wanted):
                return Published(wanted, self.tensors(half), checksums, probe_logp)
            assert version is None, (f"version {version} was overwritten by {int(self.clock[0])} "
                                     "while it was read")

    def cut(self, name: str, flat: Tensor, first: int = 0) -> Tensor:
        """One of the parameters in `flat`, which begins at number `first` of a half."""
        shape = self.layout[name]
        start = self.starts[name] - first
        return flat[start:start + shape.numel()].view(shape)


def arranged(layout: dict[str, torch.Size], dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Where each tensor begins in a flat one, in numbers, and how long that is."""
    step = ALIGNED // dtype.itemsize
    starts = {}
    size = 0
    for name, shape in layout.items():
        starts[name] = size
        size += -(-shape.numel() // step) * step
    return starts, size


def fill(views: Mapping[str, Tensor], parameters: Mapping[str, Tensor],
         gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Copy all parameters and return their checksums, in the order of `views`. Of a GPU nothing is
    awaited but the checksums, which it computes after the last copy."""
    sums = [copy_and_sum(view, gather(parameters[name].detach())) for name, view in views.items()]
    return torch.stack(sums).cpu()

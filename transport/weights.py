"""
Published weights: how the student gets from the learner to the rollout workers.

A transport is anything with the methods of `WeightTransport` (versions.py), made as
NAME(layout, probe, dtype, folder). TRANSPORTS holds them by the names that --transport takes:

    shared  the host's memory: the learner writes, every rollout worker reads in place
    nccl    from the learner's GPU to a rollout worker's (direct.py)

What is left out: other machines. Tests: tests/test_cache.py
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transport.direct import DirectWeights
from transport.pinned import pin
from transport.versions import TwoVersions, WeightTransport, fill


class Weights(TwoVersions):
    """Two versions in shared memory.

    flat         [2, size] in the dtype the engines compute in; version v lies in half v % 2
    """

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype,
                 folder: str = ""):
        """`folder`: the run's, in which processes may meet. They have no need to, here."""
        super().__init__(layout, probe, dtype)
        self.flat = torch.zeros(2, self.size, dtype=dtype).share_memory_()

    def attach(self, device: str) -> None:
        """A GPU copies to and from pinned memory several times as fast, and without the CPU."""
        if device.startswith("cuda"):
            pin(self.flat, device)

    def views(self, half: int) -> dict[str, Tensor]:
        """The parameters in one of the halves, by name."""
        return {name: self.cut(name, self.flat[half]) for name in self.layout}

    def tensors(self, half: int) -> Mapping[str, Tensor]:
        return self.views(half)

    def write(self, half: int, parameters: Mapping[str, Tensor],
              gather: Callable[[Tensor], Tensor]) -> Tensor:
        return fill(self.views(half), parameters, gather)

    def close(self) -> None:
        """The memory stays for those who read it."""


TRANSPORTS: dict[str, Callable[..., WeightTransport]] = {"shared": Weights, "nccl": DirectWeights}

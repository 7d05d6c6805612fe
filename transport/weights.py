"""
Published weights.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Weights:
    """One shared copy of the student with a version, double-buffered: a reader never keeps a half-written one.

    flat [2, P] in the dtype the engines compute in; version v lives in half v % 2. `probe` is a fixed sequence of
    tokens and `probe_logp` [2, len - 1] the learner's log-probs of it at that version: an engine that has loaded v
    proves it by reproducing them.
    """

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype):
        self.layout, self.probe = layout, probe
        self.flat = torch.zeros(2, sum(s.numel() for s in layout.values()), dtype=dtype).share_memory_()
        self.probe_logp = torch.zeros(2, len(probe) - 1).share_memory_()
        self.clock = torch.full((2,), -1, dtype=torch.int64).share_memory_()      # being written, published

    @property
    def version(self) -> int:
        return int(self.clock[1])

    def views(self, half: int) -> dict[str, Tensor]:
        out, at = {}, 0
        for name, shape in self.layout.items():
            out[name] = self.flat[half, at:at + shape.numel()].view(shape)
            at += shape.numel()
        return out

    def publish(self, parameters: dict[str, Tensor], version: int, probe_logp: Tensor,
                whole: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Write the half of `version`. `whole` gathers a parameter that is sharded, one at a time."""
        assert parameters.keys() == self.layout.keys(), parameters.keys() ^ self.layout.keys()
        self.clock[0] = version
        for name, view in self.views(version % 2).items():
            view.copy_(whole(parameters[name].detach()))
        self.probe_logp[version % 2] = probe_logp
        self.clock[1] = version

    def read(self, version: int | None = None) -> tuple[int, dict[str, Tensor], Tensor]:
        """(version, copies of the tensors, the probe's log-probs): the newest, or exactly the one asked for."""
        while True:
            v = self.version if version is None else version
            assert v >= 0, "nothing is published yet"
            copies = {name: x.clone() for name, x in self.views(v % 2).items()}
            probe_logp = self.probe_logp[v % 2].clone()
            if self.clock[0] < v + 2:                    # else the learner has begun to overwrite this half
                return v, copies, probe_logp
            assert version is None, f"version {version} was overwritten by {int(self.clock[0])} while it was read"

"""
One version of the student on its way from the learner to a rollout worker, whatever the transport.

Tests: tests/test_push.py, tests/test_cache.py
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from transport.checksum import Shown, checksum, some_columns


@dataclass(frozen=True)
class Published:
    """One version of the student, as a rollout worker reads it."""
    version: int
    tensors: Mapping[str, Tensor]    # by name; the learner overwrites them two versions later
    checksums: dict[str, int]        # of the same names, of what the learner meant to publish
    probe_logp: Tensor               # [len(probe) - 1]

    def checksum_like(self, shown: Shown) -> int:
        """Of the part of a tensor that an engine has shown. In a product with rows of the identity,
        by which it shows columns, -0 is 0."""
        if shown.whole:
            return self.checksums[shown.name]
        x = self.tensors[shown.name]
        return checksum(x[:, some_columns(x.shape[1], self.version)] + 0)

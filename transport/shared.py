"""
What the parent allocates once and passes to every worker.

What is left out: what lies in a slot (cache.py), how weights travel (weights.py).
Tests: tests/test_pipeline.py
"""
from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cache import Slots
from transport.versions import WeightTransport


@dataclass(frozen=True)
class SharedMemory:
    """Plain shared CPU memory, the same with and without a GPU."""
    slots: Slots
    weights: WeightTransport
    tensors: dict[str, Tensor] = field(default_factory=dict)      # of the extensions, by name
    eval_prompts: list[list[int]] = field(default_factory=list)   # token ids; copied, not shared


@dataclass(frozen=True)
class LearnerStart:
    """How one of the learners begins."""
    rank: int = 0
    checkpoint: str = ""         # folder from which the run continues; "" at its beginning
    version: int = 0             # of the weights that it publishes first

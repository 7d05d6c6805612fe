"""
Small tables of numbers on their way from Python to where a model computes.

Tests: tests/test_to_device.py
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: np.typing.ArrayLike, device: torch.device | str) -> Tensor:
    """An int64 tensor of these numbers, in the same shape.

    On a GPU the copy starts from pinned memory and nobody waits for it. A copy from ordinary memory would first wait
    for all that the GPU has still to do: for a whole forward pass, in every step of an engine.
    """
    x = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    if torch.device(device).type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)

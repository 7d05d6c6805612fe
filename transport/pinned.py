"""
Memory of the host that a GPU may reach by itself.

torch pins memory that it allocates. What several processes share is allocated already, so that each
of them registers it with its own CUDA context. Tests: tests/test_direct.py
"""
from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor


def pin(x: Tensor, device: str) -> bool:
    """Register the memory of x for this process. Returns whether that worked: without it, copies
    are as right, only slower, so that a limit on locked memory (ulimit -l) ends no run."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))
        if code == 0:
            return True
        # CUDA reports an error once more, to whoever asks next: that must not be the training
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
    print(f"{x.nbytes / 1e9:.1f} GB of published weights could not be pinned (CUDA error {code}): "
          "copies to and from the GPU are slower", file=sys.stderr)
    return False

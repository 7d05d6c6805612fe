"""
Checksums of tensors, by which an engine proves that it holds the weights that were published.

Tests: tests/test_push.py
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**20            # numbers at a time, a multiple of those in 8 bytes


@torch.no_grad()
def checksum(x: Tensor) -> int:
    """A number that depends on every bit of x and on its place: the sum over words of 8 bytes of
    word times an odd number of its own, modulo 2^64. One word that differs always changes it.

    The work is done where x lies. -0 counts as 0: an engine that shows its weights as a product
    with the identity matrix cannot tell them apart.
    """
    flat = x.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    first = 0                                    # index of a chunk's first word
    for chunk in flat.split(CHUNK):
        chunk = chunk + 0                        # -0 + 0 = 0; and a copy is aligned to words
        words = pad(chunk, (0, -len(chunk) % (8 // x.itemsize))).view(torch.int64)
        odd = torch.arange(2 * first + 1, 2 * (first + len(words)), 2, device=x.device)
        total += (words * odd).sum()             # int64 wraps around
        first += len(words)
    return int(total)

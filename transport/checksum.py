"""
Checksums of tensors, by which an engine proves that it holds the weights that were published.

Tests: tests/test_push.py
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**20            # numbers at a time, a multiple of those in 8 bytes
COLUMNS = 64             # of a matrix that an engine can show only in parts


@dataclass(frozen=True)
class Shown:
    """What an engine shows of one tensor that was published."""
    name: str
    checksum: int        # of the tensor as the engine computes with it
    whole: bool = True   # else of `some_columns` of it


def some_columns(width: int, version: int) -> Tensor:
    """Which columns of a matrix of `width` are shown of this version: at most COLUMNS, drawn anew
    for every version. A matrix that is missing, stale or in the place of another differs in nearly
    all of its columns."""
    g = torch.Generator().manual_seed(version)
    return torch.randperm(width, generator=g)[:COLUMNS]


@torch.no_grad()
def checksum(x: Tensor) -> int:
    """A number that depends on every bit of x and on its place: the sum over words of 8 bytes of
    word times an odd number of its own, modulo 2^64. One word that differs always changes it.

    The work is done where x lies. -0 counts as 0: an engine that shows its weights as a product
    with the identity matrix cannot tell them apart.
    """
    in_word = 8 // x.itemsize
    most = -(-min(x.numel(), CHUNK) // in_word)
    odd = torch.arange(1, 2 * most, 2, device=x.device)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    first = 0                                    # index of a chunk's first word
    for chunk in x.reshape(-1).split(CHUNK):
        chunk = chunk + 0                        # -0 + 0 = 0; and a copy is aligned to words
        words = pad(chunk, (0, -len(chunk) % in_word)).view(torch.int64)
        total += (words * odd[:len(words)]).sum() + 2 * first * words.sum()  # int64 wraps around
        first += len(words)
    return int(total)

"""
Checksums of tensors, by which an engine proves that it holds the weights that were published.

Tests: tests/test_push.py
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 8                 # bytes
WIDTH = 4096             # words in a row of the grid in which a tensor's words are summed
ROWS = 16                # of the grid at a time on a CPU: half a megabyte, which a cache holds
COLUMNS = 64             # of a matrix that an engine can show only in parts


@dataclass(frozen=True)
class Shown:
    """What an engine shows of one tensor that was published."""
    name: str
    checksum: int        # of the tensor as the engine computes with it
    whole: bool = True   # else of `some_columns` of it


def some_columns(width: int, version: int) -> Tensor:
    """Which columns of a matrix of `width` are shown of this version: at most COLUMNS, other
    ones for every version. A matrix that is missing, stale or in the place of another differs in nearly
    all of its columns."""
    g = torch.Generator().manual_seed(version)
    return torch.randperm(width, generator=g)[:COLUMNS]


def checksum(x: Tensor) -> int:
    """A number that depends on every bit of x and on its place: the sum over words of 8 bytes of
    word number i times 2 i + 1, modulo 2^64. One word that differs always changes it."""
    return int(word_sum(x))


@torch.no_grad()
def word_sum(x: Tensor) -> Tensor:
    """`checksum` where x lies, for which nobody waits yet: an int64 without dimensions."""
    grid = Grid(x.device)
    for block in blocks(x.contiguous().view(-1)):
        grid.add(block)
    return grid.total()


@torch.no_grad()
def copy_and_sum(target: Tensor, source: Tensor) -> Tensor:
    """Copy `source`, cast if the dtypes differ; returns `word_sum` of the target.

    On a CPU the sums read what was just written from the cache. Between a GPU and pinned memory
    the copy is still under way when this returns; work that is queued behind it on the GPU, such
    as reading the sum, waits for it.
    """
    assert target.shape == source.shape, (target.shape, source.shape)
    if source.is_cuda and not target.is_cuda:        # cast there, so that fewer bytes travel
        source = source.to(target.dtype)
        target.copy_(source, non_blocking=True)
        return word_sum(source)
    if target.is_cuda or not target.is_contiguous():
        target.copy_(source, non_blocking=True)
        return word_sum(target)
    grid = Grid(target.device)
    for written, read in zip(blocks(target.view(-1)), blocks(source.reshape(-1), target.dtype)):
        written.copy_(read)
        grid.add(written)
    return grid.total()


class Grid:
    """The words of a tensor in rows of WIDTH, summed over rows and over columns.

    The word in row r and column c is number i = r * WIDTH + c, so the sum of word times 2 i + 1 is
    that of row sums times 2 r * WIDTH and of column sums times 2 c + 1: almost all of the work is
    plain sums, which run as fast as memory is read.
    """

    def __init__(self, device: torch.device):
        self.of_columns = torch.zeros(WIDTH, dtype=torch.int64, device=device)
        self.of_rows: list[Tensor] = []

    def add(self, block: Tensor) -> None:
        """The next numbers: rows without a gap, of which only the tensor's last may be short."""
        missing = -len(block) % numbers_in_a_row(block.dtype)
        if missing or block.storage_offset() * block.itemsize % WORD:
            block = pad(block, (0, missing)).clone()         # a copy is aligned to words
        words = block.view(torch.int64).view(-1, WIDTH)
        self.of_columns += words.sum(0)                      # int64 wraps around
        self.of_rows.append(words.sum(1))

    def total(self) -> Tensor:
        rows = torch.cat(self.of_rows)
        odd = torch.arange(1, 2 * WIDTH, 2, device=rows.device)
        first = torch.arange(len(rows), device=rows.device) * (2 * WIDTH)
        return (self.of_columns * odd).sum() + (rows * first).sum()


def numbers_in_a_row(dtype: torch.dtype) -> int:
    return WIDTH * WORD // dtype.itemsize


def blocks(x: Tensor, like: torch.dtype | None = None) -> Iterator[Tensor]:
    """x [n] in pieces of ROWS rows, on a GPU in one piece, and the last row if it is short. `like`:
    in the pieces of a tensor of that dtype."""
    row = numbers_in_a_row(like or x.dtype)
    whole = len(x) // row * row
    step = whole if x.is_cuda else ROWS * row
    for start in range(0, whole, max(1, step)):
        yield x[start:min(start + step, whole)]
    if whole < len(x):
        yield x[whole:]

"""
What has been drawn for the responses in an engine: a row of preallocated tensors for each.

A step of the engine is written by one indexed copy per tensor, however many responses there are.
Every position carries the version of the weights that drew it, since weights may change while a
response is in the engine.
What is left out: drawing itself (sampling.py).
Shapes: R responses written in a step; C words per position; L tokens. Tests: tests/test_drawn.py
"""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from draws import Chosen
from engines.to_device import to_device


class Drawn(NamedTuple):
    """L tokens of a response, on the CPU: the emitted ones [L]; the words that were chosen and
    their logpi [L, C]; logmu [L] of the emitted ones; versions [L] of the weights that drew them.
    """
    tokens: Tensor
    ids: Tensor
    logpi: Tensor
    logmu: Tensor
    versions: Tensor


class Tables(NamedTuple):
    """ids, logpi [rows, length, C]; logmu, versions [rows, length]."""
    ids: Tensor
    logpi: Tensor
    logmu: Tensor
    versions: Tensor


class DrawnTable:
    """A row for each response. The tables grow as they are needed."""

    def __init__(self, device: torch.device | str):
        self.device = device
        self.version = 0                         # of the weights that draw from now on
        self.free: list[int] = []
        self.row: dict[Hashable, int] = {}       # of each response that has been written
        self.tables = self.zeros(0, 0, 1)

    def zeros(self, rows: int, length: int, columns: int) -> Tables:
        ids = torch.zeros(rows, length, columns, dtype=torch.int64, device=self.device)
        logmu = torch.zeros(rows, length, device=self.device)
        return Tables(ids, torch.zeros(ids.shape, device=self.device), logmu, logmu.long())

    def write(self, keys: Sequence[Hashable], offsets: Sequence[int], chosen: Chosen) -> None:
        """One position of each of R responses, the `offset`-th that was drawn for it, by weights
        of `self.version`; what stood there is replaced."""
        self.make_room(keys, max(offsets) + 1, chosen.ids.shape[1])
        for key in keys:
            if key not in self.row:
                self.row[key] = self.free.pop()
        numbers = [[self.row[key] for key in keys], offsets, [self.version] * len(keys)]
        rows, at, versions = to_device(numbers, self.device)
        for table, x in zip(self.tables, (*chosen, versions)):
            table[rows, at] = x

    def take(self, key: Hashable, length: int) -> Drawn:
        """The first `length` positions of a response, which is then forgotten."""
        tables = self.tables
        row = self.row.pop(key, None)
        if row is None:                          # nothing has been drawn for it yet
            assert length == 0, f"{length} tokens of {key!r}, which was never written"
            row = 0
            tables = self.zeros(1, 0, tables.ids.shape[2])
        else:
            self.free.append(row)
        ids, logpi, logmu, versions = (x[row, :length].to("cpu", copy=True) for x in tables)
        return Drawn(ids[:, 0], ids, logpi, logmu, versions)

    def make_room(self, keys: Sequence[Hashable], length: int, columns: int) -> None:
        """Grow to at least twice the rows, or twice the length, if these responses do not fit."""
        if columns != self.tables.ids.shape[2]:  # an evaluation begins or ends
            assert not self.row, "responses with another number of words per position are running"
            self.free = []
            self.tables = self.zeros(0, 0, columns)
        rows, room = self.tables.logmu.shape
        lacking = sum(key not in self.row for key in keys) - len(self.free)
        if lacking <= 0 and length <= room:
            return
        more = max(lacking, rows) if lacking > 0 else 0
        if length > room:
            length = max(length, 2 * room)
        else:
            length = room
        grown = self.zeros(rows + more, length, columns)
        for new, old in zip(grown, self.tables):
            new[:rows, :room] = old
        self.tables = grown
        self.free += range(rows, rows + more)

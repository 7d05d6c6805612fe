"""
The keys and values of the responses in the engine hf: two tensors per layer, which stay in place.

transformers' own cache appends by copying, all of it at every token. Here a new token is written
into its place, and a response that leaves gives its row to the last one. Every response begins in
column 0; what is right of its last token is never read.
What is left out: sliding windows, linear attention, pages.
Shapes: R rows in use, one per response; n of them are new; T tokens of each; H heads; D numbers per
head. Tests: tests/test_kv_cache.py
"""
from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from engines.to_device import to_device


class KVCache(Cache):
    """A forward pass either reads new rows (`read`) or adds one token to every row (`extend`)."""

    def __init__(self, most_rows: int, most_columns: int):
        """`most_rows`, `most_columns`: beyond these nothing is kept in store."""
        super().__init__(layers=[])
        self.most = (most_rows, most_columns)
        self.rows = 0                            # in use: the first ones of every tensor
        self.width = 0                           # columns that the pass attends to
        self.new = 0                             # rows that the pass reads; 0: it extends all rows
        self.at: list[int] = []                  # [R], the column of each row's next token
        self.place: dict[torch.device, Tensor] = {}              # [2, R], rows and columns of these
        # By layer, as far as it has some of its own: [rows or more, H, columns or more, D]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def read(self, n: int, T: int) -> None:
        """The next pass reads n new rows of T tokens, padded on the right."""
        self.rows += n
        self.new = n
        self.width = T

    def extend(self, at: list[int]) -> None:
        """The next pass adds a token to every row. at [R]: its column."""
        self.new = 0
        self.width = max(at) + 1
        self.at = at
        self.place = {}

    def mask(self, device: torch.device) -> Tensor:
        """Which columns hold tokens of each row once these are added, bool [R, width]."""
        return torch.arange(self.width, device=device) <= self.places(device)[1][:, None]

    def places(self, device: torch.device) -> Tensor:
        """Rows and columns of the tokens that the next pass adds, [2, R]."""
        if device not in self.place:
            self.place[device] = to_device([list(range(self.rows)), self.at], device)
        return self.place[device]

    def remove(self, gone: list[int]) -> list[int]:
        """Give rows up. The last ones move to their places: returns the old index of every row."""
        stay = self.rows - len(gone)
        order = list(range(stay))
        holes = [i for i in gone if i < stay]
        movers = sorted(set(range(stay, self.rows)) - set(gone))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            stored = (*self.keys.values(), *self.values.values())
            moves = {device: to_device([holes, movers], device) for device in {x.device for x in stored}}
            for x in stored:
                to, of = moves[x.device]
                x[to] = x[of]
        self.rows = stay
        return order

    # -- what transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int,
               *unused) -> tuple[Tensor, Tensor]:
        """Keep what a layer has computed, [n or R, H, T, D]; returns the keys and values that it
        attends to: of new rows their own, else those of the first `width` columns."""
        keys = self.large_enough(self.keys.get(layer_idx, key_states[:0, :, :0]))
        values = self.large_enough(self.values.get(layer_idx, value_states[:0, :, :0]))
        self.keys[layer_idx] = keys
        self.values[layer_idx] = values
        if self.new:
            rows = slice(self.rows - self.new, self.rows)
            keys[rows, :, :self.width] = key_states
            values[rows, :, :self.width] = value_states
            return key_states, value_states
        rows, columns = self.places(keys.device)
        keys[rows, :, columns] = key_states[:, :, 0]
        values[rows, :, columns] = value_states[:, :, 0]
        return keys[:self.rows, :, :self.width], values[:self.rows, :, :self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.new else self.width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0

    def large_enough(self, x: Tensor) -> Tensor:
        """Twice the rows, or columns, or as many as there can be, where the pass does not fit."""
        rows, H, columns, D = x.shape
        if rows >= self.rows and columns >= self.width:
            return x
        most_rows, most_columns = self.most
        if self.rows > rows:
            more_rows = max(self.rows, min(2 * rows, most_rows))
        else:
            more_rows = rows
        if self.width > columns:
            more_columns = max(self.width, min(2 * columns, most_columns))
        else:
            more_columns = columns
        # Zeros: a masked column has weight 0, and 0 times what memory happens to hold may be nan
        grown = x.new_zeros(more_rows, H, more_columns, D)
        grown[:rows, :, :columns] = x
        return grown

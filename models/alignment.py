"""
models.alignment
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cache import Segment


def pad(segments: list[Segment], device) -> tuple[Tensor, Tensor]:
    """Right-padded token ids [B, L] and their mask, bool. Example: tokens 5 6 7 and 8 9 -> [[5,6,7],[8,9,0]]."""
    tokens = torch.nn.utils.rnn.pad_sequence([s.tokens.long() for s in segments], batch_first=True)
    length = torch.tensor([[len(s.tokens)] for s in segments])
    return tokens.to(device), (torch.arange(tokens.shape[1]) < length).to(device)


def response_rows(hidden: Tensor, segments: list[Segment]) -> Tensor:
    """The one shift: hidden states [B, L, H] -> [M, H], row m being the state that *predicts* new token m.

    Token y_t sits at index start + t, so the state one index before it predicts it. Rows come in the order of the
    segments, each with its len(segment) new tokens, M in all: the order of torch.cat([s.ids for s in segments]).
    """
    return torch.cat([hidden[b, s.start - 1:s.start - 1 + len(s)] for b, s in enumerate(segments)])


def kept_rows(rows: Tensor, segments: list[Segment]) -> Tensor:
    """Of a row per new token, [M, ..], those of the tokens whose scores are cached: the order of their cached rows."""
    if segments[0].kept is None:                         # then they all are, of every segment
        return rows
    return rows[torch.cat([s.kept for s in segments]).to(rows.device)]


def by_length(segments: list[Segment], token_budget: int) -> Iterator[list[Segment]]:
    """Micro-batches of similar length, at most token_budget padded tokens each (or one segment, if longer)."""
    group: list[Segment] = []
    for s in sorted(segments, key=lambda s: -len(s.tokens)):
        if group and len(group[0].tokens) * (len(group) + 1) > token_budget:
            yield group
            group = []
        group.append(s)
    if group:
        yield group


def one_segment(tokens: list[int]) -> Segment:
    """A sequence as if all of it but the first token were a response."""
    blank = torch.empty(len(tokens) - 1, 0)
    return Segment(-1, torch.tensor(tokens), 1, 1, blank, blank, blank, blank, blank)

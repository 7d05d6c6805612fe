"""
Alignment: which hidden state predicts which token, and segments as rectangular batches.

`response_rows` is the only place where a sequence is shifted. The teacher, the learner and the
check of an engine all go through it.

Shapes: B segments, padded to L tokens; M new tokens in all of them; H the width of a state.
Tests: tests/test_cache.py, tests/test_learner.py
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cache import Segment


def response_rows(hidden: Tensor, segments: list[Segment]) -> Tensor:
    """The one shift: hidden states [B, L, H] -> [M, H]; row m is the state that predicts new
    token m.

    Token y_t stands at index start + t of its sequence, so the state one index before predicts it.
    The rows come segment by segment, as in torch.cat([s.new_tokens for s in segments]).
    """
    rows = []
    for b, s in enumerate(segments):
        first = s.start - 1
        rows.append(hidden[b, first:first + len(s)])
    return torch.cat(rows)


def kept_rows(rows: Tensor, segments: list[Segment]) -> Tensor:
    """Of one row per new token [M, ...], those whose scores are cached, in the order of the
    cache."""
    if segments[0].kept is None:                         # slots that store all positions
        return rows
    kept = torch.cat([s.kept for s in segments])
    return rows[kept.to(rows.device)]


def pad(segments: list[Segment], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids [B, L], padded on the right, and their mask, bool.

    Example: the tokens 5 6 7 and 8 9 become [[5, 6, 7], [8, 9, 0]].
    """
    tokens = torch.nn.utils.rnn.pad_sequence([s.tokens.long() for s in segments],
                                             batch_first=True)
    length = torch.tensor([[len(s.tokens)] for s in segments])
    mask = torch.arange(tokens.shape[1]) < length
    return tokens.to(device), mask.to(device)


def by_length(segments: list[Segment], token_budget: int) -> Iterator[list[Segment]]:
    """Micro-batches of similar length, each of at most `token_budget` padded tokens, or of one
    segment that is longer."""
    group: list[Segment] = []
    for s in sorted(segments, key=lambda s: -len(s.tokens)):
        if group and len(group[0].tokens) * (len(group) + 1) > token_budget:
            yield group
            group = []
        group.append(s)
    if group:
        yield group


def as_response(tokens: list[int]) -> Segment:
    """A sequence as a segment in which every token but the first is new; it has no candidates."""
    n = len(tokens) - 1
    blank = torch.empty(n, 0)
    return Segment(slot=-1, tokens=torch.tensor(tokens), prompt=1, start=1,
                   version=torch.zeros(n, dtype=torch.int32), ids=blank, logpi=blank,
                   logmu=blank, logq=blank, hidden=blank)

"""
Alignment: which hidden state predicts which token, and segments as rectangular batches.

`response_rows` is the only place where a sequence is shifted. The teacher, the learner and the
check of an engine all go through it.

Shapes: B segments, padded to L tokens; M new tokens in all of them; H the width of a state.
Tests: tests/test_cache.py, tests/test_learner.py
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cache import Segment

# What a pass through a model costs besides its tokens, as a part of --micro-tokens: on two cores
# the toy's passes cost some 200 tokens of 16,384 each
PASS = 1 / 64


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
    segment that is longer.

    There are as many as pay: one more costs as much as PASS of the budget in tokens, and saves
    some padding. Of all ways to cut the sorted segments, the one with the least sum of both.
    """
    order = sorted(segments, key=lambda s: -len(s.tokens))
    n = len(order)
    cost = [0.0] + [math.inf] * n            # of the first i segments, cut in the best way
    cut = [0] * (n + 1)                      # where the last group of that way begins
    for start in range(n):
        longest = len(order[start].tokens)
        for end in range(start + 1, n + 1):
            padded = longest * (end - start)
            if padded > token_budget and end > start + 1:
                break
            total = cost[start] + padded + PASS * token_budget
            if total < cost[end]:
                cost[end] = total
                cut[end] = start
    groups = []
    end = n
    while end > 0:
        groups.append(order[cut[end]:end])
        end = cut[end]
    yield from reversed(groups)


def as_response(tokens: list[int]) -> Segment:
    """A sequence as a segment in which every token but the first is new; it has no candidates."""
    n = len(tokens) - 1
    blank = torch.empty(n, 0)
    return Segment(slot=-1, tokens=torch.tensor(tokens), prompt=1, start=1,
                   version=torch.zeros(n, dtype=torch.int32), ids=blank, logpi=blank,
                   logmu=blank, logq=blank, hidden=blank)

"""
The sampling designs: which N words a position keeps, and with which weights they count.

An estimator is unbiased only together with the way its words were chosen. A design chooses N words
from a distribution mu and returns, for each, pi: the expected number of its copies among the N. For
every function f of a word, whatever mu is,

    E[ sum over the chosen words of f / pi ]  =  sum over all words with mu > 0 of f,

so that a loss divides by pi and never asks which design it was.

    iid       N independent draws from mu (the method of the paper). pi = N mu. Words come twice.
    optimal   the words that are probable enough are kept for certain, and the other places are
              filled by one systematic sample of the rest. Words come once.

Which words does `optimal` take, with which probabilities? With c such that the sum over all words
of min(1, mu / c) is N: pi = min(1, mu / c). The K words with mu >= c are kept, pi = 1. Of the rest,
which has the mass m, n = N - K words are taken at the points (u + i) / n, i = 0 .. n - 1, of its
cumulative distribution, with one uniform u. No word of the rest is longer than the distance m / n
between two points, so that it is met at most once, with the probability pi = n mu / m.

Why is it unbiased? Each word is met with the probability pi and then counts 1 / pi. Of all designs
with this property it has the least squared error (Fearnhead and Clifford, JRSS-B 65, 2003, section
3). N = 1 is one draw from mu; from N = V on all words are kept, and nothing is left to chance.

The emitted token has to be a draw from mu. With the probability m it is one of the n points, each
as likely as the others: a point chosen so is a draw from the rest. Otherwise it is a kept word,
chosen by its mass. It stands in column 0.

What is not covered: words with mu = 0, which no design takes (--top-p); fewer than N words with
mu > 0, where `optimal` leaves places UNUSED; a choice among positions by their emitted token, after
which the other kept words are no sample of mu any more (`Estimator.logged`).

Shapes: R rows, one per position; V words; N places. Tests: tests/test_draws.py
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64          # words per block of a `Line`: its two levels cost the same at V = 150k, N = 64
UNUSED = 1e4        # logpi of a place without a word: the word counts 1 / pi = 0 times
BELOW_1 = 1 - 1e-15          # its product with a length is below that length, rounding included


class Chosen(NamedTuple):
    """The words of R positions, the emitted token in column 0.

    ids    [R, N] int64
    logpi  [R, N] float32, log of the expected number of copies; UNUSED: the place is empty, and
           its id is that of the emitted token
    logmu  [R]    float32, log-prob of the emitted token
    """
    ids: Tensor
    logpi: Tensor
    logmu: Tensor


# -- the distribution ----------------------------------------------------------------------------

def shaped(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The logits of the distribution that is sampled: [R, V] of any float dtype to [R, V] float32.

    They are divided by the temperature and are -inf outside the nucleus, the smallest set of most
    probable words whose probabilities sum to at least top_p.
    """
    x = logits.float()
    if temperature != 1.0:
        x = x / temperature
    if top_p < 1.0:
        value, order = x.softmax(-1).sort(descending=True)
        mass_before = value.cumsum(-1) - value
        outside = mass_before >= top_p
        rank = order.argsort(1)              # where each word stands in the sorted order
        x = x.masked_fill(outside.gather(1, rank), -torch.inf)
    return x


class Line:
    """Words laid end to end, each as long as its weight: the word at a point is a draw.

    A cumulative sum over all V words in float64 would be slow, so the line is searched at two
    levels: among blocks of BLOCK words, then inside the block that was hit. Beside the weights
    only one sum passes over V, however many points there are.
    """

    def __init__(self, weight: Tensor):
        """weight [R, V] float32; `add` may change it in place."""
        self.weight = whole_blocks(weight)
        self.blocks = self.weight.view(len(weight), -1, BLOCK)   # [R, V / BLOCK, BLOCK]
        self.mass = self.blocks.sum(-1).double()                 # of each block

    @property
    def length(self) -> Tensor:
        """[R, 1], float64: a sum of the weights, never 1 minus other weights, which would
        cancel."""
        return self.mass.sum(-1, keepdim=True)

    def add(self, ids: Tensor, weight: Tensor) -> None:
        """Give weights [R, k], float64, to words ids [R, k] that had the weight 0."""
        self.weight.scatter_add_(1, ids, weight.to(self.weight.dtype))
        self.mass.scatter_add_(1, ids // BLOCK, weight)

    def words_at(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """The words at the points share * length, share [R, n] on [0, 1), float64: ids and their
        weights [R, n], float64. A share outside is taken as the nearest inside."""
        block_end = self.mass.cumsum(-1)
        target = share.clamp(0, BELOW_1) * block_end[:, -1:]
        block = torch.searchsorted(block_end, target, right=True)
        block = block.clamp(max=self.mass.shape[1] - 1)          # of a line without any weight

        # The block's mass was summed in float32, its words are summed in float64. So the place in
        # the block is carried over as a share, from 0 to 1.
        row = torch.arange(len(share), device=share.device)[:, None]
        words = self.blocks[row, block].double()                 # [R, n, BLOCK]
        mass = self.mass.gather(1, block)
        inside = (target - block_end.gather(1, block) + mass) / mass
        word_end = words.cumsum(-1)
        target_inside = inside.clamp(0, BELOW_1)[..., None] * word_end[..., -1:]
        word = torch.searchsorted(word_end, target_inside, right=True)
        word = word.clamp(max=BLOCK - 1)
        return block * BLOCK + word[..., 0], words.gather(-1, word)[..., 0]


def whole_blocks(weight: Tensor) -> Tensor:
    """[R, V] with words of weight 0 at the end, so that V is a multiple of BLOCK."""
    if weight.shape[1] % BLOCK == 0:         # `pad` would copy even where nothing is to be filled
        return weight
    return pad(weight, (0, -weight.shape[1] % BLOCK))


def largest(weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest weights of each row, in descending order, and their ids, [R, n] each.

    weight [R, V], V a multiple of BLOCK. They lie in the n blocks with the largest maxima: to
    search these takes a quarter of the time of a `topk` over V = 150k words.
    """
    blocks = weight.view(len(weight), -1, BLOCK)
    if blocks.shape[1] <= n:
        return tuple(weight.topk(n))
    block = blocks.amax(-1).topk(n).indices                      # [R, n]
    words = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))
    value, place = words.flatten(1).topk(n)
    return value, block.gather(1, place // BLOCK) * BLOCK + place % BLOCK


# -- the designs ---------------------------------------------------------------------------------

def draw_iid(logits: Tensor, u: Tensor, n: int) -> Chosen:
    """n independent draws for every row; the first is emitted.

    logits [R, V] (`shaped`); u [R, n] uniform on [0, 1), float64, so that words with a probability
    of 1e-12 are drawn as often as they should be.
    """
    line = Line(logits.softmax(-1))
    ids, weight = line.words_at(u)
    logmu = (weight / line.length).log().float()
    return Chosen(ids, logmu + math.log(n), logmu[:, 0])


def draw_optimal(logits: Tensor, u: Tensor, n: int) -> Chosen:
    """The n words of the optimal design for every row. n is at most V.

    logits [R, V] (`shaped`); u [R, 2] uniform on [0, 1), float64: the offset of the systematic
    sample, and the choice of the emitted token.
    """
    weight = whole_blocks(logits.softmax(-1))
    top_value, top_ids = largest(weight, n)
    top_value = top_value.double()
    rest = Line(weight.scatter_(1, top_ids, 0.0))
    kept = number_kept(top_value, rest.length)                   # K [R, 1]
    column = torch.arange(n, device=logits.device)[None, :]
    is_kept = column < kept
    rest.add(top_ids, top_value.masked_fill(is_kept, 0.0))
    m = rest.length

    # Columns K .. N - 1: one systematic sample of the rest. Where all is kept, nothing of it is
    # used.
    places = (n - kept).clamp(min=1)
    sampled_ids, sampled_value = rest.words_at((u[:, :1] + column - kept) / places)
    ids = torch.where(is_kept, top_ids, sampled_ids)
    value = torch.where(is_kept, top_value, sampled_value)

    # What a column counts in the choice of the emitted token: a kept word its mass, each of the
    # sampled ones an equal part of the rest's. For both kinds pi = mu / part.
    part = torch.where(is_kept, top_value, m / places)
    emitted = emitted_column(part, u[:, 1:2])
    empty = value == 0
    logpi = (value / part).log().masked_fill(empty, UNUSED)
    ids = torch.where(empty, ids.gather(1, emitted), ids)
    logmu = (value.gather(1, emitted) / part.sum(1, keepdim=True)).log()

    order = torch.where(column == emitted, 0, column)            # the emitted column comes first
    order[:, :1] = emitted
    return Chosen(ids.gather(1, order), logpi.gather(1, order).float(), logmu[:, 0].float())


def number_kept(top: Tensor, tail: Tensor) -> Tensor:
    """K [R, 1]: how many of the n largest weights are kept for certain.

    top [R, n] the n largest weights in descending order, tail [R, 1] the sum of all others,
    float64. Word k + 1 is kept as long as it weighs at least R_k / (n - k), where R_k is the sum
    of all weights but the k largest. R_k is summed from the smallest upwards.
    """
    n = top.shape[1]
    remaining = top.flip(1).cumsum(1).flip(1) + tail             # R_0 .. R_(n - 1)
    places = torch.arange(n, 0, -1, device=top.device)
    return (top * places >= remaining).int().cumprod(1).sum(1, keepdim=True)


def emitted_column(part: Tensor, u: Tensor) -> Tensor:
    """A column [R, 1], drawn by the weights `part` [R, n], float64, at u [R, 1] on [0, 1)."""
    end = part.cumsum(1)
    column = torch.searchsorted(end, u.clamp(max=BELOW_1) * end[:, -1:], right=True)
    return column.clamp(max=part.shape[1] - 1)                   # of a row of nan


@dataclass(frozen=True)
class Design:
    """One way to choose N words."""
    choose: Callable[[Tensor, Tensor, int], Chosen]
    """(logits [R, V], u [R, numbers], n) to the words."""
    numbers: Callable[[int], int]
    """How many uniform numbers a position needs, from n."""


DESIGNS = {"iid": Design(draw_iid, lambda n: n), "optimal": Design(draw_optimal, lambda n: 2)}

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64          # words per block of a `Line`: its two levels cost the same at V = 150k, N = 64
UNUSED = 1e4        # logpi of a place without a word: the word counts 1 / pi = 0 times


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
        if weight.shape[1] % BLOCK:          # `pad` would copy even where nothing is to be filled
            weight = pad(weight, (0, -weight.shape[1] % BLOCK))
        self.weight = weight
        self.blocks = weight.view(len(weight), -1, BLOCK)        # [R, V / BLOCK, BLOCK]
        self.mass = self.blocks.sum(-1).double()                 # of each block

    @property
    def length(self) -> Tensor:
        """[R, 1], float64: a sum of the weights, never 1 minus other weights, which would
        cancel."""
        return self.mass.sum(-1, keepdim=True)

    def add(self, ids: Tensor, weight: Tensor) -> None:
        """Give weights [R, k] to words ids [R, k] that had the weight 0."""
        self.weight.scatter_add_(1, ids, weight)
        self.mass.scatter_add_(1, ids // BLOCK, weight.double())

    def words_at(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """The words at the points share * length, share [R, n] on [0, 1), float64: ids and their
        weights [R, n].

        The points are kept just below the end of the line, which is its length up to rounding.
        """
        block_end = self.mass.cumsum(-1)
        length = block_end[:, -1:]
        target = (share * length).clamp(max=length * (1 - 1e-15))
        block = torch.searchsorted(block_end, target, right=True)
        block = block.clamp(max=self.mass.shape[1] - 1)          # of a line without any weight

        # The block's mass was summed in float32, its words are summed in float64. So the place in
        # the block is carried over as a share, from 0 to 1.
        row = torch.arange(len(share), device=share.device)[:, None]
        words = self.blocks[row, block]                          # [R, n, BLOCK]
        mass = self.mass.gather(1, block)
        inside = (target - block_end.gather(1, block) + mass) / mass
        word_end = words.double().cumsum(-1)
        target_inside = inside.clamp(0, 1 - 1e-15) * word_end[..., -1]
        word = torch.searchsorted(word_end, target_inside[..., None], right=True)
        word = word.clamp(max=BLOCK - 1)
        return block * BLOCK + word.squeeze(-1), words.gather(-1, word).squeeze(-1)


# -- the designs ---------------------------------------------------------------------------------

def draw_iid(logits: Tensor, u: Tensor, n: int) -> Chosen:
    """n independent draws for every row; the first is emitted.

    logits [R, V] (`shaped`); u [R, n] uniform on [0, 1), float64, so that words with a probability
    of 1e-12 are drawn as often as they should be.
    """
    line = Line(logits.softmax(-1))
    ids, weight = line.words_at(u)
    logmu = weight.log() - line.length.log().float()
    return Chosen(ids, logmu + torch.tensor(float(n)).log(), logmu[:, 0])


def draw_optimal(logits: Tensor, u: Tensor, n: int) -> Chosen:
    """The n words of the optimal design for every row. n is at most V.

    logits [R, V] (`shaped`); u [R, 2] uniform on [0, 1), float64: the offset of the systematic
    sample, and the choice of the emitted token.
    """
    weight = logits.softmax(-1)
    top = weight.topk(n)
    rest = Line(weight.scatter(1, top.indices, 0.0))
    kept = number_kept(top.values.double(), rest.length)         # [R, 1]
    column = torch.arange(n, device=logits.device)[None, :]
    is_kept = column < kept
    rest.add(top.indices, top.values.masked_fill(is_kept, 0.0))
    m = rest.length

    # Columns K .. N - 1: one systematic sample of the rest. Where all is kept, nothing of it is
    # used.
    places = (n - kept).clamp(min=1)
    share = ((u[:, :1] + column - kept) / places).clamp(0, 1)
    sampled_ids, sampled_weight = rest.words_at(share)
    ids = torch.where(is_kept, top.indices, sampled_ids)
    value = torch.where(is_kept, top.values, sampled_weight).double()

    mass_kept = top.values.double().masked_fill(~is_kept, 0.0)
    length = mass_kept.sum(-1, keepdim=True) + m
    logmu = value.log() - length.log()
    logpi = torch.where(is_kept, 0.0, value.log() - (m / places).log())
    empty = value == 0
    logpi = logpi.masked_fill(empty, UNUSED)

    emitted = emitted_column(mass_kept, m, kept, u[:, 1:2])
    ids = ids.masked_fill(empty, 0) + ids.gather(1, emitted) * empty
    return Chosen(*to_front(emitted, ids, logpi.float()), logmu.gather(1, emitted)[:, 0].float())


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


def emitted_column(kept: Tensor, rest: Tensor, number: Tensor, u: Tensor) -> Tensor:
    """The column [R, 1] of the emitted token: a kept word by its mass, or one of the sampled words,
    all equally likely, by the mass of the rest.

    kept [R, n] the masses of the kept words, 0 elsewhere; rest [R, 1]; number [R, 1] of the kept
    words; u [R, 1] on [0, 1).
    """
    n = kept.shape[1]
    end = kept.cumsum(1)
    target = u * (end[:, -1:] + rest)
    among_kept = torch.searchsorted(end, target, right=True)
    places = n - number
    beyond = (target - end[:, -1:]).clamp(min=0) / rest.clamp(min=torch.finfo(rest.dtype).tiny)
    among_rest = number + (beyond * places).long().clamp(max=(places - 1).clamp(min=0))
    last_kept = (number - 1).clamp(min=0)
    in_rest = (target >= end[:, -1:]) & (rest > 0) & (places > 0)
    return torch.where(in_rest, among_rest, among_kept.minimum(last_kept))


def to_front(column: Tensor, *tables: Tensor) -> list[Tensor]:
    """Each table [R, n] with its entry in `column` [R, 1] exchanged for that in column 0."""
    exchanged = []
    for x in tables:
        first = x[:, :1].clone()
        chosen = x.gather(1, column)
        x = x.scatter(1, column, first)
        x[:, :1] = chosen
        exchanged.append(x)
    return exchanged


@dataclass(frozen=True)
class Design:
    """One way to choose N words."""
    choose: Callable[[Tensor, Tensor, int], Chosen]
    """(logits [R, V], u [R, numbers], n) to the words."""
    numbers: Callable[[int], int]
    """How many uniform numbers a position needs, from n."""


DESIGNS = {"iid": Design(draw_iid, lambda n: n), "optimal": Design(draw_optimal, lambda n: 2)}

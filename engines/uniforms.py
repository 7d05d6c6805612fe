"""
Random numbers by address: a draw's numbers are a function of where it stands, not of when it is made.

The address of a draw is (seed, stream, uid of the response, position in the response). A response
that an engine puts aside and takes up again, that is cut, resumed or drawn again after a crash,
finds the same numbers at the same positions, and no position finds the numbers of another.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): ten rounds of integer products, the same bits in NumPy and in torch, on a CPU and on a
GPU. What is left out: what the numbers are used for (sampling.py).
Shapes: R addresses, n numbers at each. Tests: tests/test_uniforms.py
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engines.to_device import to_device

# Streams of random numbers. Each use of randomness has its own, so that no use shifts another:
# training draws what it would have drawn without an evaluation.
TRAINING = 0
TEACHER = 1
EVALUATION = 2
VALIDATION = 3                   # extensions, for the answers that the parent grades for them
SELECTION = 4                    # extensions, for a choice among responses

WORD = 0xFFFFFFFF                # the 32 bits of a word
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Words = TypeVar("Words", np.ndarray, Tensor)     # int64, each with 32 bits in use


def uniforms(seed: int, stream: int, uids: Sequence[int], positions: Sequence[int], n: int,
             device: torch.device | str = "cpu") -> Tensor:
    """n numbers, uniform on [0, 1), at each of R addresses: [R, n], float64, multiples of 2^-53.

    seed below 2^32; uids and positions [R], not negative. The first numbers do not depend on n.
    """
    blocks = (n + 1) // 2                        # a block of four words makes two numbers
    uid = np.asarray(uids, dtype=np.int64)[:, None]
    even = np.empty((2, len(uid), blocks), dtype=np.int64)
    odd = np.empty_like(even)
    even[0] = np.arange(blocks)
    odd[0] = np.asarray(positions, dtype=np.int64)[:, None]
    even[1] = uid & WORD
    odd[1] = uid >> 32
    if torch.device(device).type == "cpu":       # NumPy has less overhead per operation
        found = torch.from_numpy(in_unit_interval(*philox(even, odd, (seed, stream))))
    else:
        on_device = [to_device(x, device) for x in (even, odd)]
        found = in_unit_interval(*philox(*on_device, (seed, stream)))
    return found.reshape(len(uid), 2 * blocks)[:, :n]


def philox(even: Words, odd: Words, key: tuple[int, int]) -> tuple[Words, Words]:
    """Philox4x32-10: four words for every counter of four words.

    even [2, ..] holds the words 0 and 2 of the counters, odd [2, ..] the words 1 and 3; the result
    likewise. So each of the ten rounds is six operations.
    """
    device = even.device if isinstance(even, Tensor) else None
    multipliers, keys = constants(key, even.ndim, device)
    for key_of_round in keys:
        # An int64 product keeps all 64 bits of the product of two words; its sign is one of them,
        # so that a shift to the right has to be masked.
        product = even * multipliers
        high = product >> 32 & WORD
        low = product & WORD
        even = exchanged(high) ^ odd ^ key_of_round
        odd = exchanged(low)
    return even, odd


@lru_cache(maxsize=64)
def constants(key: tuple[int, int], dimensions: int,
              device: torch.device | None) -> tuple[Words, list[Words]]:
    """The multipliers, and the key of each round, [2, 1, ..] each; tensors on `device`, arrays
    without one."""
    found = [MULTIPLIERS]
    for i in range(ROUNDS):
        found.append(tuple(k + i * step & WORD for k, step in zip(key, KEY_STEPS)))
    shape = (2,) + (1,) * (dimensions - 1)
    arrays = [np.array(pair, dtype=np.int64).reshape(shape) for pair in found]
    if device is not None:
        arrays = [to_device(x, device) for x in arrays]
    return arrays[0], arrays[1:]


def exchanged(x: Words) -> Words:
    """[2, ..]: the second before the first."""
    if isinstance(x, Tensor):
        return x.flip(0)
    return x[::-1]


def in_unit_interval(even: Words, odd: Words) -> Words:
    """Two numbers on [0, 1) from the four words of `philox`: two of [2, ..] to [.., 2], float64.

    53 bits each, put together as an integer: the product of an int64 tensor and a Python float
    would be float32 in torch.
    """
    whole = ((even >> 5) << 26) + (odd >> 6)
    if isinstance(whole, Tensor):
        return whole.movedim(0, -1).double() * 2.0 ** -53
    return np.moveaxis(whole, 0, -1) * 2.0 ** -53

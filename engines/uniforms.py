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
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

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
    position = np.asarray(positions, dtype=np.int64)[:, None]
    block = np.arange(blocks, dtype=np.int64)[None, :]
    shape = (len(uid), blocks)
    counter = [np.broadcast_to(x, shape) for x in (block, position, uid & WORD, uid >> 32)]
    if torch.device(device).type == "cpu":       # NumPy has less overhead per operation
        found = torch.from_numpy(in_unit_interval(philox(counter, (seed, stream))))
    else:
        on_device = [torch.from_numpy(x.copy()).to(device) for x in counter]
        found = in_unit_interval(philox(on_device, (seed, stream)))
    return found.reshape(len(uid), 2 * blocks)[:, :n]


def philox(counter: list[Words], key: tuple[int, int]) -> list[Words]:
    """Philox4x32-10: four words for every counter of four words."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(ROUNDS):
        # An int64 product keeps all 64 bits of the product of two words; its sign is one of them,
        # so that a shift to the right has to be masked.
        product_0 = a * MULTIPLIERS[0]
        product_1 = c * MULTIPLIERS[1]
        a = (product_1 >> 32 & WORD) ^ b ^ key_0
        b = product_1 & WORD
        c = (product_0 >> 32 & WORD) ^ d ^ key_1
        d = product_0 & WORD
        key_0 = key_0 + KEY_STEPS[0] & WORD
        key_1 = key_1 + KEY_STEPS[1] & WORD
    return [a, b, c, d]


def in_unit_interval(words: list[Words]) -> Words:
    """Two numbers on [0, 1) from four words: [.., 4] as a list to [.., 2], float64.

    53 bits each, put together as an integer: the product of an int64 tensor and a Python float
    would be float32 in torch.
    """
    a, b, c, d = words
    first = ((a >> 5) << 26) + (b >> 6)
    second = ((c >> 5) << 26) + (d >> 6)
    if isinstance(a, Tensor):
        return torch.stack([first, second], -1).double() * 2.0 ** -53
    return np.stack([first, second], -1) * 2.0 ** -53

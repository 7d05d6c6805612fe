"""
What an engine promises, and what all engines have in common.

An engine holds the student and generates for many responses at the same time, one token each per
`step`. The rollout worker adds responses under keys of its own and takes them out again, finished
or not. What is left out: who gets which response and when weights change (rollout.py).
Tests: tests/test_rollout.py
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from engines.drawn import Drawn
from engines.sampling import Drawing
from engines.uniforms import EVALUATION
from transport.checksum import Shown

# Differences of log-probs, nats, between an engine and the learner on the probe, by dtype: what
# rounding does in most models, and more than it does in any
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}
MORE_THAN_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1.0}


def probe_tolerance(dtype: torch.dtype, moved: float, proven: bool) -> float:
    """The largest difference on the probe, nats, with which weights count as arrived.

    moved    how far the new weights are from the engine's last ones on the probe, in the learner
    proven   the engine has shown bits of every tensor: then only the way from weights to log-probs
             is left to be doubted

    Otherwise a tenth of the move may be missing, but no less than rounding explains. A move that
    is smaller than that goes unseen until what did not arrive adds up.
    """
    if proven:
        return MORE_THAN_ROUNDING[dtype]
    return min(max(moved / 10, ROUNDING[dtype]), MORE_THAN_ROUNDING[dtype])


class Engine(ABC):
    """Made as Engine(cfg, device, dtype), with the weights of --student."""

    drawing: Drawing                             # of the responses that are added from now on
    preempted: int = 0                           # responses put aside for want of memory, so far

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Replace the weights by copies of these, each of which is best looked up once and in its
        order: it may come from another device. What is drawn from now on is of this version.

        Responses may be in the engine with `--inflight keep` only. They keep the keys and values
        that they have, which are those of older weights.
        """

    def checksums(self, layout: Mapping[str, torch.Size], version: int) -> list[Shown]:
        """Of the weights that the engine really computes with, under the names and in the shapes of
        `layout`; a name may come twice. Where it is costly to show a whole matrix, some columns of
        it, chosen by the version. It is what tells that a push has arrived whole; what is not shown
        here, the probe has to tell."""
        return []

    @abstractmethod
    def logp(self, tokens: list[int]) -> Tensor:
        """Log-prob of each token of a sequence but the first, given those before it: [len - 1].

        An engine may have to make steps for it. Then the responses in it go on, and the next
        `step` also returns those that have finished meanwhile.
        """

    @abstractmethod
    def add(self, key: int, tokens: list[int], budget: int, *, uid: int, position: int) -> None:
        """Begin or continue a response after `tokens`, for at most `budget` more tokens.

        `uid` of the response and `position` of its next token in it choose the random numbers.
        """

    @abstractmethod
    def step(self) -> list[int]:
        """One token for every response; the keys of those that have finished."""

    @abstractmethod
    def take(self, keys: list[int]) -> dict[int, Drawn]:
        """Remove responses; by key what has been drawn for them since they were added."""

    def not_begun(self) -> list[int]:
        """The keys of responses for which nothing has been drawn since they were added; an engine
        may know of fewer."""
        return []

    def complete(self, prompts: list[list[int]], max_new: int, k: int = 1,
                 temperature: float = 0.0, each_step: Callable[[], None] = lambda: None, *,
                 stream: int = EVALUATION) -> list[list[int]]:
        """k answers to each prompt, those to the first prompt first; temperature 0 is greedy.

        No other response may be in the engine.
        """
        training = self.drawing
        answers: dict[int, Drawn] = {}
        self.drawing = replace(training, n=1, k=0, design="iid", temperature=temperature,
                               top_p=1.0, stream=stream)
        try:
            for i in range(len(prompts) * k):
                self.add(i, prompts[i // k], max_new, uid=i, position=0)
            while len(answers) < len(prompts) * k:
                answers |= self.take(self.step())
                each_step()
        finally:
            self.drawing = training
        return [answers[i].tokens.tolist() for i in range(len(answers))]

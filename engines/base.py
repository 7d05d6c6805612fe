"""
What an engine promises, and what all engines have in common.

An engine holds the student and generates for many responses at the same time, one token each per
`step`. The rollout worker adds responses under keys of its own and takes them out again, finished
or not. What is left out: who gets which response and when weights change (rollout.py).
Tests: tests/test_rollout.py
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engines.drawn import Drawn
from engines.sampling import Drawing
from engines.uniforms import EVALUATION


def probe_tolerance(dtype: torch.dtype) -> float:
    """The largest difference of log-probs, nats, between an engine and the learner on the probe
    that rounding explains. Beyond it the weights did not arrive."""
    return 1e-3 if dtype == torch.float32 else 1.0


class Engine(ABC):
    """Made as Engine(cfg, device, dtype), with the weights of --student."""

    drawing: Drawing                             # of the responses that are added from now on
    preempted: int = 0                           # responses put aside for want of memory, so far

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the weights. No response may be in the engine."""

    @abstractmethod
    def logp(self, tokens: list[int]) -> Tensor:
        """Log-prob of each token of a sequence but the first, given those before it: [len - 1]."""

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

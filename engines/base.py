"""
engines.base
"""
from __future__ import annotations

from collections.abc import Callable

from engines.sampling import EVALUATION


class Engine:
    """What both engines have in common: `how` a position is drawn (see `draws`), and evaluation in the same way."""

    how: dict

    def complete(self, prompts: list[list[int]], max_new: int, k: int = 1, temperature: float = 0.0,
                 each_step: Callable[[], None] = lambda: None, *, stream: int = EVALUATION) -> list[list[int]]:
        """k answers to each prompt, all of the first prompt's first; temperature 0 is greedy. Nothing else may run.

        Their random numbers are a stream of their own, so that training draws what it would have drawn without them.
        """
        training, answers = self.how, {}
        self.how = training | dict(n=1, k=0, temperature=temperature, top_p=1.0, stream=stream)
        for i in range(len(prompts) * k):
            self.add(i, prompts[i // k], max_new, uid=i // k, position=i % k)
        while len(answers) < len(prompts) * k:
            answers |= self.take(self.step())
            each_step()
        self.how = training
        return [answers[i][0].tolist() for i in range(len(answers))]

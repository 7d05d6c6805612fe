"""
How a position is drawn, the same in every engine, and the random numbers of a response.

N words per position, i.i.d. from the softmax that is really sampled (temperature and top-p are in
it); the first of them is emitted. An estimator that wants the student's best words gets the k best
after them. What is left out: beam search, penalties, speculative decoding; distillation wants
samples of the plain distribution.
Shapes: R rows, one per running response; V words. Tests: tests/test_rollout.py
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import Config
from estimators import ESTIMATORS, draw, shaped

# Streams of random numbers. Each use of randomness has its own, so that no use shifts another:
# training draws what it would have drawn without an evaluation.
TRAINING = 0
TEACHER = 1
EVALUATION = 2
VALIDATION = 3                   # extensions, for the answers that the parent grades for them


class Sampler:
    """The random numbers of one response, from seed, prompt and the position where it starts.

    They are the same on every machine.
    """

    def __init__(self, seed: int, uid: int, position: int, stream: int = TRAINING):
        self.random = np.random.default_rng([seed, uid, position, stream]).random


@dataclass(frozen=True)
class Drawing:
    """How an engine draws a position."""
    n: int                       # i.i.d. draws, the first of which is emitted
    k: int                       # the student's best words, recorded after them
    temperature: float           # 0: greedy, for evaluations
    top_p: float
    seed: int
    stream: int = TRAINING


def training_drawing(cfg: Config) -> Drawing:
    """The drawing that the estimator of this run is defined for."""
    estimator = ESTIMATORS[cfg.estimator]
    return Drawing(n=estimator.drawn(cfg.mc_samples), k=estimator.top(cfg.top_k),
                   temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)


def draw_rows(logits: Tensor, samplers: list[Sampler], drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Draw from logits [R, V]: word ids [R, n + k] and their log-probs, float32.

    With temperature 0 the best word is drawn, and its log-prob is 0.
    """
    if drawing.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return best, torch.zeros(best.shape, device=best.device)
    numbers = np.stack([sampler.random(drawing.n) for sampler in samplers])
    u = torch.from_numpy(numbers).to(logits.device)
    ids, logmu = draw(logits, u, drawing.temperature, drawing.top_p)
    if drawing.k == 0:
        return ids, logmu
    x = shaped(logits, drawing.temperature, drawing.top_p)
    best = x.topk(drawing.k)
    log_norm = x.gather(1, ids[:, :1]) - logmu[:, :1]
    return torch.cat([ids, best.indices], 1), torch.cat([logmu, best.values - log_norm], 1)

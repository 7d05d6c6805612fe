"""
engines.sampling
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from estimators import ESTIMATORS, draw, shaped

if TYPE_CHECKING:
    from config import Config


TRAINING, EVALUATION, VALIDATION = 0, 2, 3       # streams of random numbers; 1 is the teacher's

class Sampler:
    """One response's random numbers, by (seed, prompt, position it starts from): the same on every machine."""

    def __init__(self, seed: int, uid: int, position: int, stream: int = TRAINING):
        self.random = np.random.default_rng([seed, uid, position, stream]).random


def draw_rows(logits: Tensor, samplers: list[Sampler], n: int, k: int, temperature: float, top_p: float):
    """Ids [R, n + k] and their log-probs: n i.i.d. draws, the first one to emit; then the k best words.

    Temperature 0 is for evaluations: the best word, certain.
    """
    if temperature == 0:
        return (best := logits.argmax(-1, keepdim=True)), torch.zeros(best.shape, device=best.device)
    u = torch.from_numpy(np.stack([s.random(n) for s in samplers])).to(logits.device)
    ids, logmu = draw(logits, u, temperature, top_p)
    if k:
        x = shaped(logits, temperature, top_p)
        best = x.topk(k)
        log_norm = x.gather(1, ids[:, :1]) - logmu[:, :1]
        ids, logmu = torch.cat([ids, best.indices], 1), torch.cat([logmu, best.values - log_norm], 1)
    return ids, logmu


DRAW = ("n", "k", "temperature", "top_p")      # arguments of draw_rows

def draws(cfg: Config) -> dict:
    """How an engine draws a position: n times, then its k best words, from which distribution, with which numbers."""
    estimator = ESTIMATORS[cfg.estimator]
    return dict(n=estimator.drawn(cfg.mc_samples), k=estimator.top(cfg.top_k), temperature=cfg.temperature,
                top_p=cfg.top_p, seed=cfg.seed, stream=TRAINING)

"""
How a position is drawn, the same in every engine.

N words per position, i.i.d. from the softmax that is really sampled (temperature and top-p are in
it); the first of them is emitted. An estimator that wants the student's best words gets the k best
after them. What is left out: beam search, penalties, speculative decoding; distillation wants
samples of the plain distribution.
Shapes: R rows, one per running response; V words. Tests: tests/test_rollout.py
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from engines.uniforms import TRAINING, uniforms
from estimators import ESTIMATORS, draw, shaped


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


def draw_rows(logits: Tensor, uids: Sequence[int], positions: Sequence[int],
              drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Draw from logits [R, V]: word ids [R, n + k] and their log-probs, float32.

    `uids` and `positions` [R]: which response a row belongs to, and the position in it that is
    drawn now. They choose the random numbers (uniforms.py). With temperature 0 the best word is
    drawn, and its log-prob is 0.
    """
    if drawing.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return best, torch.zeros(best.shape, device=best.device)
    u = uniforms(drawing.seed, drawing.stream, uids, positions, drawing.n, logits.device)
    ids, logmu = draw(logits, u, drawing.temperature, drawing.top_p)
    if drawing.k == 0:
        return ids, logmu
    x = shaped(logits, drawing.temperature, drawing.top_p)
    best = x.topk(drawing.k)
    log_norm = x.gather(1, ids[:, :1]) - logmu[:, :1]
    return torch.cat([ids, best.indices], 1), torch.cat([logmu, best.values - log_norm], 1)

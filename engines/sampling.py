"""
How a position is drawn, the same in every engine.

N words per position, by one of the designs of draws.py, from the softmax that is really sampled
(temperature and top-p are in it); the first of them is emitted. An estimator that wants the
student's best words gets the k best after them. What is left out: beam search, penalties,
speculative decoding; distillation wants samples of the plain distribution.
Shapes: R rows, one per running response; V words. Tests: tests/test_rollout.py
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from draws import DESIGNS, Chosen, shaped
from engines.uniforms import TRAINING, uniforms
from estimators import ESTIMATORS


@dataclass(frozen=True)
class Drawing:
    """How an engine draws a position."""
    n: int                       # drawn words, the first of which is emitted
    design: str                  # how they are drawn: a key of draws.DESIGNS
    k: int                       # the student's best words, recorded after them
    temperature: float           # 0: greedy, for evaluations
    top_p: float
    seed: int
    stream: int = TRAINING


def training_drawing(cfg: Config) -> Drawing:
    """The drawing that the estimator of this run is defined for."""
    estimator = ESTIMATORS[cfg.estimator]
    n = estimator.drawn(cfg.mc_samples)
    design = cfg.draws if n > 1 else "iid"
    return Drawing(n=n, design=design, k=estimator.top(cfg.top_k),
                   temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)


def draw_rows(logits: Tensor, uids: Sequence[int], positions: Sequence[int],
              drawing: Drawing) -> Chosen:
    """Draw from logits [R, V]: word ids [R, n + k], their logpi, and logmu [R] of the first.

    For the k best words logpi holds their log-probs.

    `uids` and `positions` [R]: which response a row belongs to, and the position in it that is
    drawn now. They choose the random numbers (uniforms.py). With temperature 0 the best word is
    drawn, and its log-prob is 0.
    """
    if drawing.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        zeros = torch.zeros(best.shape, device=best.device)
        return Chosen(best, zeros, zeros[:, 0])
    design = DESIGNS[drawing.design]
    u = uniforms(drawing.seed, drawing.stream, uids, positions, design.numbers(drawing.n),
                 logits.device)
    x = shaped(logits, drawing.temperature, drawing.top_p)
    chosen = design.choose(x, u, drawing.n)
    if drawing.k == 0:
        return chosen
    best = x.topk(drawing.k)
    log_norm = x.gather(1, chosen.ids[:, :1]) - chosen.logmu[:, None]
    return Chosen(torch.cat([chosen.ids, best.indices], 1),
                  torch.cat([chosen.logpi, best.values - log_norm], 1), chosen.logmu)

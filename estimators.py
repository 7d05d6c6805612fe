"""
All KL estimators of this repository, in one file, meant to be read top to bottom.

Notation (the same names are used in every other module)
    p    the student being trained      logp   requires grad
    mu   the student that generated     logmu  frozen, may be stale
    q    the teacher                    logq   frozen
    N Monte Carlo candidates or K top tokens at a position (the last dimension), V vocabulary
    A position is that of the token y_t itself: nothing in this file shifts.

Rules every estimator here obeys
    1. pure: log-probs with the full-vocabulary normaliser in, one value per position out; no model, no device.
    2. `.backward()` on its mean is the gradient the docstring states.
    3. the docstring says which distribution the candidates must come from.
    4. tests/test_estimators.py checks 2 exactly, by enumeration, against dense_kl below.

What is left out: reward-to-go. Distillation is local to a token, so the discount is 0 throughout.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_MAX = 20.0    # a log-ratio is clamped to +-20 before exp: e^20 is 5e8, past any use, and stays finite


# -- weights and values ----------------------------------------------------------------------------

def importance_weight(logp: Tensor, logmu: Tensor) -> Tensor:
    """w = p / mu, detached, never clipped beyond LOG_RATIO_MAX. Any shape."""
    return (logp - logmu).detach().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def reverse_value(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Unbiased estimate of KL(p || q) at a position from candidates drawn i.i.d. from mu: mean of w (logp - logq)."""
    return (importance_weight(logp, logmu) * (logp - logq)).detach().mean(-1)


def forward_value(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Unbiased estimate of KL(q || p) from candidates drawn i.i.d. from mu: mean of (q / mu) (logq - logp)."""
    return (importance_weight(logq, logmu) * (logq - logp)).detach().mean(-1)


# -- Monte Carlo -----------------------------------------------------------------------------------

def reverse_mc(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Reverse KL from N candidates per position, corrected for staleness.

    Target      KL(p || q) at each position, prefix held fixed
    Candidates  a_1..a_N drawn i.i.d. from mu, duplicates kept
    Gradient    E_mu[ w (logp - logq) dlogp ],  w = p/mu           (unbiased for N >= 1)
    Value       not the KL: this is a surrogate, log `reverse_value` instead
    Stale mu    exact while mu > 0 wherever p > 0; variance grows with E_mu[w^2]
    Not covered the prefix y_<t is still distributed as under mu, not under p

    logp, logq, logmu: [..., N] log-probs of the same candidates. Returns [...].
    Source: AsyncOPD (arXiv 2606.24143), the multi-sample estimator; N = 1 is its MC1.
    """
    w = importance_weight(logp, logmu)
    advantage = (logq - logp).detach()
    return -(w * advantage * logp).mean(-1)


# -- top-k -----------------------------------------------------------------------------------------

def forward_topk(logp: Tensor, logq: Tensor, logmu: Tensor | None = None) -> Tensor:
    """Forward KL on the teacher's K best tokens, everything else lumped into one more outcome.

    Target      KL(q || p), the V - K other tokens counted as one bucket with mass 1 - sum of the K
    Candidates  the teacher's top K at scoring time
    Gradient    -sum_K q dlogp - q_tail dlogp_tail                 (exact for the lumped divergence; K = V: KL(q||p))
    Value       the lumped divergence: never above KL(q || p)
    Stale mu    unaffected: support and weights are the teacher's (logmu is not used)
    Not covered how p divides its mass within the tail; the prefix is still mu's

    logp, logq: [..., K]. Returns [...].
    """
    log_tail_p, log_tail_q = log_rest(logp), log_rest(logq)
    tail = log_tail_q.exp() * (log_tail_q - log_tail_p)
    return (logq.exp() * (logq - logp)).sum(-1) + tail


def log_rest(logx: Tensor) -> Tensor:
    """log(1 - sum exp(logx)) over the last dimension, kept finite where rounding leaves no rest. Returns [...]."""
    covered = logx.float().logsumexp(-1) if logx.dtype != torch.float64 else logx.logsumexp(-1)
    return torch.log(-torch.expm1(covered.clamp(max=-1e-7)))


# -- the table -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimator:
    """One row. `support` says whose tokens a slot must hold, and everything that records or scores obeys it:

    sampled       the emitted token                candidates    N drawn by the student, the emitted token first
    teacher_topk  the emitted token, then the teacher's K best
    """
    fn: Callable[..., Tensor]
    kl: Literal["reverse", "forward"]
    support: Literal["sampled", "candidates", "teacher_topk"]
    unbiased: bool

    def columns(self, n: int, k: int) -> int:
        """Token ids per position in a slot. Column 0 is always the emitted token: it carries the logged KL."""
        return {"sampled": 1, "candidates": n, "teacher_topk": 1 + k}[self.support]

    def drawn(self, n: int) -> int:
        """How many of the columns the student draws, the emitted token among them."""
        return n if self.support == "candidates" else 1

    def scored(self, x: Tensor) -> Tensor:
        """The columns that `fn` works on, out of all of a slot's columns [..., C]."""
        return x if self.support in ("sampled", "candidates") else x[..., 1:]


ESTIMATORS = {
    "reverse_mc": Estimator(reverse_mc, "reverse", "candidates", unbiased=True),
    "forward_topk": Estimator(forward_topk, "forward", "teacher_topk", unbiased=False),
}
DEFAULT = {"reverse": "reverse_mc", "forward": "forward_topk"}      # what --kl means without --estimator
VALUE = {"reverse": reverse_value, "forward": forward_value}        # the logged `kl`, from columns drawn by mu


# -- dense references: used by tests and by nobody else --------------------------------------------

def dense_kl(logp: Tensor, logq: Tensor, kind: str = "reverse") -> Tensor:
    """The divergence itself, over the whole vocabulary: [..., V] -> [...]. Differentiate it for the true gradient."""
    if kind == "forward":
        logp, logq = logq, logp
    return (logp.exp() * (logp - logq)).sum(-1)

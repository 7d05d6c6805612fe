"""
Every KL estimator of this repository, in one file that is read from top to bottom.

An estimator is a loss: a function of log-probs whose gradient pulls the student towards the
teacher. It is correct only together with the way its words were chosen, so the table at the end,
ESTIMATORS, states for each loss which words it needs; draws.py chooses them. Everything that
records, scores or trains obeys that table. `--kl reverse --mc-samples 4` means DEFAULT["reverse"],
the row `reverse_mc`; its gradient is that of the function `reverse_mc`, the first loss below.

Terms
    word        an entry of the vocabulary. A token is a word at its place in a sequence.
    candidates  the words at a position whose log-probs a loss receives. The position itself
                belongs to one emitted token; further candidates are never emitted.
    support     where the candidates come from. They are chosen from mu or from q by a design
                (draws.py), or they are the most probable ("best") words of one of the two, or all
                words.
    stale       a response is stale if the student has been updated since it generated it: the
                words were drawn from mu, and the gradient is wanted under p.
    surrogate   a loss with the right gradient whose value is not the divergence.

Notation (the same names are used in every other module)
    p    the student being trained      logp   requires grad
    mu   the student that generated     logmu  frozen, may be stale
    q    the teacher                    logq   frozen
    N words drawn at a position or K top words, in the last dimension; V words in the vocabulary
    logpi  log of the expected number of copies of a word among the N: log N + logmu for independent
         draws, 0 for a word that is chosen for certain (draws.py)
    A = logq - logp, A_mu = logq - logmu, w = p / mu; all three are constants to the gradient
    dlogp is the gradient of logp; sum_V runs over the vocabulary, E_mu is an expectation under mu
    A position is that of the predicted token y_t: nothing in this file shifts.

Rules for every estimator
    1. It is pure: log-probs [..., C], normalised over the whole vocabulary, go in; one value per
       position [...] comes out.
    2. `.backward()` on the mean of the values gives, in expectation over the candidates, the
       gradient that the docstring states. It is 0 at p = q = mu, except in `forward_topk_no_tail`.
    3. The docstring answers the six QUESTIONS: what is minimised, which candidates it needs, its
       gradient, what its value means, what a stale mu does to it, what it does not correct.
    4. "Exact" and "unbiased" hold up to two clamps: log w, log(p / pi) <= LOG_RATIO_MAX and
       logq >= LOG_MIN. A word with p > e^20 pi counts as one with p = e^20 pi.
    5. --top-p < 1 makes mu 0 outside its nucleus. The rows whose words mu draws then sum over the
       nucleus where their gradient says sum_V.

Two traps. The mean of logp - logq at tokens drawn from p is the KL, but its gradient is 0 in
expectation. A reverse KL summed over a top-k set without renormalising pushes mass out of the set
even at p = q.

What is left out: reward-to-go. Each token is scored for itself alone, as if with a discount of 0.
Tests: tests/test_estimators.py checks every stated gradient by enumeration, tests/test_draws.py
the designs, and benchmarks/audit.py measures bias and variance.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

LOG_RATIO_MAX = 20.0    # log-ratios are clamped to 20 before exp: e^20 = 5e8 is past any use
LOG_MIN = -100.0        # a word that the teacher excludes (logq = -inf) costs 100 nats
QUESTIONS = ("Target", "Candidates", "Gradient", "Value", "Stale mu", "Not covered")


# -- what the estimators share -------------------------------------------------------------------

def importance_weight(logp: Tensor, logmu: Tensor) -> Tensor:
    """w = p / mu as a constant, at most e^20. Any shape. The same of p / pi, for a drawn word."""
    return (logp - logmu).detach().clamp(max=LOG_RATIO_MAX).exp()


def ratio(logp: Tensor, logmu: Tensor) -> Tensor:
    """p / mu as PPO differentiates it: the gradient runs through p. Any shape."""
    return (logp - logmu).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 or float64: bf16 holds three digits, too few for the exp of a difference."""
    return x if x.dtype == torch.float64 else x.float()


def in_float32(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give `fn` log-probs in float32 or float64, whatever arrives, and no logq below LOG_MIN."""
    @wraps(fn)
    def wrapped(logp: Tensor, logq: Tensor, logpi: Tensor, **knobs) -> Tensor:
        logp = at_least_float32(logp)
        logq = at_least_float32(logq).clamp(min=LOG_MIN)
        return fn(logp, logq, at_least_float32(logpi), **knobs)
    return wrapped


# -- reverse KL at drawn tokens ------------------------------------------------------------------

@in_float32
def reverse_mc(logp: Tensor, logq: Tensor, logpi: Tensor) -> Tensor:
    """Reverse KL from N candidates per position, corrected for staleness.

    Target      KL(p || q)
    Candidates  N chosen from mu by one of the designs of draws.py
    Gradient    E[ sum_N (p / pi) (logp - logq) dlogp ] = -sum_V p A dlogp: the target's, for every
                N >= 1
    Value       not the KL: this is a surrogate, `reverse_value` is the estimate to log
    Stale mu    unbiased if mu > 0 wherever p > 0, up to the clamp at p / pi = e^20; variance grows
                with E_mu[w^2], over the words that are not chosen for certain
    Not covered the prefix: y_<t has the distribution of mu, not that of p

    logp, logq: [..., N] log-probs of the same candidates; logpi: [..., N]. Returns [...].
    Source: AsyncOPD (arXiv 2606.24143), the multi-sample estimator, whose draws are independent:
    pi = N mu, and the sum is the mean of w A logp; N = 1 is its MC1.
    """
    weight = importance_weight(logp, logpi)
    advantage = (logq - logp).detach()
    return -(weight * advantage * logp).sum(-1)


@in_float32
def reverse_mc_no_is(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """`reverse_mc` without the importance weight: a synchronous loop's loss, run asynchronously.

    Target      KL(p || q), if mu were p
    Candidates  N drawn i.i.d. from mu, duplicates kept
    Gradient    -sum_V mu A dlogp, where the target's is -sum_V p A dlogp
    Value       not the KL
    Stale mu    biased by the missing w: words that p has come to prefer are counted too rarely
    Not covered that the tokens were drawn from mu; the prefix

    Source: the ablation of AsyncOPD (arXiv 2606.24143).
    """
    advantage = (logq - logp).detach()
    return -(advantage * logp).mean(-1)


@in_float32
def reverse_old_adv(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Importance-weighted, with the advantage of the student that drew the token. Not clipped.

    Target      KL(p || q) - KL(p || mu)
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp: the target's
    Value       not the target: a surrogate
    Stale mu    the second term rewards distance from mu, more so the staler mu is; at mu = p it
                has no gradient
    Not covered the prefix

    Source: AsyncOPD (arXiv 2606.24143), the old-advantage ablation.
    """
    w = importance_weight(logp, logmu)
    advantage = logq - logmu
    return -(w * advantage * logp).mean(-1)


@in_float32
def vopd(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """The emitted token, with the advantage less a baseline from the student's best words.

    Target      KL(p || q)
    Candidates  the emitted token, drawn from mu, and for the baseline mu's top K at generation
    Gradient    E[ -w (A - b) dlogp ] = -sum_V p A dlogp: the target's, for every K, because
                b = sum of p A over the top K is the same whichever token is drawn
    Value       not the KL
    Stale mu    unbiased if mu > 0 wherever p > 0, up to the clamp at w = e^20; variance grows with
                E_mu[w^2]
    Not covered the prefix

    logp, logq, logmu: [..., 1 + K], the emitted token first. Source: vOPD (arXiv 2605.07865), the
    value function -KL(p || q) as a baseline, in the form that sums over K words; w is ours, for
    tokens that an older student drew.
    """
    advantage = (logq - logp).detach()
    p = logp.detach().exp()
    baseline = (p * advantage)[..., 1:].sum(-1)
    w = importance_weight(logp[..., 0], logmu[..., 0])
    return -w * (advantage[..., 0] - baseline) * logp[..., 0]


def clipped(r: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """PPO's loss: no gradient once r has left [1 - low, 1 + high] in the advantage's direction."""
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


@in_float32
def reverse_ppo(logp: Tensor, logq: Tensor, logmu: Tensor, *, eps: float = 0.2) -> Tensor:
    """PPO with the per-token reward logq - logmu: the usual baseline.

    Target      KL(p || q) - KL(p || mu), within the clip range of w
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp over the words where the clip does not bind (A_mu > 0:
                w < 1 + eps; otherwise w > 1 - eps)
    Value       not the KL
    Stale mu    as `reverse_old_adv`, without the words past the clip: the staler mu is, the fewer
                words count
    Not covered the change of the advantage since mu; the prefix

    Source: PPO (arXiv 1707.06347), eq. 7.
    """
    return clipped(ratio(logp, logmu), logq - logmu, eps, eps).mean(-1)


@in_float32
def reverse_ppo_recomputed(logp: Tensor, logq: Tensor, logmu: Tensor, *,
                           eps: float = 0.2) -> Tensor:
    """PPO with the reward logq - logp, recomputed with the current student.

    Target      KL(p || q), within the clip range of w
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A dlogp over the words where the clip does not bind
    Value       not the KL
    Stale mu    biased only where the clip binds: it drops words that still have far to go
    Not covered the words past the clip; the prefix

    Source: AsyncOPD (arXiv 2606.24143), recomputed advantage with clip.
    """
    return clipped(ratio(logp, logmu), (logq - logp).detach(), eps, eps).mean(-1)


@in_float32
def decoupled_ppo(logp: Tensor, logq: Tensor, logmu: Tensor, *, prox: Tensor, eps: float = 0.2,
                  cap: float = 5.0) -> Tensor:
    """PPO that clips around prox, the student at the start of the train batch. Weight: prox / mu.

    Target      KL(p || q) - KL(p || mu), within the clip range of p / prox
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp over the words with prox / mu <= cap where the clip of p / prox
                does not bind
    Value       not the KL
    Stale mu    the clip does not bind merely because data are old, so the term that rewards
                distance from mu acts in full; prox = mu: `reverse_ppo`
    Not covered the words past the cap; the change of the advantage since mu; the prefix

    prox: log-probs [..., 1] like logmu. Source: AReaL (arXiv 2505.24298), eq. 5.
    """
    weight = importance_weight(prox, logmu)
    weight = torch.where(weight > cap, torch.zeros_like(weight), weight)
    return (weight * clipped(ratio(logp, prox), logq - logmu, eps, eps)).mean(-1)


def batch_prox(logp: Tensor, logq: Tensor, logmu: Tensor) -> dict[str, Tensor]:
    """The train batch for `decoupled_ppo`: its log-probs [M, 1] before the first update."""
    return {"prox": logp}


@in_float32
def m2po(logp: Tensor, logq: Tensor, logmu: Tensor, *, low: Tensor, high: Tensor) -> Tensor:
    """PPO whose clip range depends on how far the train batch has drifted: see `m2po_margins`.

    Target      KL(p || q) - KL(p || mu), within margins chosen per train batch
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp over the words where the margins do not bind
    Value       not the KL
    Stale mu    no clip while the second moment of log w is within the budget; beyond it only the
                outliers are clipped
    Not covered the change of the advantage since mu; the prefix

    low, high: the result of `m2po_margins`. Source: M2PO (arXiv 2510.01161).
    """
    return clipped(ratio(logp, logmu), logq - logmu, low, high).mean(-1)


def m2po_margins(logp: Tensor, logq: Tensor, logmu: Tensor, budget: float = 0.01,
                 floor_low: float = 0.3, floor_high: float = 0.5) -> dict[str, Tensor]:
    """The widest clip range that keeps the harmful tokens of a train batch within the budget.

    logp, logq, logmu: [M, 1], all tokens of the batch. Returns low and high, [1, 1] each.
    A token is harmful if the clip could act on it: A_mu > 0 with w > 1, or A_mu < 0 with w < 1.
    tau is the largest number for which the mean over the harmful tokens of min((log w)^2, tau^2)
    is at most the budget, and infinite if the mean of (log w)^2 itself is. Then
    low = max(1 - e^-tau, floor_low) and high = max(e^tau - 1, floor_high).
    """
    log_w = (logp - logmu).detach().double()
    advantage = logq - logmu
    squares = log_w[log_w * advantage > 0].square().sort().values
    if squares.numel() == 0 or squares.mean() <= budget:
        tau = squares.new_tensor(torch.inf)
    else:
        tau = largest_tau(squares, budget)
    low = (-torch.expm1(-tau)).clamp(min=floor_low)
    high = torch.expm1(tau).clamp(min=floor_high)
    return {"low": low.to(logp.dtype).view(1, 1), "high": high.to(logp.dtype).view(1, 1)}


def largest_tau(squares: Tensor, budget: float) -> Tensor:
    """tau for which the mean of min(squares, tau^2) is the budget.

    squares: [n], float64, in ascending order, with a mean above the budget. If the i smallest of
    them lie below tau^2, then (their sum) + (n - i) tau^2 = n budget, which gives one level tau^2
    for each i. The right i is the first whose level does not exceed the next square. Where the
    budget is all but the mean, rounding may leave none: then only the largest is above.
    """
    n = len(squares)
    sum_below = pad(squares[:-1].cumsum(0), (1, 0))
    remaining = torch.arange(n, 0, -1, device=squares.device)
    level = (n * budget - sum_below) / remaining
    fits = level <= squares
    fits[-1] = True
    return level[fits.nonzero()[0, 0]].sqrt()


# -- a set of top words --------------------------------------------------------------------------

@in_float32
def reverse_topk(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Reverse KL between p and q, both renormalised on mu's K best words, differentiated directly.

    Target      KL(p_S || q_S) on S = the top K of mu; of its nucleus, if top_p leaves fewer
    Candidates  mu's top K at generation
    Gradient    the target's; it lacks the KL between the masses inside and outside S and all
                of the outside; K = V: the gradient of KL(p || q)
    Value       the target
    Stale mu    S remains the choice of mu; the teacher has scored no other word, so nothing can
                correct it
    Not covered how much mass lies in S (p may move all of it out at no cost); the prefix

    logp, logq, logmu: [..., K]; logmu is -inf at words that only fill up the K columns.
    """
    filler = logmu == -torch.inf
    lowest = torch.finfo(logp.dtype).min          # not -inf: 0 times -inf would be nan
    logp_S = logp.masked_fill(filler, lowest).log_softmax(-1)
    logq_S = logq.masked_fill(filler, lowest).log_softmax(-1)
    return (logp_S.exp() * (logp_S - logq_S)).sum(-1)


@in_float32
def reverse_topk_pg(logp: Tensor, logq: Tensor, logmu: Tensor, *, dual: float = 3.0) -> Tensor:
    """Reverse KL on mu's K best words as a policy gradient: renormalised mass times advantage.

    Target      KL(p || q) with p restricted to S = the top K of mu
    Candidates  mu's top K at generation
    Gradient    -sum_S p_S w A dlogp with p_S = softmax of logp over S; where A < 0, only the words
                with w <= dual
    Value       not the KL
    Stale mu    S is enumerated, not drawn: w corrects nothing here and adds a second bias
    Not covered the words outside S; the prefix

    logp, logq, logmu: [..., K]. Source: THUNLP's OPD code, in the form that recomputes the
    advantage with the current student and has no PPO clip; dual clip: arXiv 1912.09729, eq. 5.
    """
    return topk_policy_gradient(logp, logq, logmu, ratio(logp, logmu), dual)


@in_float32
def reverse_topk_pg_no_is(logp: Tensor, logq: Tensor, logmu: Tensor, *,
                          dual: float = 3.0) -> Tensor:
    """`reverse_topk_pg` without the importance weight.

    Target      KL(p || q) with p restricted to S = the top K of mu
    Candidates  mu's top K at generation
    Gradient    -sum_S p_S A dlogp with p_S = softmax of logp over S; K = V: that of KL(p || q)
    Value       not the KL
    Stale mu    S remains the choice of mu; given S, the gradient does not depend on mu
    Not covered the words outside S; the prefix
    """
    one = ratio(logp, logp.detach())          # 1, with the gradient dlogp
    return topk_policy_gradient(logp, logq, logmu, one, dual)


def topk_policy_gradient(logp: Tensor, logq: Tensor, logmu: Tensor, r: Tensor,
                         dual: float) -> Tensor:
    """-sum_S p_S A r, where only r has a gradient; none past r = dual where A < 0.

    All arguments but dual are [..., K]; returns [...]. Words outside mu's nucleus, which --top-p
    cuts off (logmu = -inf), do not count, because mu never emits them.
    """
    advantage = (logp.log_softmax(-1).exp() * (logq - logp)).detach()
    advantage = advantage.masked_fill(logmu == -torch.inf, 0.0)
    surrogate = r * advantage
    return -torch.where(advantage < 0, surrogate.maximum(dual * advantage), surrogate).sum(-1)


@in_float32
def forward_topk(logp: Tensor, logq: Tensor, logmu: Tensor, *,
                 log_tail: Tensor | None = None) -> Tensor:
    """Forward KL on the teacher's K best words and the tail: all other words as one outcome.

    Target      KL(q || p), the V - K other words counted as one
    Candidates  the teacher's top K at scoring
    Gradient    -sum_K q dlogp - q_tail dlogp_tail: the target's; K = V: the gradient of KL(q || p)
    Value       the target: never above KL(q || p)
    Stale mu    unaffected: support and weights are the teacher's
    Not covered how p divides its mass within the tail; the prefix

    log_tail: [...], the log of the student's mass outside the K words. models/head.py takes it
    from the logits, exactly, however small it is; without it log(1 - sum_K p) has to do, which
    float32 cannot resolve below 1e-5. q_tail is 1 - sum_K q of stored float32 numbers: an error of
    1e-6 at most, and as much of the gradient.
    """
    best = (logq.exp() * (logq - logp)).sum(-1)
    if log_tail is None:
        log_tail = log_rest(logp)
    q_tail = -torch.expm1(logq.logsumexp(-1).clamp(max=0.0))
    return best + torch.xlogy(q_tail, q_tail) - q_tail * log_tail


@in_float32
def forward_topk_no_tail(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """`forward_topk` without the tail.

    Target      the terms of KL(q || p) that belong to the teacher's K best words
    Candidates  the teacher's top K at scoring
    Gradient    -sum_K q dlogp: the target's; K = V: the gradient of KL(q || p)
    Value       the target: it can be negative where p has more mass on the set than q
    Stale mu    unaffected: support and weights are the teacher's
    Not covered the words outside the set, which lose mass to it even at p = q; the prefix
    """
    return (logq.exp() * (logq - logp)).sum(-1)


def log_rest(logx: Tensor) -> Tensor:
    """log(1 - sum exp(logx)) over the last dimension: [..., K] -> [...].

    The rest is at least the precision of the dtype, so that the result stays finite where rounding
    leaves none.
    """
    smallest = torch.finfo(logx.dtype).eps
    return torch.log(-torch.expm1(logx.logsumexp(-1).clamp(max=-smallest)))


# -- losses that ignore logmu: words drawn by the teacher, all words, no words at all ------------

@in_float32
def forward_mc(logp: Tensor, logq: Tensor, logpi: Tensor) -> Tensor:
    """Forward KL from N candidates that the teacher draws at the student's prefixes.

    Target      KL(q || p)
    Candidates  N chosen from q at scoring, by one of the designs of draws.py
    Gradient    -E[ sum_N (q / pi) dlogp ]: the target's, for every N >= 1
    Value       an unbiased estimate of KL(q || p)
    Stale mu    unaffected: the words are the teacher's
    Not covered the prefix
    """
    return (importance_weight(logq, logpi) * (logq - logp)).sum(-1)


@in_float32
def forward_dense(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Forward KL over the whole vocabulary. logp, logq: [..., V].

    Target      KL(q || p)
    Candidates  none: all words
    Gradient    -sum_V q dlogp
    Value       the target
    Stale mu    exact: no word was drawn
    Not covered the prefix
    """
    return (logq.exp() * (logq - logp)).sum(-1)


@in_float32
def reverse_dense(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Reverse KL over the whole vocabulary. logp, logq: [..., V].

    Target      KL(p || q)
    Candidates  none: all words
    Gradient    -sum_V p A dlogp
    Value       the target
    Stale mu    exact: no word was drawn
    Not covered the prefix
    """
    return (logp.exp() * (logp - logq)).sum(-1)


@in_float32
def jsd_dense(logp: Tensor, logq: Tensor, logmu: Tensor, *, beta: float = 0.5) -> Tensor:
    """The generalised Jensen-Shannon divergence over the whole vocabulary. logp, logq: [..., V].

    Target      beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p
    Candidates  none: all words
    Gradient    the target's
    Value       the target; at beta = 0 KL(q || p), the limit of target / beta, and at beta = 1
                KL(p || q), the limit of target / (1 - beta)
    Stale mu    exact: no word was drawn
    Not covered the prefix

    Source: GKD (arXiv 2306.13649), eq. 1.
    """
    if beta == 0.0:
        return forward_dense(logp, logq, logmu)
    if beta == 1.0:
        return reverse_dense(logp, logq, logmu)
    b = logp.new_tensor(beta)
    logm = torch.logaddexp(logq + b.log(), logp + torch.log1p(-b))
    from_q = beta * logq.exp() * (logq - logm)
    from_p = (1 - beta) * logp.exp() * (logp - logm)
    return (from_q + from_p).sum(-1)


@in_float32
def no_divergence(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """No loss on log-probs, for a run that minimises the loss of an extension alone.

    Target      none: the loss is that of the extension
    Candidates  none: the emitted token serves the logged KL
    Gradient    none: nothing passes through the LM head
    Value       0 at every position
    Stale mu    unaffected: there is nothing to correct
    Not covered the LM head, which gets no gradient
    """
    return torch.zeros_like(logp[..., 0])


# -- the logged KL -------------------------------------------------------------------------------

@in_float32
def reverse_value(logp: Tensor, logq: Tensor, logpi: Tensor) -> Tensor:
    """Estimate of KL(p || q) from candidates chosen from mu: sum of (p / pi) (logp - logq).

    Unbiased if mu > 0 wherever p > 0, up to the clamp at w = e^20. With top_p < 1 it estimates
    the sum of p (logp - logq) over mu's nucleus alone.
    """
    return (importance_weight(logp, logpi) * (logp - logq)).detach().sum(-1)


@in_float32
def forward_value(logp: Tensor, logq: Tensor, logpi: Tensor) -> Tensor:
    """Estimate of KL(q || p) from candidates chosen from mu: sum of (q / pi) (logq - logp).

    Unbiased if mu > 0 wherever q > 0, up to the clamp at q / mu = e^20. With top_p < 1 it
    estimates the sum of q (logq - logp) over mu's nucleus alone.
    """
    return (importance_weight(logq, logpi) * (logq - logp)).detach().sum(-1)


# -- the table -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimator:
    """One row of the table: a loss and what it needs.

    A slot (cache.py) stores the same number of words at every position, in columns. Column 0 is
    the emitted token. `support` says which words the columns are:

    sampled       the emitted token alone
    candidates    N words drawn by the student, of which the emitted token is the first
    student_topk  the emitted token, then the student's K best words at generation
    sampled_topk  the same words, all of which the loss receives
    teacher_topk  the emitted token, then the teacher's K best words at scoring
    teacher_mc    the emitted token, then N words drawn by the teacher
    full          the emitted token, and the teacher's last hidden state, from which the learner
                  computes the log-probs of all V words
    """
    fn: Callable[..., Tensor]
    """The loss: (logp, logq, logpi) [..., C], and further arguments by name, to [...]. For a single
    token drawn by the student logpi is logmu; for its best words it is logmu too."""
    kl: Literal["reverse", "forward"]
    """The KL that is logged."""
    support: Literal["sampled", "candidates", "student_topk", "sampled_topk", "teacher_topk",
                     "teacher_mc", "full"]
    unbiased: bool = False
    """The expected gradient is that of the divergence over all words, for every mu with mu > 0
    wherever p > 0, up to the clamps of rule 4."""
    knobs: tuple[str, ...] = ()
    """Arguments of fn that are set by the flags of the same names."""
    batch: Callable[..., dict[str, Tensor]] | None = None
    """For a loss that depends on its whole train batch: computes further arguments of fn, [M, C]
    or [1, 1], from (logp, logq, logmu) [M, C] of all M positions of the batch, before its first
    update."""
    tail: bool = False
    """fn has an argument log_tail [...]: the log of the mass that p has outside the words whose
    log-probs fn receives. models/head.py computes it."""
    designs: tuple[str, ...] = ()
    """Designs of draws.py by which its N words may be chosen, of which --draws auto takes the last;
    none where it has no N words."""
    head: bool = True
    """The gradient of fn passes through the LM head; False: fn has no gradient."""

    def columns(self, n: int, k: int) -> int:
        """The number of columns. The logged KL needs column 0, whatever the loss needs."""
        by_support = {"sampled": 1, "candidates": n, "student_topk": 1 + k, "sampled_topk": 1 + k,
                      "teacher_topk": 1 + k, "teacher_mc": 1 + n, "full": 1}
        return by_support[self.support]

    def drawn(self, n: int) -> int:
        """The number of columns that the student draws, including the emitted token."""
        return n if self.support == "candidates" else 1

    def top(self, k: int) -> int:
        """The number of its own best words that the student records after the drawn ones."""
        return k if self.support in ("student_topk", "sampled_topk") else 0

    def scored(self, x: Tensor, selective: bool = False) -> Tensor:
        """Of all columns [..., C] of a slot, those that `fn` receives: its candidates.

        `selective`: positions are weighed or left out by their emitted token. Then that token is
        no draw from mu, the other candidates are, and `fn` receives these alone.
        """
        if self.support in ("sampled", "sampled_topk"):
            return x
        if self.support == "candidates" and not selective:
            return x
        return x[..., 1:]

    def logged(self, x: Tensor, selective: bool = False) -> Tensor:
        """Of all columns [..., C], those drawn by mu from which the logged KL is estimated.

        If positions are `selective` and no further word was drawn, it is the emitted token all the
        same: then the logged KL is that of a selection of tokens.
        """
        n = self.drawn(x.shape[-1])
        if selective and n > 1:
            return x[..., 1:n]
        return x[..., :n]

    def allows_selection(self, n: int) -> bool:
        """Whether the loss of a position that is selected by its emitted token has candidates that
        the selection does not touch. `n`: --mc-samples."""
        if self.support == "candidates":
            return n > 1
        return self.support not in ("sampled", "sampled_topk")

    def bytes(self, n: int, k: int, hidden: int) -> int:
        """Per token in a slot: logmu, and id, logpi and logq of every column, 4 bytes each, and
        where the teacher's hidden state is kept, its `hidden` bytes."""
        return 4 + 12 * self.columns(n, k) + (hidden if self.support == "full" else 0)

    def bind(self, flags: object) -> Callable[..., Tensor]:
        """`fn` with its knobs set to the values of the flags with the same names."""
        return partial(self.fn, **{name: getattr(flags, name) for name in self.knobs})

    def says(self, question: str) -> str:
        """The answer that the docstring of `fn` gives to one of QUESTIONS, on one line."""
        answer: list[str] = []
        for line in map(str.strip, self.fn.__doc__.splitlines()):
            if line.startswith(question):
                answer.append(line.removeprefix(question).strip())
            elif answer and (line == "" or line.startswith(QUESTIONS)):
                break
            elif answer:
                answer.append(line)
        return " ".join(answer)


ESTIMATORS = {      # the choices of --estimator: the loss, the logged KL, the support
    "reverse_mc": Estimator(reverse_mc, "reverse", "candidates", unbiased=True,
                            designs=("iid", "optimal")),
    "reverse_mc_no_is": Estimator(reverse_mc_no_is, "reverse", "candidates", designs=("iid",)),
    "reverse_ppo": Estimator(reverse_ppo, "reverse", "sampled"),
    "reverse_ppo_recomputed": Estimator(reverse_ppo_recomputed, "reverse", "sampled"),
    "vopd": Estimator(vopd, "reverse", "sampled_topk", unbiased=True),
    "reverse_old_adv": Estimator(reverse_old_adv, "reverse", "sampled"),
    "decoupled_ppo": Estimator(decoupled_ppo, "reverse", "sampled", batch=batch_prox),
    "m2po": Estimator(m2po, "reverse", "sampled", batch=m2po_margins),
    "reverse_topk": Estimator(reverse_topk, "reverse", "student_topk"),
    "reverse_topk_pg": Estimator(reverse_topk_pg, "reverse", "student_topk"),
    "reverse_topk_pg_no_is": Estimator(reverse_topk_pg_no_is, "reverse", "student_topk"),
    "forward_topk": Estimator(forward_topk, "forward", "teacher_topk", tail=True),
    "forward_topk_no_tail": Estimator(forward_topk_no_tail, "forward", "teacher_topk"),
    "forward_mc": Estimator(forward_mc, "forward", "teacher_mc", unbiased=True,
                            designs=("iid", "optimal")),
    "forward_dense": Estimator(forward_dense, "forward", "full", unbiased=True),
    "reverse_dense": Estimator(reverse_dense, "reverse", "full", unbiased=True),
    "jsd_dense": Estimator(jsd_dense, "reverse", "full", unbiased=True, knobs=("beta",)),
    "none": Estimator(no_divergence, "reverse", "sampled", head=False),
}
DEFAULT = {"reverse": "reverse_mc", "forward": "forward_topk"}    # --kl without --estimator
VALUE = {"reverse": reverse_value, "forward": forward_value}      # logged KL, from words mu drew
DENSE = {"reverse": reverse_dense, "forward": forward_dense}      # the same KL over all words


def estimator_table(n: int = 4, k: int = 16) -> str:
    """The table of docs/estimators.md, in Markdown, from ESTIMATORS and the docstrings."""
    rows = [f"| estimator | target | candidates | bytes per token, N = {n}, K = {k} | unbiased "
            "| under a stale mu |",
            "|---|---|---|--:|---|---|"]
    for name, row in ESTIMATORS.items():
        size = f"{row.bytes(n, k, 0)}"
        if row.support == "full":
            size += " + 2 H"
        unbiased = "yes" if row.unbiased else "no"
        cells = [f"`{name}`", row.says("Target"), row.says("Candidates"), size, unbiased,
                 row.says("Stale mu")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)

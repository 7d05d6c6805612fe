"""
All KL estimators of this repository, in one file, meant to be read top to bottom.

Notation (the same names are used in every other module)
    p    the student being trained      logp   requires grad
    mu   the student that generated     logmu  frozen, may be stale
    q    the teacher                    logq   frozen
    N Monte Carlo candidates or K top tokens at a position (the last dimension), V vocabulary
    A = logq - logp, A_mu = logq - logmu, w = p / mu; all three are constants to the gradient
    A position is that of the token y_t itself: nothing in this file shifts.

Rules every estimator here obeys
    1. pure: log-probs with the full-vocabulary normaliser in, [..., C]; one value per position out, [...].
    2. `.backward()` on its mean is the gradient the docstring states. A = 0 for a p that equals q.
    3. the docstring says which distribution the candidates must come from.
    4. tests/test_estimators.py checks 2 exactly, by enumeration, and benchmarks/audit.py measures it.

Traps: the mean of logp - logq at tokens drawn from p is the KL, but its gradient is 0 in expectation; and a
reverse KL summed over a top-k set as it is pushes mass out of the set even at p = q.
What is left out: reward-to-go. Distillation is local to a token, so the discount is 0 throughout.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

LOG_RATIO_MAX = 20.0    # a log-ratio is clamped to +-20 before exp: e^20 is 5e8, past any use, and stays finite
LOG_MIN = -100.0        # a word that the teacher rules out (logq -inf) costs 100 nats, and no infinity
BLOCK = 64              # words per block of `draw`: at V = 150,000 and N = 64 its two levels cost the same


# -- draws, weights, values ------------------------------------------------------------------------

def shaped(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The logits [R, V], float32, of the distribution that is really sampled: -inf outside the nucleus of top_p."""
    x = logits.float() if temperature == 1.0 else logits.float() / temperature
    if top_p < 1.0:
        value, order = x.softmax(-1).sort(descending=True)
        outside = value.cumsum(-1) - value >= top_p      # the smallest set of words whose probabilities reach top_p
        x = x.masked_fill(outside.gather(1, order.argsort(1)), -torch.inf)
    return x


def draw(logits: Tensor, u: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of softmax(logits) at u: ids [R, N] and their log-probs, float32, [R, N].

    logits [R, V] of any float dtype; u [R, N] uniform on [0, 1), float64 so that words of probability 1e-12 are drawn
    as often as they should be. Two levels: a block of words by the blocks' masses, then a word inside of it, so that
    only a softmax and one sum pass over V whatever N is. The log-probs are those of the very weights drawn by.
    """
    weight = shaped(logits, temperature, top_p).softmax(-1)
    if weight.shape[1] % BLOCK:                          # a pad of nothing would copy
        weight = pad(weight, (0, -weight.shape[1] % BLOCK))
    mass = (weight := weight.view(len(u), -1, BLOCK)).sum(-1).double()
    edge = mass.cumsum(-1)
    target = (u * edge[:, -1:]).clamp(max=edge[:, -1:] * (1 - 1e-15))
    block = torch.searchsorted(edge, target, right=True)                      # first block whose edge lies beyond
    words, mass = weight[torch.arange(len(u), device=u.device)[:, None], block], mass.gather(1, block)
    inside = words.double().cumsum(-1)                                        # [R, N, BLOCK]
    rest = (target - edge.gather(1, block) + mass) / mass                     # a share: mass is rounded to float32
    word = torch.searchsorted(inside, (rest.clamp(0, 1 - 1e-15) * inside[..., -1])[..., None], right=True)
    return block * BLOCK + word.squeeze(-1), words.gather(-1, word).squeeze(-1).log() - edge[:, -1:].log().float()


def importance_weight(logp: Tensor, logmu: Tensor) -> Tensor:
    """w = p / mu, detached, never clipped beyond LOG_RATIO_MAX. Any shape."""
    return (logp - logmu).detach().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def ratio(logp: Tensor, logmu: Tensor) -> Tensor:
    """p / mu as PPO differentiates it: the gradient runs through p. Any shape."""
    return (logp - logmu).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()


def in_float32(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Log-probs of any type are worked on in float32 or more: bf16 holds 3 digits, and w is the exp of a difference."""
    @wraps(fn)
    def wrapped(logp: Tensor, logq: Tensor, logmu: Tensor, **knobs) -> Tensor:
        logp, logq, logmu = (x if x.dtype == torch.float64 else x.float() for x in (logp, logq, logmu))
        return fn(logp, logq.clamp(min=LOG_MIN), logmu, **knobs)
    return wrapped


@in_float32
def reverse_value(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Unbiased estimate of KL(p || q) at a position from candidates drawn i.i.d. from mu: mean of w (logp - logq)."""
    return (importance_weight(logp, logmu) * (logp - logq)).detach().mean(-1)


@in_float32
def forward_value(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Unbiased estimate of KL(q || p) from candidates drawn i.i.d. from mu: mean of (q / mu) (logq - logp)."""
    return (importance_weight(logq, logmu) * (logq - logp)).detach().mean(-1)


# -- reverse KL at drawn tokens --------------------------------------------------------------------

@in_float32
def reverse_mc(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Reverse KL from N candidates per position, corrected for staleness.

    Target      KL(p || q)
    Candidates  N drawn i.i.d. from mu, duplicates kept
    Gradient    E_mu[ w (logp - logq) dlogp ]: that of the target for every N >= 1
    Value       not the KL: this is a surrogate, log `reverse_value` instead
    Stale mu    exact in expectation while mu > 0 wherever p > 0; variance grows with E_mu[w^2]
    Not covered the prefix y_<t is still distributed as under mu, not under p

    logp, logq, logmu: [..., N] log-probs of the same candidates. Returns [...].
    Source: AsyncOPD (arXiv 2606.24143), the multi-sample estimator; N = 1 is its MC1.
    """
    w = importance_weight(logp, logmu)
    advantage = (logq - logp).detach()
    return -(w * advantage * logp).mean(-1)


@in_float32
def reverse_mc_no_is(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """`reverse_mc` without the weight: what a synchronous loop computes, run asynchronously.

    Target      KL(p || q), if mu were p
    Candidates  N drawn i.i.d. from mu, duplicates kept
    Gradient    -sum_V mu A dlogp where the target's is -sum_V p A dlogp
    Value       not the KL
    Stale mu    biased by the missing w: the words that p has come to prefer since are undercounted
    Not covered action staleness at all; the prefix

    Source: the ablation of AsyncOPD (arXiv 2606.24143).
    """
    return -((logq - logp).detach() * logp).mean(-1)


@in_float32
def reverse_old_adv(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Importance-weighted, with the advantage of the student that drew the token. Not clipped.

    Target      KL(p || q) - KL(p || mu)
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp: exactly that of the target
    Value       not the target: a surrogate
    Stale mu    the second term rewards leaving mu, and the more so the staler mu is; at mu = p it has no gradient
    Not covered the prefix

    Source: AsyncOPD (arXiv 2606.24143), the old-advantage ablation.
    """
    return -(importance_weight(logp, logmu) * (logq - logmu) * logp).mean(-1)


def clipped(r: Tensor, advantage: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """PPO's loss: no gradient once r has left [1 - low, 1 + high] on the side that the advantage asks for."""
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


@in_float32
def reverse_ppo(logp: Tensor, logq: Tensor, logmu: Tensor, *, eps: float = 0.2) -> Tensor:
    """PPO with the per-token reward logq - logmu: the usual baseline.

    Target      KL(p || q) - KL(p || mu), within the clip range of w
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp where the clip does not bind (A_mu > 0: w < 1 + eps; else w > 1 - eps)
    Value       not the KL
    Stale mu    that of `reverse_old_adv`, less the words past the clip: old data say ever less
    Not covered the change of the advantage since mu; the prefix

    Source: PPO (arXiv 1707.06347), eq. 7.
    """
    return clipped(ratio(logp, logmu), logq - logmu, eps, eps).mean(-1)


@in_float32
def reverse_ppo_recomputed(logp: Tensor, logq: Tensor, logmu: Tensor, *, eps: float = 0.2) -> Tensor:
    """PPO with the reward of the student now.

    Target      KL(p || q), within the clip range of w
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A dlogp over the words where the clip does not bind
    Value       not the KL
    Stale mu    biased exactly where the clip binds: it drops words that still have a long way to go
    Not covered those words; the prefix

    Source: AsyncOPD (arXiv 2606.24143), recomputed advantage with clip.
    """
    return clipped(ratio(logp, logmu), (logq - logp).detach(), eps, eps).mean(-1)


@in_float32
def decoupled_ppo(logp: Tensor, logq: Tensor, logmu: Tensor, *, prox: Tensor, eps: float = 0.2,
                  cap: float = 5.0) -> Tensor:
    """PPO that clips around the student at the start of the train batch, prox, and weighs by prox / mu.

    Target      KL(p || q) - KL(p || mu), within the clip range of p / prox
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp over the words with prox / mu <= cap where the clip of p / prox does not bind
    Value       not the KL
    Stale mu    the clip no longer binds on old data, so the pull away from mu is met in full; prox = mu: `reverse_ppo`
    Not covered the words past the cap; the change of the advantage since mu; the prefix

    prox: log-probs [..., 1] like logmu. Source: AReaL (arXiv 2505.24298), eq. 5.
    """
    behave = importance_weight(prox, logmu)
    behave = torch.where(behave > cap, torch.zeros_like(behave), behave)
    return (behave * clipped(ratio(logp, prox), logq - logmu, eps, eps)).mean(-1)


@in_float32
def m2po(logp: Tensor, logq: Tensor, logmu: Tensor, *, low: Tensor, high: Tensor) -> Tensor:
    """PPO whose clip range follows from how far the train batch has drifted: see `m2po_margins`.

    Target      KL(p || q) - KL(p || mu), within margins chosen per train batch
    Candidates  the emitted token, drawn from mu
    Gradient    -sum_V p A_mu dlogp over the words where the margins do not bind
    Value       not the KL
    Stale mu    no clip while the second moment of log w is within budget; then only the outliers are clipped
    Not covered the change of the advantage since mu; the prefix

    low, high: what `m2po_margins` returns. Source: M2PO (arXiv 2510.01161).
    """
    return clipped(ratio(logp, logmu), logq - logmu, low, high).mean(-1)


def m2po_margins(logp: Tensor, logq: Tensor, logmu: Tensor, budget: float = 0.01, floor_low: float = 0.3,
                 floor_high: float = 0.5) -> dict[str, Tensor]:
    """The widest clip range that keeps the harmful tokens of a train batch within budget. [M, 1] in, [1, 1] out.

    Harmful is a token that the clip could act on: A_mu > 0 with w > 1, or A_mu < 0 with w < 1. tau is the largest
    number with mean over the harmful of min(log w^2, tau^2) <= budget (none if the mean of log w^2 itself is within
    budget); low = max(1 - e^-tau, floor_low), high = max(e^tau - 1, floor_high).
    """
    log_w, advantage = (logp - logmu).detach(), logq - logmu
    squares = log_w[log_w * advantage > 0].square().sort().values
    if squares.numel() == 0 or squares.mean() <= budget:
        tau = logp.new_tensor(torch.inf)
    else:      # with the i smallest below tau^2: their sum + (n - i) tau^2 = n budget; the first i that is consistent
        n, below = len(squares), squares.cumsum(0) - squares
        level = (n * budget - below) / torch.arange(n, 0, -1, device=squares.device)
        tau = level[(level <= squares).nonzero()[0, 0]].sqrt()
    return {"low": (-torch.expm1(-tau)).clamp(min=floor_low).view(1, 1),
            "high": torch.expm1(tau).clamp(min=floor_high).view(1, 1)}


# -- a set of top tokens ---------------------------------------------------------------------------

@in_float32
def reverse_topk(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Reverse KL between p and q, both renormalised on the K words that mu liked best. Differentiated as it is.

    Target      KL(p_S || q_S) on S = the top K of mu
    Candidates  mu's top K at generation
    Gradient    that of the target: misses KL between the masses in and out of S, and all of the outside (K = V: exact)
    Value       the target
    Stale mu    S stays what mu liked; teacher scores outside of it do not exist, so nothing can repair it
    Not covered how much mass lies in S (p may move all of it out at no cost); the prefix
    """
    logp, logq = logp.log_softmax(-1), logq.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


@in_float32
def reverse_topk_pg(logp: Tensor, logq: Tensor, logmu: Tensor, *, dual: float = 3.0) -> Tensor:
    """Reverse KL on mu's top K as a policy gradient: the renormalised student's mass times the advantage.

    Target      KL(p || q) with p restricted to S = the top K of mu
    Candidates  mu's top K at generation
    Gradient    -sum_S p_S w A dlogp (p_S = softmax of logp over S); where A < 0 none past w = dual
    Value       not the KL
    Stale mu    S is enumerated, not drawn: w does not correct it, it adds a second bias
    Not covered the words outside of S; the prefix

    logp, logq, logmu: [..., K]. Source: the form in THUNLP's OPD code; dual clip: arXiv 1912.09729, eq. 5.
    """
    return topk_policy_gradient(logp, logq, logmu, ratio(logp, logmu), dual)


@in_float32
def reverse_topk_pg_no_is(logp: Tensor, logq: Tensor, logmu: Tensor, *, dual: float = 3.0) -> Tensor:
    """`reverse_topk_pg` without the weight.

    Target      KL(p || q) with p restricted to S = the top K of mu
    Candidates  mu's top K at generation
    Gradient    -sum_S p_S A dlogp (p_S = softmax of logp over S); K = V: that of KL(p || q)
    Value       not the KL
    Stale mu    S stays what mu liked; on S the gradient does not depend on mu
    Not covered the words outside of S; the prefix
    """
    return topk_policy_gradient(logp, logq, logmu, ratio(logp, logp.detach()), dual)


def topk_policy_gradient(logp: Tensor, logq: Tensor, logmu: Tensor, r: Tensor, dual: float) -> Tensor:
    """-sum over S of p_S A r, in which the gradient runs through r alone; where A < 0 none past r = dual."""
    advantage = (logp.log_softmax(-1).exp() * (logq - logp)).detach()
    advantage = advantage.masked_fill(logmu == -torch.inf, 0.0)           # outside the nucleus: mu never says it
    surrogate = r * advantage
    return -torch.where(advantage < 0, surrogate.maximum(dual * advantage), surrogate).sum(-1)


@in_float32
def forward_topk(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Forward KL on the teacher's K best tokens, everything else lumped into one more outcome.

    Target      KL(q || p), the V - K other words counted as one
    Candidates  the teacher's top K at scoring
    Gradient    -sum_K q dlogp - q_tail dlogp_tail: that of the target; K = V: KL(q || p)
    Value       the target: never above KL(q || p)
    Stale mu    unaffected: support and weights are the teacher's
    Not covered how p divides its mass within the tail; the prefix
    """
    log_tail_p, log_tail_q = log_rest(logp), log_rest(logq)
    return (logq.exp() * (logq - logp)).sum(-1) + log_tail_q.exp() * (log_tail_q - log_tail_p)


@in_float32
def forward_topk_no_tail(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """`forward_topk` without the other words.

    Target      KL(q || p), only its K terms of the teacher's best words
    Candidates  the teacher's top K at scoring
    Gradient    -sum_K q dlogp: that of the target; K = V: KL(q || p)
    Value       the target: below 0 where p has more mass on the set than q
    Stale mu    unaffected: support and weights are the teacher's
    Not covered the words outside of the set, towards which nothing pulls; the prefix
    """
    return (logq.exp() * (logq - logp)).sum(-1)


def log_rest(logx: Tensor) -> Tensor:
    """log(1 - sum exp(logx)) over the last dimension, kept finite where rounding leaves no rest. Returns [...]."""
    return torch.log(-torch.expm1(logx.logsumexp(-1).clamp(max=-1e-7)))


# -- what the teacher draws; the whole vocabulary (logp, logq [..., V]); neither looks at logmu ------

@in_float32
def forward_mc(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Forward KL from N candidates that the teacher draws at the student's prefixes.

    Target      KL(q || p)
    Candidates  N drawn i.i.d. from q at scoring, duplicates kept
    Gradient    -E_q[dlogp]: that of the target for every N >= 1
    Value       an unbiased estimate of KL(q || p)
    Stale mu    unaffected: the words are the teacher's
    Not covered the prefix
    """
    return (logq - logp).mean(-1)


@in_float32
def forward_dense(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """Forward KL over the whole vocabulary.

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
    """Reverse KL over the whole vocabulary.

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
    """The generalised Jensen-Shannon divergence over the whole vocabulary, between forward and reverse KL.

    Target      beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p
    Candidates  none: all words
    Gradient    that of the target
    Value       the target; beta = 0 stands for KL(q || p) and beta = 1 for KL(p || q), which it tends to, rescaled
    Stale mu    exact: no word was drawn
    Not covered the prefix

    Source: GKD (arXiv 2306.13649), eq. 1.
    """
    if beta in (0.0, 1.0):
        return reverse_dense(logp, logq, logmu) if beta else forward_dense(logp, logq, logmu)
    b = logp.new_tensor(beta)
    logm = torch.logaddexp(logq + b.log(), logp + torch.log1p(-b))
    return (beta * logq.exp() * (logq - logm) + (1 - beta) * logp.exp() * (logp - logm)).sum(-1)


@in_float32
def no_divergence(logp: Tensor, logq: Tensor, logmu: Tensor) -> Tensor:
    """No loss on log-probs: for a run that minimises the loss of an extension alone.

    Target      none: the loss is an extension's
    Candidates  none: the emitted token carries the logged KL
    Gradient    none: nothing passes through the LM head
    Value       0 at every position
    Stale mu    unaffected: there is nothing to correct
    Not covered everything that log-probs could teach
    """
    return torch.zeros_like(logp[..., 0])


# -- the table -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimator:
    """One row. `support` says what a slot must hold; everything that records, scores or trains obeys it:

    sampled       the emitted token                candidates    N drawn by the student, the emitted token first
    student_topk  the emitted token, then the student's K best at generation
    teacher_topk  the emitted token, then the teacher's K best at scoring
    teacher_mc    the emitted token, then N drawn by the teacher
    full          the emitted token, and the teacher's last hidden state, from which the learner makes all V
    """
    fn: Callable[..., Tensor]
    kl: Literal["reverse", "forward"]                 # which one is logged
    support: Literal["sampled", "candidates", "student_topk", "teacher_topk", "teacher_mc", "full"]
    unbiased: bool                                    # expected gradient = that of the dense divergence, for any mu
    knobs: tuple[str, ...] = ()                       # flags that fn takes by their names
    batch: Callable[..., dict[str, Tensor]] | None = None      # (logp, logq, logmu) [M, C] of a whole train batch, by
    # the student before its first update -> what fn takes by name besides, [M, C] or [1, 1]
    head: bool = True                                 # fn is a loss on log-probs, which passes through the LM head

    def columns(self, n: int, k: int) -> int:
        """Token ids per position in a slot. Column 0 is always the emitted token: it carries the logged KL."""
        return {"sampled": 1, "candidates": n, "student_topk": 1 + k, "teacher_topk": 1 + k, "teacher_mc": 1 + n,
                "full": 1}[self.support]

    def drawn(self, n: int) -> int:
        """How many of the columns are drawn by the student, the emitted token among them."""
        return n if self.support == "candidates" else 1

    def top(self, k: int) -> int:
        """How many of its own best words the student records after the drawn ones."""
        return k if self.support == "student_topk" else 0

    def scored(self, x: Tensor) -> Tensor:
        """The columns that `fn` works on, out of all of a slot's columns [..., C]."""
        return x if self.support in ("sampled", "candidates") else x[..., 1:]

    def bytes(self, n: int, k: int, hidden: int) -> int:
        """Per token in a slot: id, logmu and logq of every column, 4 bytes each; `hidden` of a hidden state."""
        return 12 * self.columns(n, k) + (hidden if self.support == "full" else 0)

    def bind(self, flags: object) -> Callable[..., Tensor]:
        return partial(self.fn, **{name: getattr(flags, name) for name in self.knobs})

    def says(self, line: str) -> str:
        """A line of the docstring of `fn`."""
        return next(x.split(line)[1].strip() for x in self.fn.__doc__.splitlines() if x.strip().startswith(line))


ESTIMATORS = {
    "reverse_mc": Estimator(reverse_mc, "reverse", "candidates", unbiased=True),
    "reverse_mc_no_is": Estimator(reverse_mc_no_is, "reverse", "candidates", unbiased=False),
    "reverse_ppo": Estimator(reverse_ppo, "reverse", "sampled", unbiased=False),
    "reverse_ppo_recomputed": Estimator(reverse_ppo_recomputed, "reverse", "sampled", unbiased=False),
    "reverse_old_adv": Estimator(reverse_old_adv, "reverse", "sampled", unbiased=False),
    "decoupled_ppo": Estimator(decoupled_ppo, "reverse", "sampled", unbiased=False,
                               batch=lambda logp, logq, logmu: {"prox": logp}),
    "m2po": Estimator(m2po, "reverse", "sampled", unbiased=False, batch=m2po_margins),
    "reverse_topk": Estimator(reverse_topk, "reverse", "student_topk", unbiased=False),
    "reverse_topk_pg": Estimator(reverse_topk_pg, "reverse", "student_topk", unbiased=False),
    "reverse_topk_pg_no_is": Estimator(reverse_topk_pg_no_is, "reverse", "student_topk", unbiased=False),
    "forward_topk": Estimator(forward_topk, "forward", "teacher_topk", unbiased=False),
    "forward_topk_no_tail": Estimator(forward_topk_no_tail, "forward", "teacher_topk", unbiased=False),
    "forward_mc": Estimator(forward_mc, "forward", "teacher_mc", unbiased=True),
    "forward_dense": Estimator(forward_dense, "forward", "full", unbiased=True),
    "reverse_dense": Estimator(reverse_dense, "reverse", "full", unbiased=True),
    "jsd_dense": Estimator(jsd_dense, "reverse", "full", unbiased=True, knobs=("beta",)),
    "none": Estimator(no_divergence, "reverse", "sampled", unbiased=False, head=False),
}
DEFAULT = {"reverse": "reverse_mc", "forward": "forward_topk"}      # what --kl means without --estimator
VALUE = {"reverse": reverse_value, "forward": forward_value}        # the logged `kl`, from columns drawn by mu
DENSE = {"reverse": reverse_dense, "forward": forward_dense}        # the same from all words: the reference


def estimator_table(n: int = 4, k: int = 16) -> str:
    """The table of the README, in Markdown, from ESTIMATORS and the docstrings."""
    rows = [f"| estimator | target | candidates | bytes per token, N = {n}, K = {k} | unbiased | under a stale mu |",
            "|---|---|---|--:|---|---|"]
    for name, e in ESTIMATORS.items():
        cells = (f"`{name}`", e.says("Target"), e.says("Candidates"),
                 f"{e.bytes(n, k, 0)}" + (" + 2 H" if e.support == "full" else ""),
                 "yes" if e.unbiased else "no", e.says("Stale mu"))
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)

"""
What the table of estimators claims, under all that a run may do to a draw: temperature, top-p, a stale student,
minibatches. Exactly: a vocabulary of 5, float64, every possible draw enumerated.

`Case` is a position. `expected` is the mean gradient of a row over its draws; STATED writes down, for every row, the
gradient that its docstring states.
"""
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from draws import shaped
from estimators import DENSE, ESTIMATORS, LOG_RATIO_MAX, VALUE, Estimator, jsd_dense, reverse_topk
from tests.test_estimators import error, grad_of, gradients, kl, weighted

V, N, K, TINY = 5, 2, 3, 1e-12
LOW, HIGH, BETA = 0.3, 0.6, 0.3          # margins of m2po, mixture of jsd_dense
WITH_LOSS = [name for name, row in ESTIMATORS.items() if row.head]
UNBIASED = [name for name in WITH_LOSS if ESTIMATORS[name].unbiased]


@dataclass(frozen=True)
class Case:
    """A position: logits of p, log-probs of q and of what is sampled, mu, and of prox, a student between both."""
    logits: Tensor
    logq: Tensor
    logmu: Tensor
    prox: Tensor

    @property
    def logp(self) -> Tensor:
        return self.logits.log_softmax(-1)

    @property
    def inside(self) -> Tensor:
        """The words that mu can draw."""
        return self.logmu > -torch.inf

    def top(self, k: int = K) -> Tensor:
        """What the engine records as the best words of mu; those outside the nucleus fill up."""
        return self.logmu.topk(k).indices


def case(seed=0, gap=0.8, temperature=1.0, top_p=1.0) -> Case:
    g = torch.Generator().manual_seed(seed)
    logits, teacher, drift = (torch.randn(V, generator=g, dtype=torch.float64) for _ in range(3))
    old = shaped((logits + gap * drift)[None], temperature, top_p)[0]
    between = logits + gap / 2 * drift
    return Case(logits, teacher.log_softmax(-1), old.double().log_softmax(-1), between.log_softmax(-1))


CASES = {
    "on-policy": dict(gap=0.0), "stale": {}, "cold": dict(temperature=0.6), "hot": dict(temperature=1.7),
    "top-p": dict(top_p=0.7), "cold, top-p": dict(temperature=0.7, top_p=0.6), "very stale": dict(gap=2.0)}
TRUNCATED = [name for name, how in CASES.items() if "top_p" in how]


def draws(row: Estimator, x: Case) -> tuple[Tensor, Tensor]:
    """All that a slot may hold for the loss: ids [R, C], and their probabilities [R]."""
    if row.support in ("sampled", "candidates", "teacher_mc"):
        source = x.logq if row.support == "teacher_mc" else x.logmu
        words = (source > -torch.inf).nonzero().flatten().tolist()
        ids = torch.tensor(list(itertools.product(words, repeat=1 if row.support == "sampled" else N)))
        return ids, source[ids].sum(-1).exp()
    if row.support == "sampled_topk":
        words = x.inside.nonzero()
        return torch.cat([words, x.top().expand(len(words), -1)], 1), x.logmu[words[:, 0]].exp()
    ids = {"student_topk": x.top(), "teacher_topk": x.logq.topk(K).indices, "full": torch.arange(V)}[row.support]
    return ids[None], torch.ones(1, dtype=torch.float64)


def further(name: str, x: Case, ids: Tensor) -> dict:
    """The arguments by name."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return {"decoupled_ppo": {"prox": x.prox[ids]}, "m2po": {"low": LOW * one, "high": HIGH * one},
            "jsd_dense": {"beta": BETA}}.get(name, {})


def expected(name: str, x: Case) -> Tensor:
    row = ESTIMATORS[name]
    ids, probability = draws(row, x)
    return probability @ gradients(row.fn, x.logits, x.logq, logpi_of(row, x), ids, **further(name, x, ids))


def logpi_of(row: Estimator, x: Case) -> Tensor:
    """[V], as the slots hold it."""
    return {"candidates": x.logmu + math.log(N), "teacher_mc": x.logq + math.log(N)}.get(row.support, x.logmu)


def dense(name: str, x: Case) -> Tensor:
    """The gradient of the divergence over all words that the row stands for."""
    if name == "jsd_dense":
        return grad_of(lambda logp: jsd_dense(logp, x.logq, x.logmu, beta=BETA), x.logits)
    pair = (lambda logp: kl(logp, x.logq)) if ESTIMATORS[name].kl == "reverse" else (lambda logp: kl(x.logq, logp))
    return grad_of(pair, x.logits)


# -- the stated gradients --------------------------------------------------------------------------

def sum_of(x: Case, c: Tensor) -> Tensor:
    """-sum c dlogp over the words that mu can draw."""
    return weighted((x.logits, x.logq, x.logmu), torch.where(x.inside, c, 0.0))


def unclipped(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.where(advantage > 0, r < 1 + high, r > 1 - low)


def best_of_p_and_q(x: Case):
    """KL(p_S || q_S) on the best words that mu can draw."""
    S = torch.tensor([a for a in x.top().tolist() if x.inside[a]])
    return grad_of(lambda logp: kl(logp[S].log_softmax(-1), x.logq[S].log_softmax(-1)), x.logits)


def policy_gradient(x: Case, w: Tensor) -> Tensor:
    S = torch.zeros(V, dtype=torch.bool).index_fill(0, x.top(), True)
    A = x.logq - x.logp
    return sum_of(x, torch.where(S & ((A > 0) | (w <= 3)), x.logp.exp() / x.logp[S].exp().sum() * w * A, 0.0))


def best_of_q(x: Case, tail: bool):
    S = torch.zeros(V, dtype=torch.bool).index_fill(0, x.logq.topk(K).indices, True)
    q_tail = x.logq[~S].exp().sum()
    return grad_of(lambda logp: (x.logq[S].exp() * (x.logq[S] - logp[S])).sum()
                   - tail * q_tail * logp[~S].logsumexp(-1), x.logits)


def baseline(x: Case) -> Tensor:
    """The expected advantage over mu's best words, for vopd."""
    return (x.logp.exp() * (x.logq - x.logp))[x.top()].sum()


STATED = {
    "reverse_mc": lambda x: sum_of(x, x.logp.exp() * (x.logq - x.logp)),
    "reverse_mc_no_is": lambda x: sum_of(x, x.logmu.exp() * (x.logq - x.logp)),
    "vopd": lambda x: sum_of(x, x.logp.exp() * (x.logq - x.logp - baseline(x))),
    "reverse_old_adv": lambda x: sum_of(x, x.logp.exp() * (x.logq - x.logmu)),
    "reverse_ppo": lambda x: sum_of(x, unclipped((x.logp - x.logmu).exp(), x.logq - x.logmu, 0.2, 0.2)
                                    * x.logp.exp() * (x.logq - x.logmu)),
    "reverse_ppo_recomputed": lambda x: sum_of(x, unclipped((x.logp - x.logmu).exp(), x.logq - x.logp, 0.2, 0.2)
                                               * x.logp.exp() * (x.logq - x.logp)),
    "decoupled_ppo": lambda x: sum_of(x, unclipped((x.logp - x.prox).exp(), x.logq - x.logmu, 0.2, 0.2)
                                      * ((x.prox - x.logmu).exp() <= 5) * x.logp.exp() * (x.logq - x.logmu)),
    "m2po": lambda x: sum_of(x, unclipped((x.logp - x.logmu).exp(), x.logq - x.logmu, LOW, HIGH)
                             * x.logp.exp() * (x.logq - x.logmu)),
    "reverse_topk": best_of_p_and_q,
    "reverse_topk_pg": lambda x: policy_gradient(x, (x.logp - x.logmu).exp()),
    "reverse_topk_pg_no_is": lambda x: policy_gradient(x, torch.ones(V, dtype=torch.float64)),
    "forward_topk": lambda x: best_of_q(x, tail=True),
    "forward_topk_no_tail": lambda x: best_of_q(x, tail=False),
    "forward_mc": lambda x: grad_of(lambda logp: -(x.logq.exp() * logp).sum(), x.logits),
    "forward_dense": lambda x: grad_of(lambda logp: -(x.logq.exp() * logp).sum(), x.logits),
    "reverse_dense": lambda x: weighted((x.logits, x.logq, x.logmu), x.logp.exp() * (x.logq - x.logp)),
    "jsd_dense": lambda x: dense("jsd_dense", x),
}


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_gradient_is_the_stated_one(name, how):
    for seed in range(4):
        x = case(seed, **CASES[how])
        assert error(expected(name, x), STATED[name](x)) < TINY


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_means_the_divergence_over_all_words_unless_top_p_hides_some_from_mu(name, how):
    """What is hidden is missing, and nothing else: reverse_mc then lacks the terms of the words outside the nucleus."""
    for seed in range(4):
        x = case(seed, **CASES[how])
        bias = dense(name, x) - expected(name, x)
        hidden = torch.where(x.inside, 0.0, x.logp.exp() * (x.logq - x.logp - (baseline(x) if name == "vopd" else 0)))
        drawn_by_mu = ESTIMATORS[name].support in ("candidates", "sampled_topk")
        assert x.inside.all() == (how not in TRUNCATED)
        assert error(bias, drawn_by_mu * weighted((x.logits, x.logq, x.logmu), hidden)) < TINY
        assert (bias.abs().max() > 1e-3) == (drawn_by_mu and how in TRUNCATED)


@pytest.mark.parametrize("name", [name for name in WITH_LOSS if name not in UNBIASED])
def test_a_row_that_is_called_biased_is(name):
    assert max(error(expected(name, case(seed)), dense(name, case(seed))) for seed in range(4)) > 1e-2


@pytest.mark.parametrize("how", ["stale", "hot"])
@pytest.mark.parametrize("name", UNBIASED)
def test_after_every_first_minibatch_the_second_is_unbiased_for_the_student_as_it_then_is(name, how):
    """Two positions share their weights. Whatever was drawn at the first, the update that follows makes mu staler, and
    the expectation at the second is the exact gradient for the new weights."""
    first, second = (case(seed, **CASES[how]) for seed in (1, 2))
    g = torch.Generator().manual_seed(3)
    features = torch.randn(2, 3, generator=g, dtype=torch.float64)
    row, ids = ESTIMATORS[name], draws(ESTIMATORS[name], first)[0]
    moved = gradients(row.fn, first.logits, first.logq, logpi_of(row, first), ids, **further(name, first, ids))
    for gradient in moved:                       # d loss / d weights = outer(gradient, features); features @ features
        logits = second.logits - 0.5 * gradient * (features[0] @ features[1])
        now = Case(logits, second.logq, second.logmu, second.prox)
        assert error(now.logits, second.logits) > 1e-3 and error(expected(name, now), dense(name, now)) < TINY


def test_beyond_the_clamp_a_word_counts_as_much_as_the_clamp_allows():
    x = case()
    logmu = x.logmu.clone()
    logmu[0] = x.logp[0] - 25
    x = Case(x.logits, x.logq, logmu.log_softmax(-1), x.prox)
    w = N * (x.logp - x.logmu - math.log(N)).clamp(max=LOG_RATIO_MAX).exp()
    assert (x.logp - x.logmu)[0] > LOG_RATIO_MAX + 1
    got = expected("reverse_mc", x)
    assert error(got, sum_of(x, x.logmu.exp() * w * (x.logq - x.logp))) < TINY
    assert error(got, dense("reverse_mc", x)) > 1e-2, "mu > 0 everywhere, and not unbiased"


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("which", VALUE)
def test_the_logged_kl_has_the_terms_of_the_words_that_mu_can_draw(which, how):
    for seed in range(4):
        x = case(seed, **CASES[how])
        ids, probability = draws(ESTIMATORS["reverse_mc"], x)
        got = probability @ VALUE[which](x.logp[ids], x.logq[ids], x.logmu[ids] + math.log(N))
        a, b = (x.logp, x.logq) if which == "reverse" else (x.logq, x.logp)
        terms = a.exp() * (a - b)
        assert error(got, terms[x.inside].sum()) < TINY
        true = DENSE[which](x.logp, x.logq, x.logmu)
        assert (error(got, true) < TINY) == (how not in TRUNCATED)


@pytest.mark.parametrize("k", [1, 2, 3, V])
def test_words_that_mu_cannot_draw_take_no_part_in_its_best(k):
    """The set is that of the nucleus, whatever fills up its columns; one word alone says nothing."""
    for seed in range(4):
        x = case(seed, top_p=0.6)
        top = x.top(k)
        real = top[x.inside[top]]
        want = gradients(reverse_topk, x.logits, x.logq, x.logmu, real[None])[0]
        assert error(gradients(reverse_topk, x.logits, x.logq, x.logmu, top[None])[0], want) < TINY
        q = x.logq.clone()
        q[~x.inside] = -torch.inf                # nor does it matter what the teacher thinks of the others
        assert error(gradients(reverse_topk, x.logits, q, x.logmu, top[None])[0], want) < TINY
        assert len(real) < V and (want.abs().max() > 1e-3 or len(real) == 1)

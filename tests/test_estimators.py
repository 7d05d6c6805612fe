"""
Every estimator against its own docstring, exactly: a vocabulary of 5, float64, every possible draw enumerated.

`gradients` is the one tool: a row of ids per draw in, a row of d loss / d logits per draw out. An expectation is then a
weighted sum over all rows and a variance a weighted square, with no sampling unless a test says so. The checks are
functions that return an error, so that the mutants at the end can be put through the very same ones.
"""
import itertools
import math

import pytest
import torch

import estimators
from estimators import ESTIMATORS, LOG_MIN, VALUE, importance_weight, m2po_margins

torch.set_num_threads(1)
V, K, SEEDS = 5, 2, range(3)
TINY = 1e-12
WITH_LOSS = [name for name, row in ESTIMATORS.items() if row.head]       # on log-probs; the other: tests/test_oprd.py


def problem(seed, size=V, gap=0.8):
    """Logits of p, log-probs of q and of a mu that lags behind p."""
    g = torch.Generator().manual_seed(seed)
    logits, teacher, drift = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(3))
    return logits, teacher.log_softmax(-1), (logits + gap * drift).log_softmax(-1)


def every_draw(logx, n):
    """All V^n draws of n words [V^n, n] and their probabilities under exp(logx)."""
    ids = torch.tensor(list(itertools.product(range(len(logx)), repeat=n)))
    return ids, logx[ids].sum(-1).exp()


def gradients(fn, logits, logq, logpi, ids, **known):
    """d fn / d logits for every row of ids: [R, C] -> [R, V]."""
    x = logits.expand(len(ids), -1).clone().requires_grad_()
    value = fn(x.log_softmax(-1).gather(-1, ids), logq[ids], logpi[ids], **known)
    assert value.shape == (len(ids),), f"one value per position, got {tuple(value.shape)}"
    value.sum().backward()
    return x.grad


def expected(fn, problem, n=1, *, source="mu", **known):
    """E[gradient] over every i.i.d. draw of n words from mu or q. `known` holds functions of the ids."""
    logits, logq, logmu = problem
    drawn_from = logmu if source == "mu" else logq
    ids, probability = every_draw(drawn_from, n)
    known = {name: f(ids) for name, f in known.items()}
    return probability @ gradients(fn, logits, logq, drawn_from + math.log(n), ids, **known)


def on_set(fn, problem, ids, **known):
    return gradients(fn, *problem, ids[None], **known)[0]


def grad_of(f, logits):
    """Gradient of a scalar function of log p."""
    x = logits.clone().requires_grad_()
    f(x.log_softmax(-1)).backward()
    return x.grad


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def dense(problem, kind):
    logits, logq, _ = problem
    return grad_of(lambda logp: kl(logp, logq) if kind == "reverse" else kl(logq, logp), logits)


def weighted(problem, c):
    """-sum_a c_a dlogp_a for constants c: how the docstrings state a gradient."""
    return grad_of(lambda logp: -(c * logp).sum(), problem[0])


def error(a, b):
    return (a - b).abs().max().item()


# -- the unbiased ones -----------------------------------------------------------------------------

def is_reverse_gradient(fn, seed=0, n=2):
    return error(expected(fn, problem(seed), n), dense(problem(seed), "reverse"))


def is_forward_gradient(fn, seed=0, n=2):
    return error(expected(fn, problem(seed), n, source="q"), dense(problem(seed), "forward"))


def is_dense_gradient(fn, seed=0, kind="reverse"):
    return error(on_set(fn, problem(seed), torch.arange(V)), dense(problem(seed), kind))


def is_jsd_gradient(fn, seed=0, beta=0.3):
    logits, logq, _ = problem(seed)

    def jsd(logp):
        m = beta * logq.exp() + (1 - beta) * logp.exp()
        return beta * kl(logq, m.log()) + (1 - beta) * kl(logp, m.log())
    return error(on_set(fn, problem(seed), torch.arange(V), beta=beta), grad_of(jsd, logits))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_mc_is_unbiased_under_a_stale_student(seed, n):
    assert is_reverse_gradient(estimators.reverse_mc, seed, n) < TINY


def is_reverse_gradient_with_baseline(fn, seed=0, k=2):
    """Every emitted token, before the k best words of mu."""
    logits, logq, logmu = problem(seed)
    words = torch.arange(V)[:, None]
    ids = torch.cat([words, logmu.topk(k).indices.expand(V, -1)], 1)
    got = logmu.exp() @ gradients(fn, logits, logq, logmu, ids)
    return error(got, dense(problem(seed), "reverse"))


@pytest.mark.parametrize("k", [1, 2, V])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_baseline_from_the_best_words_takes_nothing_from_vopd(seed, k):
    assert is_reverse_gradient_with_baseline(estimators.vopd, seed, k) < TINY


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_mc_is_unbiased_when_the_teacher_draws(seed, n):
    assert is_forward_gradient(estimators.forward_mc, seed, n) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_rows_are_the_derivative_of_their_definition(seed):
    assert is_dense_gradient(estimators.forward_dense, seed, "forward") < TINY
    assert is_dense_gradient(estimators.reverse_dense, seed, "reverse") < TINY
    for beta in (0.1, 0.5, 0.9):
        assert is_jsd_gradient(estimators.jsd_dense, seed, beta) < TINY


def test_jsd_ends_at_the_two_divergences():
    logits, logq, logmu = problem(1)
    logp = logits.log_softmax(-1)
    for beta, end in ((0.0, kl(logq, logp)), (1.0, kl(logp, logq))):
        assert error(estimators.jsd_dense(logp, logq, logmu, beta=beta), end) < TINY
    small, large = (estimators.jsd_dense(logp, logq, logmu, beta=b) for b in (1e-6, 1 - 1e-6))
    assert error(small / 1e-6, kl(logq, logp)) < 1e-4 and error(large / 1e-6, kl(logp, logq)) < 1e-4


def test_every_row_that_claims_to_be_unbiased_is_proved_above():
    assert {name for name, e in ESTIMATORS.items() if e.unbiased} == {
        "reverse_mc", "vopd", "forward_mc", "forward_dense", "reverse_dense", "jsd_dense"}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_logged_kl_is_unbiased_under_a_stale_student(seed):
    logits, logq, logmu = problem(seed)
    logp = logits.log_softmax(-1)
    for n, (name, true) in itertools.product((1, 2), (("reverse", kl(logp, logq)), ("forward", kl(logq, logp)))):
        ids, probability = every_draw(logmu, n)
        assert error(probability @ VALUE[name](logp[ids], logq[ids], logmu[ids] + math.log(n)), true) < TINY


# -- the biased ones: their stated bias ------------------------------------------------------------

def is_old_adv_gradient(fn, seed=0):
    logits, logq, logmu = problem(seed)
    return error(expected(fn, problem(seed)), grad_of(lambda logp: kl(logp, logq) - kl(logp, logmu), logits))


def is_no_is_gradient(fn, seed=0, n=2):
    logits, logq, logmu = problem(seed)
    return error(expected(fn, problem(seed), n), weighted(problem(seed), logmu.exp() * (logq - logits.log_softmax(-1))))


def ppo_constants(problem, low, high, recomputed=False):
    """p times the advantage where the clip does not bind, word by word, from the definition of PPO."""
    logits, logq, logmu = problem
    logp, out = logits.log_softmax(-1), []
    for a in range(len(logits)):
        advantage = (logq[a] - (logp if recomputed else logmu)[a]).item()
        r = math.exp(logp[a] - logmu[a])
        binds = r > 1 + high if advantage > 0 else r < 1 - low
        out.append(0.0 if binds else math.exp(logp[a]) * advantage)
    return torch.tensor(out, dtype=torch.float64)


def is_ppo_gradient(fn, seed=0, recomputed=False):
    c = ppo_constants(problem(seed), 0.2, 0.2, recomputed)
    return error(expected(fn, problem(seed)), weighted(problem(seed), c))


def is_decoupled_gradient(fn, seed=0):
    """The clip is around prox; words with prox / mu > 5 count nothing. Seeds 0 and 2 have words of every kind."""
    logits, logq, logmu = problem(seed, gap=1.5)
    prox = (logits + 0.3 * problem(seed + 50)[0]).log_softmax(-1)
    logp, c = logits.log_softmax(-1), torch.zeros(V, dtype=torch.float64)
    assert ((prox - logmu).exp() > 5).any() or seed == 1, "the cap has to matter in this check"
    for a in range(V):
        advantage, r = logq[a] - logmu[a], (logp[a] - prox[a]).exp()
        binds = r > 1.2 if advantage > 0 else r < 0.8
        if not binds and (prox[a] - logmu[a]).exp() <= 5:
            c[a] = logp[a].exp() * advantage
    return error(expected(fn, (logits, logq, logmu), prox=lambda ids: prox[ids]),
                 weighted((logits, logq, logmu), c))


def is_reverse_topk_gradient(fn, seed=0, k=K):
    logits, logq, logmu = problem(seed)
    top = logmu.topk(k).indices

    def target(logp):
        p, q = logp[top].exp(), logq[top].exp()
        return kl((p / p.sum()).log(), (q / q.sum()).log())
    return error(on_set(fn, problem(seed), top), grad_of(target, logits))


def is_topk_pg_gradient(fn, seed=0, k=3, gap=2.5, is_weight=True):
    logits, logq, logmu = problem(seed, gap=gap)
    logp, c = logits.log_softmax(-1), torch.zeros(V, dtype=torch.float64)
    top = logmu.topk(k).indices
    for a in top.tolist():
        advantage = logq[a] - logp[a]
        w = (logp[a] - logmu[a]).exp() if is_weight else 1.0
        if advantage > 0 or w <= 3:
            c[a] = logp[a].exp() / logp[top].exp().sum() * w * advantage
    return error(on_set(fn, (logits, logq, logmu), top), weighted(problem(seed), c))


def is_topk_pg_no_is_gradient(fn, seed=0, k=3):
    return is_topk_pg_gradient(fn, seed, k, is_weight=False)


def is_forward_topk_gradient(fn, seed=0, k=K, tail=True):
    logits, logq, _ = problem(seed)
    top = logq.topk(k).indices

    def target(logp):
        p, q = logp[top].exp(), logq[top].exp()
        rest = (1 - q.sum()) * ((1 - q.sum()).log() - (1 - p.sum()).log()) if tail else 0.0
        return (q * (q.log() - p.log())).sum() + rest
    return error(on_set(fn, problem(seed), top), grad_of(target, logits))


def is_forward_topk_no_tail_gradient(fn, seed=0, k=K):
    return is_forward_topk_gradient(fn, seed, k, tail=False)


def naive_margins(logp, logq, logmu, budget=0.01):
    """The definition by bisection: the largest tau with mean min(log w^2, tau^2) <= budget over the harmful tokens."""
    harmful = [d for d, a in zip((logp - logmu).flatten().tolist(), (logq - logmu).flatten().tolist())
               if (a > 0 and d > 0) or (a < 0 and d < 0)]
    if not harmful or sum(d * d for d in harmful) / len(harmful) <= budget:
        return 1.0, math.inf
    low, high = 0.0, max(abs(d) for d in harmful)
    for _ in range(200):
        tau = (low + high) / 2
        if sum(min(d * d, tau * tau) for d in harmful) / len(harmful) <= budget:
            low = tau
        else:
            high = tau
    return max(1 - math.exp(-low), 0.3), max(math.exp(low) - 1, 0.5)


def is_m2po_margins(fn, seed=0):
    """Batches that drift little, more, and by a few outliers only: floors bind in some, the budget in others."""
    worst, g = 0.0, torch.Generator().manual_seed(seed)
    for scale, rare in ((0.01, 1.0), (0.3, 1.0), (1.0, 1.0), (3.0, 0.02), (3.0, 0.008), (1.2, 0.02)):
        logmu, logq, d = (torch.randn(400, 1, generator=g, dtype=torch.float64) for _ in range(3))
        logp = logmu + 0.01 * d + scale * d * (torch.rand(400, 1, generator=g) < rare)
        got, want = fn(logp, logq, logmu), naive_margins(logp, logq, logmu)
        for name, x in zip(("low", "high"), want):
            worst = max(worst, 0.0 if got[name].item() == x else abs(got[name].item() - x))
    return worst


@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_old_adv_also_rewards_leaving_mu(seed):
    assert is_old_adv_gradient(estimators.reverse_old_adv, seed) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_mc_no_is_counts_words_as_often_as_mu_drew_them(seed):
    assert is_no_is_gradient(estimators.reverse_mc_no_is, seed) < TINY
    logits, logq, _ = problem(seed)
    fresh = (logits, logq, logits.log_softmax(-1))
    assert error(expected(estimators.reverse_mc_no_is, fresh, 2), dense(fresh, "reverse")) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_drops_exactly_the_words_where_the_clip_binds(seed):
    assert is_ppo_gradient(estimators.reverse_ppo, seed) < TINY
    assert is_ppo_gradient(estimators.reverse_ppo_recomputed, seed, recomputed=True) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_without_a_binding_clip_is_the_unclipped_estimator(seed):
    def loose(name):
        return lambda *x: getattr(estimators, name)(*x, eps=1e9)
    assert is_old_adv_gradient(loose("reverse_ppo"), seed) < TINY
    assert is_reverse_gradient(loose("reverse_ppo_recomputed"), seed, n=1) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_decoupled_ppo_clips_around_the_student_at_the_start_of_the_batch(seed):
    assert is_decoupled_gradient(estimators.decoupled_ppo, seed) < TINY


@pytest.mark.parametrize("seed", SEEDS)
def test_decoupled_ppo_is_ppo_at_prox_equal_mu(seed):
    a = expected(estimators.decoupled_ppo, problem(seed), prox=lambda ids: problem(seed)[2][ids])
    assert error(a, expected(estimators.reverse_ppo, problem(seed))) < TINY


@pytest.mark.parametrize("seed", range(8))
def test_m2po_margins_follow_their_definition(seed):
    assert is_m2po_margins(m2po_margins, seed) < 1e-9


def test_m2po_keeps_the_harmful_tokens_within_budget_and_its_floors():
    g = torch.Generator().manual_seed(3)
    logmu, logq, d = (torch.randn(1000, 1, generator=g, dtype=torch.float64) for _ in range(3))
    free = m2po_margins(logmu + 0.01 * d, logq, logmu)
    assert free["low"].item() == 1.0 and free["high"].item() == math.inf, "within budget nothing is clipped"
    floors = m2po_margins(logmu + d, logq, logmu)
    assert floors["low"].item() == pytest.approx(0.3) and floors["high"].item() == pytest.approx(0.5)
    rare = m2po_margins(logmu + 0.02 * d + 3 * d * (torch.rand(1000, 1, generator=g) < 0.01), logq, logmu)
    assert 0.31 < rare["low"].item() < 0.99 and 0.51 < rare["high"].item() < 20


def hard_batches(n):
    """Batches [m, 1] of log w, all harmful, and their budgets: the budget is any, or as near the mean as numbers go."""
    g = torch.Generator().manual_seed(7)
    for i in range(n):
        d = torch.randn(1 + i % 23, 1, generator=g, dtype=torch.float64 if i % 2 else torch.float32)
        if i % 3 == 0:
            d = torch.full_like(d, d[0, 0].item())                        # all equal
        d = d.abs() * 10.0 ** (i % 36 - 18 if i % 5 == 0 else 0)          # tiny and huge
        mean = d.double().square().mean().item()
        yield d, (math.nextafter(mean, 0.0), mean, mean * (1 - 1e-7), 0.3 * mean, 0.01)[i % 5 if i % 7 else 0]


def test_m2po_margins_of_ten_thousand_hard_batches_spend_the_budget_and_no_more():
    one = {dtype: torch.ones(23, 1, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    for i, (d, budget) in enumerate(hard_batches(10_000)):
        ones = one[d.dtype][:len(d)]
        high = m2po_margins(d, ones, 0 * ones, budget=budget, floor_low=0.0, floor_high=0.0)["high"]
        assert high.dtype == d.dtype
        if i % 4 == 0:
            squares = d.double().square()
            mean, tau2 = squares.mean().item(), math.log1p(min(high.item(), 1e300)) ** 2
            if mean * (1 + 1e-12) < budget:
                assert high.item() == math.inf
            elif mean > budget * (1 + 1e-12) and 1e-3 < budget < 100:    # others are margins of 0, or too large to see
                assert squares.clamp(max=tau2).mean().item() == pytest.approx(budget, rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_m2po_is_ppo_with_these_margins(seed):
    one = torch.ones(1, 1, dtype=torch.float64)
    got = expected(estimators.m2po, problem(seed), low=lambda ids: 0.3 * one, high=lambda ids: 0.6 * one)
    assert error(got, weighted(problem(seed), ppo_constants(problem(seed), 0.3, 0.6))) < TINY


@pytest.mark.parametrize("k", [1, 2, 3, V])
@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_topk_misses_what_the_chain_rule_says_about_the_discarded_mass(seed, k):
    logits, logq, logmu = problem(seed)
    order = logmu.sort(descending=True).indices
    S, T = order[:k], order[k:]

    def missed(logp):
        p, q = logp.exp(), logq.exp()
        P, Q, p_T, q_T = p[S].sum(), q[S].sum(), p[T].sum(), q[T].sum()
        inside = kl((p[S] / P).log(), (q[S] / Q).log())
        if not len(T):
            return 0.0 * p.sum()
        outside = kl((p[T] / p_T).log(), (q[T] / q_T).log())
        return P * (P / Q).log() + p_T * (p_T / q_T).log() + p_T * outside - p_T * inside
    gap = dense(problem(seed), "reverse") - on_set(estimators.reverse_topk, problem(seed), S)
    assert is_reverse_topk_gradient(estimators.reverse_topk, seed, k) < TINY
    assert error(gap, grad_of(missed, logits)) < TINY
    assert (gap.abs().max() < TINY) == (k == V)


@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_topk_pg_is_its_stated_sum_with_and_without_the_weight(seed, k):
    assert is_topk_pg_gradient(estimators.reverse_topk_pg, seed, k) < TINY
    assert is_topk_pg_no_is_gradient(estimators.reverse_topk_pg_no_is, seed, k) < TINY


@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("seed", SEEDS)
def test_reverse_topk_pg_without_the_weight_errs_by_the_discarded_mass(seed, k):
    logits, logq, logmu = problem(seed)
    logp, top = logits.log_softmax(-1), logmu.topk(k).indices
    outside = torch.ones(V, dtype=torch.float64).index_fill(0, top, 0.0)
    got = on_set(estimators.reverse_topk_pg_no_is, problem(seed), top)
    rest = weighted(problem(seed), outside * logp.exp() * (logq - logp))
    assert error(logp[top].exp().sum() * got + rest, dense(problem(seed), "reverse")) < TINY
    if k == V:
        assert error(got, dense(problem(seed), "reverse")) < TINY
        assert error(on_set(estimators.reverse_topk_pg, problem(seed), top), dense(problem(seed), "reverse")) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 3, V])
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_topk_misses_the_divergence_within_the_tail(seed, k):
    logits, logq, _ = problem(seed)
    order = logq.sort(descending=True).indices
    S, T = order[:k], order[k:]
    truth = dense(problem(seed), "forward")

    def within(logp):
        q_T, p_T = logq[T].exp().sum(), logp[T].exp().sum()
        return q_T * kl(logq[T] - q_T.log(), logp[T] - p_T.log()) if len(T) else 0.0 * logp.sum()
    with_tail = on_set(estimators.forward_topk, problem(seed), S)
    without = on_set(estimators.forward_topk_no_tail, problem(seed), S)
    assert is_forward_topk_gradient(estimators.forward_topk, seed, k) < TINY or k == V, "1 - 1 has no log"
    assert is_forward_topk_no_tail_gradient(estimators.forward_topk_no_tail, seed, k) < TINY
    assert error(truth - with_tail, grad_of(within, logits)) < TINY
    assert error(truth - without, grad_of(lambda logp: -(logq[T].exp() * logp[T]).sum(), logits)) < TINY
    assert (error(without, truth) < TINY) == (k == V)


# -- the two traps ---------------------------------------------------------------------------------

def test_differentiating_the_value_at_drawn_tokens_teaches_nothing():
    logits, logq, _ = problem(0)
    fresh = (logits, logq, logits.log_softmax(-1))
    for n in (1, 2):
        assert expected(lambda logp, logq, logmu: (logp - logq).mean(-1), fresh, n).abs().max() < TINY
    assert dense(fresh, "reverse").abs().max() > 1e-2


def test_a_reverse_kl_cut_to_a_set_pushes_mass_out_of_it_at_p_equal_q():
    logits, _, _ = problem(0)
    done = (logits, logits.log_softmax(-1), logits.log_softmax(-1))
    top = logits.topk(K).indices
    cut = on_set(lambda logp, logq, logmu: (logp.exp() * (logp - logq)).sum(-1), done, top)
    assert cut[top].min() > 1e-2, "descent lowers the logits of the set"
    for fn in (estimators.reverse_topk, estimators.reverse_topk_pg, estimators.reverse_topk_pg_no_is,
               estimators.forward_topk):
        assert on_set(fn, done, top).abs().max() < TINY


# -- variance --------------------------------------------------------------------------------------

def trace_variance(fn, problem, n, draws=0, seed=0):
    """Of the gradient: exact over every draw, or from so many sampled ones."""
    logits, logq, logmu = problem
    if draws:
        g = torch.Generator().manual_seed(seed)
        ids = torch.multinomial(logmu.exp().expand(draws, -1), n, replacement=True, generator=g)
        return gradients(fn, logits, logq, logmu + math.log(n), ids).var(0).sum().item()
    ids, probability = every_draw(logmu, n)
    x = gradients(fn, logits, logq, logmu + math.log(n), ids)
    return (probability @ (x - probability @ x) ** 2).sum().item()


def test_variance_falls_as_one_over_n():
    one = trace_variance(estimators.reverse_mc, problem(1), 1)
    assert trace_variance(estimators.reverse_mc, problem(1), 4) / one == pytest.approx(0.25, abs=TINY)
    for n in (1, 4, 16, 64):
        ratio = trace_variance(estimators.reverse_mc, problem(1), n, draws=40_000, seed=n) / one
        assert ratio == pytest.approx(1 / n, rel=0.05), f"N = {n}"


# -- edge cases ------------------------------------------------------------------------------------

def margins(ids):
    return {"low": torch.full((1, 1), 0.3), "high": torch.full((1, 1), 0.5)}


def known_for(name, x):
    """What a row's `batch` would give it, for x [..., C]."""
    return ESTIMATORS[name].batch(x, x, x) if ESTIMATORS[name].batch else {}


@pytest.mark.parametrize("name", WITH_LOSS)
def test_no_positions_are_a_loss_of_zero_that_can_be_differentiated(name):
    logp = torch.zeros(0, 4, requires_grad=True)
    x = torch.zeros(0, 4)
    loss = ESTIMATORS[name].fn(logp, x, x, **known_for(name, x))
    total = loss.sum() / 1
    total.backward()
    assert loss.shape == (0,) and total.item() == 0.0 and logp.grad.shape == (0, 4)


@pytest.mark.parametrize("C", [1, 4])
@pytest.mark.parametrize("name", WITH_LOSS)
def test_a_word_the_teacher_rules_out_costs_much_and_no_infinity(name, C):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=g).requires_grad_()
    logp, logq, logmu = (y.log_softmax(-1)[:, :C] for y in (x, torch.randn(3, 8, generator=g), x.detach() + 0.1))
    logq[1, 0] = -torch.inf
    loss = ESTIMATORS[name].fn(logp, logq, logmu, **known_for(name, logmu))
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad.isfinite().all()
    if name == "reverse_mc":       # it says which word, and pushes it down
        assert loss[1].abs() > -LOG_MIN / C / 10 and x.grad[1, 0] > 0


def test_duplicate_candidates_count_each_time():
    logits, logq, logmu = problem(2)
    twice = gradients(estimators.reverse_mc, logits, logq, logmu + math.log(2), torch.tensor([[3, 3], [3, 1]]))
    once = gradients(estimators.reverse_mc, logits, logq, logmu, torch.tensor([[3], [1]]))
    assert error(twice[0], once[0]) < TINY and error(twice[1], once.mean(0)) < TINY


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bf16_log_probs_are_worked_on_in_float32(name):
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(6, 8, generator=g).log_softmax(-1).bfloat16() for _ in range(3)]
    known = known_for(name, x[2].float())
    got = ESTIMATORS[name].fn(*x, **known)
    assert got.dtype == torch.float32
    assert torch.equal(got, ESTIMATORS[name].fn(*(y.float() for y in x), **known))
    assert ESTIMATORS[name].fn(*(y.double() for y in x), **known).dtype == torch.float64


@pytest.mark.parametrize("name", ["forward_dense", "reverse_dense", "jsd_dense"])
def test_a_vocabulary_of_151936_keeps_its_precision(name):
    g = torch.Generator().manual_seed(0)
    x = [3 * torch.randn(2, 151_936, generator=g) for _ in range(2)]
    logp, logq = (y.log_softmax(-1) for y in x)
    exact = [y.double().log_softmax(-1) for y in x]
    got = ESTIMATORS[name].fn(logp, logq, logq)
    assert torch.allclose(got.double(), ESTIMATORS[name].fn(*exact, exact[1]), rtol=1e-4)


def test_one_word_is_a_set_too():
    for seed in SEEDS:
        assert is_reverse_topk_gradient(estimators.reverse_topk, seed, 1) < TINY
        assert is_forward_topk_gradient(estimators.forward_topk, seed, 1) < TINY
        assert on_set(estimators.reverse_topk, problem(seed), torch.tensor([0])).abs().max() < TINY


def test_outside_the_nucleus_a_top_word_of_mu_says_nothing():
    logits, logq, logmu = problem(4)
    cut, top = logmu.masked_fill(torch.arange(V) == 2, -torch.inf).log_softmax(-1), torch.tensor([0, 2, 3])
    logp, c = logits.log_softmax(-1), torch.zeros(V, dtype=torch.float64)
    for a in (0, 3):
        c[a] = logp[a].exp() / logp[top].exp().sum() * (logq[a] - logp[a])
    got = on_set(estimators.reverse_topk_pg_no_is, (logits, logq, cut), top)
    assert error(got, weighted(problem(4), c)) < TINY
    assert estimators.reverse_topk_pg(logp[top], logq[top], cut[top]).abs() < 100


def test_weights_stay_finite_however_far_apart_the_students_are():
    w = importance_weight(torch.tensor([0.0, -900.0, -1.0]), torch.tensor([-900.0, 0.0, -1.0]))
    assert w.isfinite().all() and w[2] == 1.0 and w[0] > 1e8


# -- mutants ---------------------------------------------------------------------------------------

def w_(logp, logmu):
    return (logp - logmu).detach().exp()


def clip_(r, a, low=0.2, high=0.2):
    return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def shifted_by_one(logp, logq, logmu):
    """The scores of the neighbouring position."""
    return estimators.reverse_mc(logp, logq.roll(1, 0), logmu)


def renormalised(fn):
    return lambda logp, logq, logmu, **k: fn(logp.log_softmax(-1), logq.log_softmax(-1), logmu.log_softmax(-1), **k)


MUTANTS = {      # what is wrong -> (the check, the right one, the wrong one)
    "sign": (is_reverse_gradient, estimators.reverse_mc, lambda *x: -estimators.reverse_mc(*x)),
    "differentiates the value": (
        is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: (w_(p, m) * (p - q)).sum(-1)),
    "weight not detached, and the log too": (
        is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: -((p - m).exp() * (q - p).detach() * p).sum(-1)),
    "weight forgotten": (is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: -((q - p).detach() * p).mean(-1)),
    "weight inverted": (
        is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: -(w_(m, p) * (q - p).detach() * p).sum(-1)),
    "weight clipped": (is_reverse_gradient, estimators.reverse_mc,
                       lambda p, q, m: -(w_(p, m).clamp(0.4, 0.6) * (q - p).detach() * p).sum(-1)),
    "models swapped": (is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: estimators.reverse_mc(p, m, q)),
    "advantage of the old student": (
        is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: -(w_(p, m) * (q - m) * p).sum(-1)),
    "advantage of the new student": (
        is_old_adv_gradient, estimators.reverse_old_adv, lambda p, q, m: -(w_(p, m) * (q - p).detach() * p).mean(-1)),
    "mean instead of sum": (is_reverse_gradient, estimators.reverse_mc,
                            lambda p, q, m: -(w_(p, m) * (q - p).detach() * p).mean(-1)),
    "mean over positions": (is_reverse_gradient, estimators.reverse_mc,
                            lambda p, q, m: -(w_(p, m) * (q - p).detach() * p).sum(0)),
    "shifted by one": (is_reverse_gradient, estimators.reverse_mc, shifted_by_one),
    "softmax over the candidates": (is_reverse_gradient, estimators.reverse_mc, renormalised(estimators.reverse_mc)),
    "duplicates dropped": (is_reverse_gradient, estimators.reverse_mc, lambda p, q, m: -(
        w_(p, m) * (q - p).detach() * p * torch.tensor([1.0, 0.0]).double().where(p[:, :1] == p[:, 1:], 1.0)).sum(-1)),
    "baseline of the emitted token too": (is_reverse_gradient_with_baseline, estimators.vopd, lambda p, q, m: -(
        w_(p, m) * ((q - p) - (p.exp() * (q - p)).sum(-1, keepdim=True)).detach() * p)[:, 0]),
    "baseline differentiated": (is_reverse_gradient_with_baseline, estimators.vopd, lambda p, q, m: -(
        w_(p, m)[:, 0] * ((q - p)[:, 0].detach() - (p.exp() * (q - p))[:, 1:].sum(-1)) * p[:, 0])),
    "baseline alone weighed": (is_reverse_gradient_with_baseline, estimators.vopd, lambda p, q, m: -(
        ((q - p)[:, 0] - w_(p, m)[:, 0] * (p.exp() * (q - p))[:, 1:].sum(-1)).detach() * p[:, 0])),
    "teacher's draws counted as one each": (is_forward_gradient, estimators.forward_mc,
                                            lambda p, q, m: (q - p).sum(-1)),
    "forward for reverse": (is_dense_gradient, estimators.reverse_dense, estimators.forward_dense),
    "dense weights not differentiated": (
        is_dense_gradient, estimators.reverse_dense, lambda p, q, m: (p.detach().exp() * (p - q)).sum(-1)),
    "beta on the wrong side": (is_jsd_gradient, estimators.jsd_dense,
                               lambda p, q, m, beta: estimators.jsd_dense(p, q, m, beta=1 - beta)),
    "clip forgotten": (
        is_ppo_gradient, estimators.reverse_ppo, lambda p, q, m: estimators.reverse_ppo(p, q, m, eps=1e9)),
    "clip on both sides": (is_ppo_gradient, estimators.reverse_ppo,
                           lambda p, q, m: -((p - m).exp().clamp(0.8, 1.2) * (q - m)).mean(-1)),
    "optimistic clip": (is_ppo_gradient, estimators.reverse_ppo, lambda p, q, m: -torch.maximum(
        (p - m).exp() * (q - m), (p - m).exp().clamp(0.8, 1.2) * (q - m)).mean(-1)),
    "cap forgotten": (is_decoupled_gradient, estimators.decoupled_ppo,
                      lambda p, q, m, prox: estimators.decoupled_ppo(p, q, m, prox=prox, cap=math.inf)),
    "clipped around mu": (is_decoupled_gradient, estimators.decoupled_ppo,
                          lambda p, q, m, prox: (w_(prox, m) * clip_((p - m).exp(), q - m)).mean(-1)),
    "set not renormalised": (is_reverse_topk_gradient, estimators.reverse_topk,
                             lambda p, q, m: (p.exp() * (p - q)).sum(-1)),
    "only the student renormalised": (is_reverse_topk_gradient, estimators.reverse_topk, lambda p, q, m: (
        p.log_softmax(-1).exp() * (p.log_softmax(-1) - q)).sum(-1) + (p.logsumexp(-1))),
    "dual clip forgotten": (is_topk_pg_gradient, estimators.reverse_topk_pg,
                            lambda p, q, m: estimators.reverse_topk_pg(p, q, m, dual=math.inf)),
    "weight of the whole vocabulary": (is_topk_pg_gradient, estimators.reverse_topk_pg, lambda p, q, m: -(
        p.detach().exp() * (q - p).detach() * (p - m).exp()).sum(-1)),
    "weight kept": (is_topk_pg_no_is_gradient, estimators.reverse_topk_pg_no_is, estimators.reverse_topk_pg),
    "weight dropped": (is_topk_pg_gradient, estimators.reverse_topk_pg, estimators.reverse_topk_pg_no_is),
    "tail dropped": (is_forward_topk_gradient, estimators.forward_topk, estimators.forward_topk_no_tail),
    "tail kept": (is_forward_topk_no_tail_gradient, estimators.forward_topk_no_tail, estimators.forward_topk),
    "tail counted for the teacher only": (is_forward_topk_gradient, estimators.forward_topk, lambda p, q, m: (
        q.exp() * (q - p)).sum(-1) - (1 - q.exp().sum(-1)) * (1 - q.exp().sum(-1)).log()),
    "budget on the sum": (is_m2po_margins, m2po_margins, lambda p, q, m: m2po_margins(p, q, m, budget=0.01 / len(p))),
    "all tokens counted as harmful": (is_m2po_margins, m2po_margins, lambda p, q, m: m2po_margins(p, m + (p - m), m)),
    "floors swapped": (is_m2po_margins, m2po_margins,
                       lambda p, q, m: m2po_margins(p, q, m, floor_low=0.5, floor_high=0.3)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_above_can_fail(name):
    check, right, wrong = MUTANTS[name]
    assert check(right) < 1e-9
    try:
        assert check(wrong) > 1e-3
    except AssertionError as e:
        assert "one value per position" in str(e), f"nobody would notice: {name}"

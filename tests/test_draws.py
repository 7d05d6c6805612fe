"""The sampling designs: exact expectations by integrating over every outcome, and mutants that must not pass.

Both designs are piecewise constant in their uniform numbers. `optimal` has two of them: the set of words changes with
the first where a sampling point passes a word's edge, the emitted column with the second. So the midpoints of the
intervals between all edges, weighed by their lengths, give every expectation without error.
"""
import pytest
import torch

import draws
from draws import DESIGNS, UNUSED, draw_iid, draw_optimal, number_kept, shaped
from estimators import DENSE, VALUE, forward_mc, reverse_mc

DISTRIBUTIONS = {
    "flat": [1.0] * 7,
    "steep": [0.6, 0.2, 0.1, 0.05, 0.03, 0.015, 0.005],
    "one word": [1.0, 0, 0, 0, 0, 0, 0],
    "nearly one word": [1 - 6e-6] + [1e-6] * 6,
    "ties at the threshold": [0.25, 0.25, 0.25, 0.25 / 4, 0.25 / 4, 0.25 / 4, 0.25 / 4],
    "a nucleus of three": [0.5, 0.3, 0.2, 0, 0, 0, 0],
    "two scales": [0.45, 0.45, 0.02, 0.02, 0.02, 0.02, 0.02],
    "increasing": [1.0, 2, 3, 4, 5, 6, 7],
}
V = 7


def mu_of(name: str) -> torch.Tensor:
    mu = torch.tensor(DISTRIBUTIONS[name], dtype=torch.float64)
    return mu / mu.sum()


def outcomes(mu: torch.Tensor, n: int, design=draw_optimal):
    """(chance [R], Chosen of R rows): every outcome of the optimal design."""
    top = mu.sort(descending=True).values
    K = int(number_kept(top[None, :n], top[n:].sum().view(1, 1)))
    kept = mu.topk(K).indices
    rest = mu.clone()
    rest[kept] = 0
    edges_1 = [torch.zeros(1), torch.ones(1)]
    if K < n and rest.sum() > 0:
        edges_1.append((rest.cumsum(0) / rest.sum() * (n - K)) % 1)
    edges_2 = [torch.zeros(1), torch.ones(1), mu[kept].sort(descending=True).values.cumsum(0)]
    if K < n:
        m = rest.sum()
        edges_2.append(1 - m + m * torch.arange(n - K) / (n - K))
    intervals = []
    for edges in (edges_1, edges_2):
        edge = torch.cat([x.double() for x in edges]).clamp(0, 1).sort().values
        width = edge.diff()
        intervals.append(((edge[:-1] + edge[1:])[width > 1e-12] / 2, width[width > 1e-12]))
    (x, wx), (y, wy) = intervals
    u = torch.cartesian_prod(x, y)
    chance = (wx[:, None] * wy[None, :]).flatten()
    return chance, design(mu.log().float().expand(len(u), V), u, n)


def total(chance, chosen, f) -> torch.Tensor:
    """E[sum over the chosen words of f / pi] of every word by itself, [V]: what must be f where mu > 0."""
    weight = (-chosen.logpi.double()).exp() * (chosen.logpi < UNUSED / 2)
    found = torch.zeros(V, dtype=torch.float64)
    return found.index_add(0, chosen.ids.flatten(), (chance[:, None] * weight * f[chosen.ids]).flatten())


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_word_counts_once_in_expectation_and_the_emitted_token_is_a_draw(name, n):
    mu = mu_of(name)
    chance, chosen = outcomes(mu, n)
    assert chance.sum().item() == pytest.approx(1)
    torch.testing.assert_close(total(chance, chosen, torch.ones(V).double()), (mu > 0).double(), rtol=2e-5, atol=2e-5)
    emitted = torch.zeros(V, dtype=torch.float64).index_add(0, chosen.ids[:, 0], chance)
    torch.testing.assert_close(emitted, mu, rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(chosen.logmu.double(), mu.log()[chosen.ids[:, 0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_words_come_once_and_kept_words_are_the_most_probable(name, n):
    mu = mu_of(name)
    _, chosen = outcomes(mu, n)
    in_use = chosen.logpi < UNUSED / 2
    for ids, used, logpi in zip(chosen.ids, in_use, chosen.logpi):
        words = ids[used].tolist()
        assert len(set(words)) == len(words) == min(n, int((mu > 0).sum()))
        assert used[0] and (logpi[used] <= 1e-6).all()
        kept = set(ids[used & (logpi == 0)].tolist())
        others = [a for a in range(V) if a not in kept]
        assert not kept or mu[sorted(kept)].min() >= mu[others].max() - 1e-7 if others else True
        assert (ids[~used] == ids[0]).all()
    if n >= (mu > 0).sum():
        assert (chosen.logpi[in_use] == 0).all(), "nothing is left to chance"


@pytest.mark.parametrize("name", ["steep", "two scales", "increasing", "nearly one word"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_under_a_stale_mu_the_gradient_is_that_of_the_divergence(name, n):
    """Loss, logged KL, and the forward KL from words that the teacher draws."""
    mu = mu_of(name)
    g = torch.Generator().manual_seed(n)
    logits = torch.randn(V, generator=g).double().requires_grad_()
    logq = torch.randn(V, generator=g).double().log_softmax(-1)
    logp = logits.log_softmax(-1)
    chance, chosen = outcomes(mu, n)

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]
    seen = logp[chosen.ids], logq[chosen.ids], chosen.logpi.double()
    close = dict(rtol=1e-4, atol=1e-5)
    dense = {kl: (DENSE[kl](logp, logq, logq)) for kl in DENSE}
    torch.testing.assert_close(gradient((chance * reverse_mc(*seen)).sum()), gradient(dense["reverse"]), **close)
    for kl, value in dense.items():
        torch.testing.assert_close((chance * VALUE[kl](*seen)).sum(), value.detach(), **close)
    if n == V:
        torch.testing.assert_close(VALUE["reverse"](*seen), dense["reverse"].detach().expand(len(chance)), **close)
    from_q, drawn = outcomes(logq.exp(), n)
    seen = logp[drawn.ids], logq[drawn.ids], drawn.logpi.double()
    torch.testing.assert_close(gradient((from_q * forward_mc(*seen)).sum()), gradient(dense["forward"]), **close)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_independent_draws_count_as_often_as_they_are_expected(n):
    """All V^n outcomes of i.i.d. draws, one row each: the midpoint of each word's part of the line."""
    mu = mu_of("steep")
    middle = mu.cumsum(0) - mu / 2
    words = torch.cartesian_prod(*[torch.arange(V)] * n).view(-1, n)
    chosen = draw_iid(mu.log().float().expand(len(words), V), middle[words], n)
    assert torch.equal(chosen.ids, words)
    chance = mu[words].prod(-1)
    one = torch.ones(V, dtype=torch.float64)
    torch.testing.assert_close(total(chance, chosen, one), one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chosen.logmu.double(), mu.log()[words[:, 0]], rtol=1e-5, atol=1e-6)


def squared_error(chance, chosen, f) -> float:
    """Variance of the estimate of sum f, f [V], over the outcomes."""
    weight = (-chosen.logpi.double()).exp()
    estimate = (weight * f[chosen.ids]).sum(-1)
    return ((chance * estimate ** 2).sum() - (chance * estimate).sum() ** 2).item()


def test_with_one_word_it_is_the_plain_draw_and_with_all_words_it_is_exact():
    mu = mu_of("steep")
    u = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = mu.log().float().expand(200, V)
    one, plain = draw_optimal(logits, u, 1), draw_iid(logits, u[:, :1], 1)
    assert torch.equal(one.ids, plain.ids)
    torch.testing.assert_close(one.logpi, plain.logpi)
    torch.testing.assert_close(one.logmu, plain.logmu)
    chance, chosen = outcomes(mu, V)
    assert squared_error(chance, chosen, torch.randn(V).double()) == pytest.approx(0, abs=1e-9)


def mutant_prefers_kept(part, u):
    """Kept words, whose parts are the larger ones, are emitted more often than mu says."""
    return draws_emitted(part ** 2, u)


draws_emitted = draws.emitted_column
MUTANTS = {
    "one word too many is kept": ("number_kept", lambda top, tail: (number_kept(top, tail) + 1).clamp(max=len(top[0]))),
    "one word too few": ("number_kept", lambda top, tail: (number_kept(top, tail) - 1).clamp(min=0)),
    "the emitted token prefers kept words": ("emitted_column", mutant_prefers_kept),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_design_does_not_pass(mutant, monkeypatch):
    """A wrong K leaves the sample unbiased as long as no word is met twice, but not the words single or the error."""
    monkeypatch.setattr(draws, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        for n in (2, 3, 4):
            test_every_word_counts_once_in_expectation_and_the_emitted_token_is_a_draw("steep", n)
            test_words_come_once_and_kept_words_are_the_most_probable("steep", n)
            assert optimal_error("steep", n) <= best_error("steep", n) * (1 + 1e-6)


def best_error(name: str, n: int) -> float:
    """The least sum of the variances of the words' weights: sum of mu^2 (1 / pi - 1) with the threshold solved by
    bisection."""
    mu = mu_of(name)
    low, high = 0.0, 1.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (mu / c).clamp(max=1).sum() > n else (low, c)
    pi = (mu / high).clamp(max=1)
    return (mu ** 2 * (1 / pi - 1)).sum().item()


def optimal_error(name: str, n: int) -> float:
    mu = mu_of(name)
    chance, chosen = outcomes(mu, n)
    weight = (-chosen.logpi.double()).exp()
    error = 0.0
    for a in range(V):
        estimate = (weight * (chosen.ids == a) * mu[a]).sum(-1)
        error += ((chance * estimate ** 2).sum() - (chance * estimate).sum() ** 2).item()
    return error


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["flat", "steep", "ties at the threshold", "two scales", "increasing"])
def test_the_squared_error_is_the_least_that_there_is(name, n):
    assert optimal_error(name, n) == pytest.approx(best_error(name, n), rel=1e-4, abs=1e-7)


def test_pi_of_the_wrong_design_is_noticed():
    mu = mu_of("steep")
    chance, chosen = outcomes(mu, 3)
    wrong = chosen._replace(logpi=(mu.log()[chosen.ids] + torch.tensor(3.0).log()).float())
    assert not torch.allclose(total(chance, wrong, torch.ones(V).double()), torch.ones(V).double(), atol=0.05)


def test_the_tail_is_summed_and_not_what_is_left_of_one():
    """A word of probability 1 - 6e-9 in float32 leaves 1 - 1.0 = 0 for all others; their sum is still there."""
    logits = torch.zeros(1, 7)
    logits[0, 0] = 20.7
    u = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    chosen = draw_optimal(logits, u, 3)
    assert (chosen.logpi[0] == 0).sum() == 1
    assert chosen.logpi.exp().sum().item() == pytest.approx(1 + 2 * (2 / 6))


@pytest.mark.parametrize("size, n", [(64, 1), (64, 4), (640, 3), (640, 10), (640, 64), (6400, 64)])
@pytest.mark.parametrize("kind", ["spread out", "in one block", "ties"])
def test_the_largest_words_are_found_through_their_blocks(size, n, kind):
    g = torch.Generator().manual_seed(size + n)
    weight = torch.rand(20, size, generator=g)
    if kind == "in one block":
        weight[:, 64 * (size // 128):64 * (size // 128) + 64] += 1
    if kind == "ties":
        weight = (weight * 5).floor()
    value, ids = draws.largest(weight, n)
    assert torch.equal(value, weight.topk(n).values)
    assert torch.equal(weight.gather(1, ids), value)
    assert all(len(set(row)) == n for row in ids.tolist())


@pytest.mark.parametrize("size", [3, 64, 65, 1000])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_many_draws_follow_mu_whatever_the_number_of_blocks(size, n):
    """100,000 rows: emitted tokens and the expected copies, five standard deviations at most."""
    g = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=g) * 2
    R = 100_000
    mu = logits.double().softmax(-1)
    for name, design in DESIGNS.items():
        found = torch.zeros(size, dtype=torch.float64)
        copies = torch.zeros(size, dtype=torch.float64)
        for _ in range(R // 2000):
            u = torch.rand(2000, design.numbers(n), generator=g, dtype=torch.float64)
            chosen = design.choose(logits.expand(2000, size), u, n)
            found += torch.bincount(chosen.ids[:, 0], minlength=size)
            copies += torch.bincount(chosen.ids.flatten(), minlength=size)
        cells = mu * R >= 5
        pi = expected_copies(mu, n, name)
        of_one = mu if name == "iid" else pi
        for count, expected, share in ((found, R * mu, mu), (copies, R * pi, of_one)):
            sd = (expected * (1 - share) + 1).sqrt()
            assert ((count - expected).abs() <= 5 * sd)[cells].all(), name


def expected_copies(mu, n, name):
    if name == "iid":
        return n * mu
    low, high = 0.0, 1.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (mu / c).clamp(max=1).sum() > n else (low, c)
    return (mu / high).clamp(max=1)


def test_the_nucleus_and_the_temperature_are_in_mu():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    u = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = draw_optimal(shaped(logits, top_p=0.7).expand(300, 4), u, 3)
    used = chosen.logpi < UNUSED / 2
    assert set(chosen.ids[used].tolist()) == {0, 1} and used.sum(-1).eq(2).all()
    torch.testing.assert_close(chosen.logmu.exp(), torch.where(chosen.ids[:, 0] == 0, 0.5 / 0.8, 0.3 / 0.8))

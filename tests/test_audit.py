"""The audit's own arithmetic, against what is known exactly."""
import pytest
import torch

from benchmarks.audit import DRIFTS, ROWS, audit, outcomes, small_softmax
from estimators import ESTIMATORS

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ROWS)
def test_bias_is_zero_exactly_where_the_table_says_unbiased(name):
    stale = audit(name, small_softmax(0.5, M=4, V=12), k=4, counts=(1,))
    assert (stale["bias"] < 1e-12) == ESTIMATORS[name].unbiased
    assert stale["cosine"] <= 1 + 1e-12


@pytest.mark.parametrize("name", ROWS)
def test_at_lag_zero_only_what_a_set_leaves_out_is_missing(name):
    fresh = audit(name, small_softmax(0.0, M=4, V=12), k=12, counts=(1,))
    assert fresh["bias"] < 1e-6, "K = V, mu = p: nothing is left to err"


def test_outcomes_are_distributions_and_variance_falls_with_n():
    x = small_softmax(DRIFTS[-1], M=4, V=12)
    for row in ROWS.values():
        ids, probability = outcomes(row, x, 4)
        assert torch.allclose(probability.sum(1), torch.ones(4).double()) and ids.shape[:2] == probability.shape
    for name in ("reverse_mc", "forward_mc"):
        v = audit(name, small_softmax(0.5, M=4, V=12), k=4)["variance"]
        assert [v[n] / v["1"] for n in ("4", "16", "64")] == pytest.approx([1 / 4, 1 / 16, 1 / 64], rel=0.1)

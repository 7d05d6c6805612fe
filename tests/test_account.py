"""The account of a run, and the lines of the log that are made of it."""
import math

import pytest

from record.account import Account
from record.metrics import BY_LEARNER, BY_PARENT, BY_ROLLOUT, METRICS
from record.steps import done_record, step_record

PUSHES = [{"seconds": 1.0, "gap": [0.1, 0.5, 0.6]}, {"seconds": 2.0, "gap": [0.2, 0.3, 0.7]}]


def metrics(tokens=10, lag=1.0, kl=0.5, entropy=2.0) -> dict:
    return {"tokens": tokens, "lag_mean": lag, "lag_max": lag, "kl": kl, "entropy": entropy,
            "token_weight": 1.0}


def balance(line: dict) -> int:
    ends = ("trained", "in_flight", "dropped", "lost")
    return line["tokens_generated"] - sum(line[f"tokens_{end}"] for end in ends)


def test_every_key_of_a_step_line_has_one_owner():
    assert len(METRICS) == len(BY_LEARNER) + len(BY_ROLLOUT) + len(BY_PARENT)


def test_a_step_line_takes_the_worst_of_all_workers_pushes_and_leaves_its_parts_alone():
    measured = dict.fromkeys(BY_LEARNER, 0.0)
    rates = {"gen_tok_s": 5.0, "wall_s": 6.0, "preempted": 0, "length_begun": 7.0}
    line = step_record(measured, rates, PUSHES, 3, [(7, 0, 12)])
    assert [line[f"engine_gap_{name}"] for name in ("mean", "p95", "max")] == [0.2, 0.5, 0.7]
    assert (line["push_s"], line["skipped"], line["trained"], line["gen_tok_s"]) == (2.0, 3, [(7, 0, 12)], 5.0)
    assert line.keys() == METRICS.keys() and measured.keys() == BY_LEARNER.keys() and len(rates) == 4
    with pytest.raises(AssertionError, match="unheard_of"):
        step_record(measured | {"unheard_of": 1}, rates, PUSHES, 0, [])


def test_rates_count_from_the_last_step_line():
    account = Account()
    account.drawn["rollout0"] = 30
    assert account.rates(account.began + 2.0) == {"gen_tok_s": 15.0, "wall_s": pytest.approx(2.0)}
    account.drawn["rollout0"] = 40
    assert account.rates(account.began + 7.0) == {"gen_tok_s": pytest.approx(2.0), "wall_s": pytest.approx(7.0)}


def test_preemptions_count_from_the_last_step_line_and_over_deaths():
    account = Account()
    account.drawn["rollout0"] = 60
    account.preempted |= {"rollout0": 3, "rollout1": 1}
    assert account.responses(begun=4) == {"preempted": 4, "length_begun": 15.0}
    account.worker_died("rollout0", taken_back=0)                  # had handed over none of its 60 tokens
    account.preempted["rollout0"] = 2
    assert account.responses(begun=4) == {"preempted": 2, "length_begun": 0.0}


def test_the_weight_of_a_token_by_the_length_of_its_response():
    """Two batches with six responses, one of them cut in two: each token counts once, under its whole response."""
    account = Account()
    account.enter(metrics() | {"token_weight": 1.5}, [(0, 0, 2), (1, 0, 4), (2, 0, 6)])
    account.enter(metrics() | {"token_weight": 0.5}, [(3, 0, 9), (4, 0, 20), (2, 6, 4), (5, 0, 30)])
    overall = (12 * 1.5 + 63 * 0.5) / 75
    assert account.weight_by_length() == pytest.approx((1.5 / overall, 0.5 / overall))
    assert account.length[2] == 10
    assert done_record(account, in_flight=0, busy={"teacher": 0.5})["token_weight_short"] > 1
    again = Account()
    again.resume(account.counters(), [{"type": "step", "trained": [[0, 0, 2]]} | metrics()])
    assert again.weight_by_length() == (1.0, 1.0)


def test_every_token_is_trained_in_flight_dropped_or_lost_over_deaths_and_resumptions():
    account = Account()
    account.drawn |= {"rollout0": 50, "rollout1": 20}
    account.handed |= {"rollout0": 40, "rollout1": 20}
    account.worker_died("rollout0", taken_back=5)                  # 10 were not handed over
    account.drawn["rollout0"] = 15
    account.dropped += 4
    account.enter(metrics(tokens=30))
    line = done_record(account, in_flight=36, busy={"teacher": 0.5})
    assert line["tokens_generated"] == 85 and line["tokens_lost"] == 15 and balance(line) == 0
    again = Account()
    again.resume(account.counters(), [{"type": "step", "trained": [[0, 0, 30]]} | metrics(tokens=30),
                                      {"type": "eval", "who": "student", "step": 0, "accuracy": 0.25}])
    line = done_record(again, in_flight=0, busy={"teacher": 0.5})
    assert line["tokens_lost"] == 51 and balance(line) == 0, "what was in flight is drawn again"
    assert line["score_tok_s"] == 0 and line["accuracy_before"] == 0.25 and line["accuracy_after"] is None


def test_the_ends_of_a_run_are_ten_steps_each_and_skipped_steps_do_not_count():
    account = Account()
    assert account.kl_before == account.kl_after == 0
    for i in range(30):
        account.enter(metrics(kl=float(i), entropy=float(100 - i), lag=float(i % 3), tokens=1 + i % 3))
        account.enter(metrics(kl=math.nan if i % 2 else None, tokens=0))
    assert (account.kl_before, account.kl_after) == (4.5, 24.5)
    assert (account.entropy_before, account.entropy_after) == (95.5, 75.5)
    line = done_record(account, in_flight=0, busy={"teacher": 0.0})
    assert line["lag_mean"] == (1 * 2 + 2 * 3) / 6 and line["lag_max"] == 2 and line["steps"] == 60


@pytest.mark.parametrize("steps, before, after", [(1, 0, 0), (2, 0, 1), (3, 0, 2), (10, 2, 7), (19, 4, 14),
                                                  (20, 4.5, 14.5)])
def test_no_step_is_at_both_ends_of_a_short_run(steps, before, after):
    account = Account()
    for i in range(steps):
        account.enter(metrics(kl=float(i), entropy=float(i)))
    assert (account.kl_before, account.kl_after) == (before, after)

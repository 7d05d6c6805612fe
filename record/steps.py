"""
How a step line and the last line of the log are put together: pure functions of what was measured.

The keys are defined in metrics.py. Left out: writing the lines (log.py), counting (account.py).
Tests: tests/test_account.py, tests/test_pipeline.py
"""
from __future__ import annotations

from collections.abc import Collection

from record.account import Account
from record.metrics import DONE, METRICS

GAPS = ("mean", "p95", "max")          # the order in which a rollout worker reports them


def step_record(measured: dict, known: dict[str, float], pushes: Collection[dict], skipped: int,
                trained: list[tuple[int, int, int]], extensions: Collection[str] = ()) -> dict:
    """A step line.

    measured    the learner's metrics, and those of the extensions
    known       Account.rates and Account.responses
    pushes      the last push of every rollout worker: `seconds`, and `gap`, three numbers (GAPS)
    skipped     number of optimizer updates that were not made
    trained     of every segment: uid of the prompt, first response token, number of tokens
    extensions  the keys that they add to METRICS
    """
    record = measured | known
    record["push_s"] = max(push["seconds"] for push in pushes)
    record["skipped"] = skipped
    record["trained"] = trained
    for i, name in enumerate(GAPS):
        record[f"engine_gap_{name}"] = max(push["gap"][i] for push in pushes)
    keys = METRICS.keys() | set(extensions)
    assert record.keys() == keys, record.keys() ^ keys
    return record


def done_record(account: Account, in_flight: int, busy: dict[str, float]) -> dict:
    """The last line. `in_flight`: tokens; `busy`: Trace.busy, of the time since the last start."""
    wall = max(1e-9, account.wall(account.last_step))
    since_start = max(1e-9, account.last_step - account.began)
    short, long = account.weight_by_length()
    trained_since_start = account.tokens - account.resumed_at
    record = {
        "steps": account.steps,
        "tokens": account.tokens,
        "tokens_generated": account.generated,
        "tokens_trained": account.tokens,
        "tokens_in_flight": in_flight,
        "tokens_dropped": account.dropped,
        "tokens_lost": account.lost,
        "wall_s": wall,
        "overlap": sum(busy.values()),
        "busy": busy,
        "train_tok_s": account.tokens / wall,
        "gen_tok_s": account.generated / wall,
        "score_tok_s": trained_since_start / since_start / max(1e-9, busy["teacher"]),
        "lag_mean": account.lag_sum / max(1, account.tokens),
        "lag_max": account.lag_max,
        "token_weight_short": short,
        "token_weight_long": long,
        "kl_before": account.kl_before,
        "kl_after": account.kl_after,
        "accuracy_before": account.accuracy.get(("student", 0)),
        "accuracy_after": account.accuracy.get(("student", account.steps)),
        "accuracy_teacher": account.accuracy.get(("teacher", 0)),
    }
    assert record.keys() == DONE.keys(), record.keys() ^ DONE.keys()
    return record

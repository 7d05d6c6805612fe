"""Workers and runs that die: who is restarted, what is resumed, and that no prompt is lost or trained twice."""
import os
import signal
import time
from collections import defaultdict

import pytest

from tests.runs import alive, lines, shared_memory, start_and_wait_for, steps

HARD_S = 120            # no case may take longer, whatever it waits for


def pids(flags) -> dict[str, int]:
    """Worker -> process, of the last start, with those restarted since."""
    now = {}
    for line in lines(flags):
        if line["type"] == "run":
            now = dict(line["pids"])
        if line.get("what") == "restarted":
            now[line["worker"]] = line["pid"]
    return now


def events(flags, what: str) -> list[dict]:
    return [line for line in lines(flags) if line.get("what") == what]


def check_every_prompt_once(flags) -> None:
    """Over all starts: the pieces of every response follow each other, nothing trained twice, nothing left out."""
    trained, batch, done = defaultdict(list), flags["batch"], steps(flags)
    assert [s["step"] for s in done] == list(range(1, len(done) + 1))
    for s in done:
        for uid, start, length in s["trained"]:
            trained[uid].append((start, length))
    for uid, pieces in trained.items():
        at = 0
        for start, length in pieces:
            assert start == at, f"prompt {uid}: tokens from {start} trained when {at} had been, {pieces}"
            at += length
    begun = max(trained) + 1
    missing = set(range(begun)) - set(trained)
    assert len(missing) <= batch * (flags.get("max_ahead", 4) + 1), f"lost: {sorted(missing)}"
    assert len(missing) < begun, "something was trained"


def finished(process, flags, code=0) -> str:
    _, err = process.communicate(timeout=HARD_S)
    assert process.returncode == code, err
    return err


def wait_for_step(process, flags, step: int) -> None:
    limit = time.monotonic() + HARD_S
    while time.monotonic() < limit and process.poll() is None:
        if any(s["step"] >= step for s in steps(flags)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come: {process.poll()}")


@pytest.mark.parametrize("victim", ["rollout0", "teacher0"])
def test_a_killed_worker_is_restarted_and_nothing_is_lost(flags, victim):
    before = shared_memory()
    flags |= dict(steps=150, rollouts=1, max_ahead=2, max_lag=2)
    process, first = start_and_wait_for(flags, step=5)
    os.kill(first[victim], signal.SIGKILL)
    finished(process, flags)
    event, = events(flags, "restarted")
    assert event["worker"] == victim and "-9" in event["why"] and event["pid"] != first[victim]
    check_every_prompt_once(flags)
    last = lines(flags)[-1]
    assert last["tokens_generated"] == sum(last[f"tokens_{x}"] for x in ("trained", "in_flight", "dropped", "lost"))
    assert max(s["lag_max"] for s in steps(flags)) <= 2
    assert not alive(pids(flags).values()) and shared_memory() <= before

"""Commands that take turns on one machine (benchmarks/turns.py)."""
import json
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import turns
    return turns


BUSY = """if True:
    import json, time
    seen, end = [time.monotonic()], time.process_time() + 1.0
    while time.process_time() < end:
        if time.monotonic() - seen[-1] > 0.01:
            seen.append(time.monotonic())
    print(json.dumps(seen))"""


def test_only_one_command_runs_at_a_time_and_its_seconds_are_its_own(turns):
    both = turns.in_turns([[sys.executable, "-c", BUSY]] * 2, turn_s=0.3)
    seen = [json.loads(x.stdout) for x in both]
    for mine, others in zip(both, reversed(both)):
        for begin, end in mine.spans:
            assert others.seconds(begin, end) == 0.0
    for x, moments in zip(both, seen):
        own, by_clock = x.seconds(moments[0], moments[-1]), moments[-1] - moments[0]
        assert own < 0.75 * by_clock                     # the other one had its turns meanwhile
        # It ran in its turns alone. 0.05: until a signal has arrived, on a busy machine
        assert all(x.seconds(at - 0.05, at + 0.05) > 0 for at in moments)


def test_nothing_that_a_command_started_outlives_it(turns):
    leaves_one = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    found, = turns.in_turns([[sys.executable, "-c", leaves_one]])
    for _ in range(100):
        if not Path(f"/proc/{int(found.stdout)}/cmdline").exists():
            return
        time.sleep(0.1)
    raise AssertionError("sleep is still there")


def test_a_command_that_fails_is_named_and_ends_the_others(turns):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="-c raise SystemExit.3. ended with 3"):
        turns.in_turns([[sys.executable, "-c", "import time; time.sleep(60)"],
                        [sys.executable, "-c", "raise SystemExit(3)"]], turn_s=0.1)
    assert time.monotonic() - began < 30

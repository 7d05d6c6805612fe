"""Workers and runs that die: who is restarted, what is resumed, and that no prompt is lost or trained twice."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from control.watchdog import Watchdog
from data.prompts import prompt_number
from record.account import Account
from tests.conftest import ROOT
from tests.runs import (
    Process,
    alive,
    command,
    complete,
    left_in_shared_memory,
    lines,
    shared_memory,
    start_and_wait_for,
    steps,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import kills  # noqa: E402

HARD_S = 120            # no case may take longer, whatever it waits for


def events(flags, what: str) -> list[dict]:
    return [line for line in lines(flags) if line.get("what") == what]


def started(flags) -> Process:
    return Process(command(flags))


def finished(process, flags, code=0) -> str:
    try:
        _, err = process.communicate(timeout=HARD_S)
    finally:
        process.kill()
    assert process.returncode == code, err
    return err


def wait_for(process, happened, what: str) -> None:
    limit = time.monotonic() + HARD_S
    while time.monotonic() < limit and process.poll() is None:
        if happened():
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{what} did not come: {process.communicate()[1]}")


def wait_for_step(process, flags, step: int) -> None:
    wait_for(process, lambda: any(s["step"] >= step for s in kills.log(flags) if s["type"] == "step"), f"step {step}")


def wait_for_event(process, flags, what: str) -> None:
    wait_for(process, lambda: any(e.get("what") == what for e in kills.log(flags)), what)


@pytest.mark.parametrize("victim", ["rollout0", "teacher0"])
def test_a_killed_worker_is_restarted_and_nothing_is_lost(flags, victim):
    before = shared_memory()
    flags |= dict(steps=150, rollouts=1, max_ahead=2, max_lag=2, save_every=50)
    process, first = start_and_wait_for(flags, step=5)
    os.kill(first[victim], signal.SIGKILL)
    finished(process, flags)
    event, = events(flags, "restarted")
    assert event["worker"] == victim and "-9" in event["why"] and event["pid"] != first[victim]
    assert kills.trained_once(flags)[1:] == (0, 0)
    last = lines(flags)[-1]
    assert last["tokens_generated"] == sum(last[f"tokens_{x}"] for x in ("trained", "in_flight", "dropped", "lost"))
    assert max(s["lag_max"] for s in steps(flags)) <= 2
    assert not alive(kills.processes(flags).values()) and not left_in_shared_memory(before)


@pytest.mark.parametrize("how", [["--cycles", "3"], ["--cycles", "3", "--async"]])
def test_killed_at_random_and_resumed(how, tmp_path):
    """Synchronous: the weights are those of an undisturbed run, bit for bit; asynchronous: every prompt once."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "kills.py"), *how, "--seed", "1",
                           "--out", str(tmp_path / "rows.jsonl")], capture_output=True, text=True, timeout=5 * HARD_S)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["kills"] >= last["resumed"] >= 3
    assert last.get("identical", last["runs"]) == last["runs"] and last.get("lost", 0) == last.get("twice", 0) == 0


def test_a_dead_learner_ends_the_run_by_name_and_the_run_goes_on(flags):
    before = shared_memory()
    flags |= dict(save_every=4)
    process, first = start_and_wait_for(flags | dict(steps=100_000), step=6)
    for flag in ("--resume", "--overwrite"):
        again = [*command(dict(out=flags["out"])), flag]
        second = complete(again, HARD_S)
        assert second.returncode == 2 and "a run is writing to it" in second.stderr, second.stderr
    os.kill(first["learner"], signal.SIGKILL)
    err = finished(process, flags, code=1)
    assert "learner" in err and "-9" in err and not alive(first.values())
    last = (steps(flags)[-1]["step"] + 20) // 4 * 4
    done = complete([*command(dict(out=flags["out"], steps=last)), "--resume"], HARD_S)
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in steps(flags)] == list(range(1, last + 1)) and lines(flags)[-1]["type"] == "done"
    assert kills.trained_once(flags)[1:] == (0, 0) and events(flags, "resumed")[0]["step"] % 4 == 0
    assert sorted(p.name for p in (Path(flags["out"]) / "checkpoints").iterdir()) == sorted(
        [f"step-{last - 4}", f"step-{last}"]), "--faults.keep 2"
    assert not left_in_shared_memory(before)


def test_a_run_that_goes_on_evaluates_no_version_twice(flags):
    flags |= dict(schedule="sync", eval__every=2, save_every=2)
    assert finished(started(flags | dict(steps=4)), flags) is not None
    for last in (4, 6):                                            # from its end to its end, and two steps on
        again = [*command(dict(out=flags["out"], steps=last)), "--resume"]
        done = complete(again, HARD_S)
        assert done.returncode == 0, done.stderr
        evals = [e["step"] for e in lines(flags) if e["type"] == "eval"]
        assert evals == list(range(0, last + 1, 2)) and lines(flags)[-1]["accuracy_after"] is not None


@pytest.mark.parametrize("victim, code", [("teacher0", 0), ("learner", 1)])
def test_a_worker_that_stands_still_counts_as_dead(flags, victim, code):
    """Stopped, not killed: it holds its pipe and its slots, and says nothing."""
    flags |= dict(steps=60, faults__stall_s=20)
    process, first = start_and_wait_for(flags, step=3)
    os.kill(first[victim], signal.SIGSTOP)
    err = finished(process, flags, code)
    assert f"{victim} has not moved for 20 s" in err and not alive(first.values())
    assert [e["worker"] for e in events(flags, "restarted")] == ([victim] if code == 0 else [])


def test_after_so_many_restarts_the_run_ends(flags):
    process, first = start_and_wait_for(flags | dict(steps=100_000, faults__restarts=0), step=3)
    os.kill(first["rollout0"], signal.SIGKILL)
    assert "rollout0 died with exit code -9, after 0 restarts (--faults.restarts)" in finished(process, flags, code=1)


def test_an_interrupt_waits_for_its_checkpoint(flags):
    """Of a large student it takes longer than a few seconds."""
    process, first = start_and_wait_for(flags | dict(steps=100_000), step=2)
    os.kill(first["learner"], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(12)
    assert process.poll() is None
    os.kill(first["learner"], signal.SIGCONT)
    err = finished(process, flags, code=130)
    said, last = (line for line in err.splitlines() if "interrupted" in line)
    assert "a second interrupt" in said and "step-" in last
    assert len(list((Path(flags["out"]) / "checkpoints").iterdir())) == 1


def test_a_second_interrupt_ends_at_once(flags):
    process, first = start_and_wait_for(flags | dict(steps=100_000), step=5)
    os.kill(first["learner"], signal.SIGSTOP)                      # so that the first cannot end it
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    err = finished(process, flags, code=130)
    assert time.monotonic() - began < 30 and "nothing is saved" in err and not alive(first.values())     # not stall_s


def test_a_prompt_that_the_teacher_cannot_score_is_named_and_skipped(flags, models, tmp_path):
    """The teacher does not know <unk>, which stands in one prompt of 40, and which a student draws once in a while."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher"])
    teacher.base_model.embed_tokens.weight.data[2] = float("nan")
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(models["teacher"]).save_pretrained(tmp_path / "teacher")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "1+?=" if i == 17 else f"{i}+1="}) for i in range(40)))
    flags |= dict(steps=20, task=str(path), teacher=str(tmp_path / "teacher"), faults__skips=9, max_response=1)
    err = finished(started(flags), flags)
    skipped, trained = events(flags, "skipped"), [uid for s in steps(flags) for uid, _, _ in s["trained"]]
    named = {uid for e in skipped for uid in e["uids"]}
    always = {uid for uid in trained if prompt_number(uid, 40, 0) == 17}
    assert len(always) >= 3 and always <= named, "wherever it is, it is named"
    assert len(named - always) < len(trained) / 10, "and few others are"
    assert all("teacher" in e["why"] and f"prompts {e['uids']}" in err for e in skipped)
    assert [s["step"] for s in steps(flags) if s["skipped"]] == [e["step"] for e in skipped]
    assert all((s["kl"] is None) == bool(s["skipped"]) for s in steps(flags)), "null, which is JSON, and not NaN"


def test_too_many_skips_end_the_run_with_the_last_good_checkpoint_named(flags, models, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    teacher = AutoModelForCausalLM.from_pretrained(models["teacher"])
    teacher.lm_head.weight.data[3] = float("nan")
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(models["teacher"]).save_pretrained(tmp_path / "teacher")
    flags |= dict(steps=20, teacher=str(tmp_path / "teacher"), save_every=2)
    err = finished(started(flags), flags, code=1)
    assert "3 updates in a row" in err and "step-2" in err.strip().splitlines()[-1]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(flags):
    """The learner may no longer write a file of more than ten kilobytes; later it may again."""
    flags |= dict(steps=100_000, save_every=5)
    process, first = start_and_wait_for(flags, step=11)
    resource.prlimit(first["learner"], resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    wait_for_event(process, flags, "unsaved")
    good, faults = kills.checkpoint.newest(Path(flags["out"]) / "checkpoints")
    assert good and not faults
    resource.prlimit(first["learner"], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    step = steps(flags)[-1]["step"]
    wait_for_step(process, flags, step + 12)
    assert kills.checkpoint.step_of(kills.checkpoint.newest(Path(flags["out"]) / "checkpoints")[0]) >= step
    process.send_signal(signal.SIGTERM)
    assert "no checkpoint at step" in finished(process, flags, code=130)


def test_a_disk_too_full_for_the_log_does_not_end_the_run(flags):
    """Its file may not grow for a while; then it has every line, in order."""
    log = Path(flags["out"]) / "log.jsonl"
    process, _ = start_and_wait_for(flags | dict(steps=100_000), step=3)
    before, step = log.stat().st_size, steps(flags)[-1]["step"]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (before, resource.RLIM_INFINITY))
    time.sleep(3)
    assert process.poll() is None and log.stat().st_size <= before + 5_000      # what came before the limit
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for_step(process, flags, step + 20)
    process.send_signal(signal.SIGTERM)
    err = finished(process, flags, code=130)
    assert err.count("File too large: the run goes on") == err.count("there is room on the disk again") == 1, err
    numbers = [s["step"] for s in steps(flags)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_student_with_nothing_left_to_say_is_spoken_of_once():
    account, warnings = Account(), []
    for entropy in [2.0] * 10 + [0.015] * 10:
        account.enter(dict(tokens=1, lag_mean=0, lag_max=0, kl=1.0, entropy=entropy))
    cfg = SimpleNamespace(faults=SimpleNamespace(skips=3), minibatches=1)
    watchdog = Watchdog(cfg, account, lambda text, **event: warnings.append(text))
    watchdog.see(20, [], {0: 0}, saved="")
    watchdog.see(21, [], {0: 0}, saved="")
    assert warnings == ["step 20: the student's entropy has collapsed from 2 to 0.015 nats"]


def test_a_rollout_worker_with_vllm_is_restarted(flags):
    pytest.importorskip("vllm")
    flags |= dict(steps=60, engine="vllm", save_every=20)
    process, first = start_and_wait_for(flags, step=5)
    os.kill(first["rollout0"], signal.SIGKILL)
    finished(process, flags)
    assert [e["worker"] for e in events(flags, "restarted")] == ["rollout0"]
    assert kills.trained_once(flags)[1:] == (0, 0) and not alive(kills.processes(flags).values())

"""The real pipeline: processes, shared memory, tiny random models. What the log must say, and what must be gone
afterwards."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from record.metrics import DONE, EVAL, METRICS
from tests.conftest import ROOT
from tests.runs import (
    alive,
    command,
    complete,
    left_in_shared_memory,
    lines,
    run,
    shared_memory,
    start_and_wait_for,
    steps,
)
from transport.process import YIELD, use_cores


def test_two_rollout_workers_train_asynchronously_and_leave_nothing(flags):
    before = shared_memory()
    done = run(flags | dict(steps=20, rollouts=2))
    assert done.returncode == 0, done.stderr
    log = lines(flags)
    assert [line["type"] for line in log][0] == "run" and log[-1]["type"] == "done"
    assert [s["step"] for s in steps(flags)] == list(range(1, 21))
    assert all(s.keys() - {"type"} == METRICS.keys() for s in steps(flags)) and log[-1].keys() - {"type"} == DONE.keys()
    last = log[-1]
    assert last["tokens_generated"] == last["tokens_trained"] + last["tokens_in_flight"] > 0
    assert last["tokens_trained"] == sum(s["tokens"] for s in steps(flags))
    assert max(s["lag_max"] for s in steps(flags)) > 0, "it did run ahead"
    assert all(s["engine_gap_max"] <= 1e-4 for s in steps(flags)), "every push arrived, to float32 rounding"
    assert {e["step"] for e in log if e["type"] == "eval"} >= {0, 20}
    assert set(log[0]["pids"]) == {"rollout0", "rollout1", "teacher0", "learner"}
    assert not alive(log[0]["pids"].values()) and not left_in_shared_memory(before)
    trace = json.loads((Path(flags["out"]) / "trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in trace if e["ph"] == "X"} >= {"generate", "push", "score", "step", "publish"}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM.from_pretrained(f"{flags['out']}/student")
    AutoTokenizer.from_pretrained(f"{flags['out']}/student")


def test_workers_load_in_the_order_of_the_waves(flags, tmp_path):
    """As on a GPU that vLLM shares; here the other way round, which does not happen by itself."""
    script = tmp_path / "waves.py"
    script.write_text("import sys\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "if __name__ == '__main__':\n"
                      "    import asyncopd\n"
                      "    from control import plan\n"
                      "    plan.waves = lambda cfg, placed: [[p] for p in reversed(placed)]\n"
                      "    sys.exit(asyncopd.main(sys.argv[1:]))\n")
    done = complete([sys.executable, str(script), *command(flags | dict(steps=2, engine="hf"))[2:]])
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "loading" in line]
    assert [line.partition("asyncopd: ")[2] for line in said] == [
        "loading models: rollout0 (hf), teacher0 (hf), learner",
        "learner is ready, still loading: rollout0 (hf), teacher0 (hf)",
        "teacher0 is ready, still loading: rollout0 (hf)"]
    assert lines(flags)[0]["type"] == "run" and len(steps(flags)) == 2


def test_sync_has_no_lag_and_is_the_same_run_twice_however_it_is_evaluated(flags, tmp_path):
    first, second = (flags | dict(steps=4, schedule="sync", out=str(tmp_path / name)) for name in ("a", "b"))
    second |= dict(eval__every=1, eval__k=4, eval__temperature=1.0, log="tensorboard")
    for f in (first, second):
        done = run(f)
        assert done.returncode == 0, done.stderr
    assert all(s["lag_max"] == 0 and s["w_max"] == pytest.approx(1, abs=1e-3) for s in steps(first))
    assert [s["loss"] for s in steps(first)] == [s["loss"] for s in steps(second)]
    evals = [line for line in lines(second) if line["type"] == "eval"]
    assert [e["step"] for e in evals] == [0, 1, 2, 3, 4] and {(e["n"], e["k"]) for e in evals} == {(8, 4)}
    assert all(e.keys() - {"type"} == EVAL.keys() for e in evals)
    assert all(e["pass_at_k"]["1"] == e["avg_at_k"] == e["accuracy"] <= e["pass_at_k"]["4"] for e in evals)
    assert "the first prompt, as the models read it" in done.stdout and done.stdout.count("eval at step") == 5
    out = Path(second["out"])
    assert (out / "samples.txt").read_text().count("==== step 4, student") == 8 and (out / "tensorboard").is_dir()
    assert f"| 4 | student | {evals[-1]['accuracy']:.1%} |" in (out / "student" / "README.md").read_text()


@pytest.mark.parametrize("engine, rule", [
    ("hf", dict(overdue="cut", max_ahead=1, max_lag=1)), ("vllm", dict(overdue="cut", max_ahead=1, max_lag=1)),
    ("hf", dict(overdue="wait", max_ahead=1, max_lag=1)), ("hf", dict(overdue="drop", max_ahead=1, max_lag=1)),
    ("hf", dict(overdue="cut", max_ahead=2, max_lag=3, inflight="finish")),
    ("hf", dict(overdue="cut", max_ahead=2, max_lag=3, inflight="keep")),
    ("vllm", dict(overdue="wait", max_ahead=2, max_lag=3, inflight="keep", max_running=4, eval__every=10))])
def test_no_token_is_older_than_max_lag(flags, engine, rule):
    if engine == "vllm":
        pytest.importorskip("vllm")
    done = run(flags | dict(steps=25, engine=engine) | rule)
    assert done.returncode == 0, done.stderr
    last = lines(flags)[-1]
    assert max(s["lag_max"] for s in steps(flags)) <= rule["max_lag"]
    assert last["tokens_generated"] == sum(last[f"tokens_{x}"] for x in ("trained", "in_flight", "dropped", "lost"))
    assert (last["tokens_dropped"] > 0) <= (rule["overdue"] == "drop")
    assert all(s["engine_gap_max"] <= 1e-4 for s in steps(flags))
    cuts = [line for line in lines(flags) if line.get("what") == "cut"]
    assert all(c["born"] <= c["version"] - rule["max_lag"] for c in cuts) and (not cuts or rule["overdue"] == "cut")


def test_step_off_trains_batch_j_under_exactly_lag_k(flags):
    done = run(flags | dict(steps=8, schedule="step-off", max_ahead=2, eval__every=3))
    assert done.returncode == 0, done.stderr
    assert [(s["lag_min"], s["lag_max"]) for s in steps(flags)] == [(min(j, 2), min(j, 2)) for j in range(8)]


@pytest.mark.parametrize("objective", [dict(kl="forward", top_k=5), dict(mc_samples=1, batch=32),
                                       dict(minibatches=2, batch=32)])
def test_objectives_lower_the_kl(flags, objective):
    done = run(flags | dict(steps=50, lr=3e-3, schedule="sync") | objective)     # sync: the same run every time
    assert done.returncode == 0, done.stderr
    kl = [s["kl"] for s in steps(flags)]
    assert sum(kl[-10:]) < 0.7 * sum(kl[:10]), kl


def test_plain_text_prompts_from_a_file(flags, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{i}+1=", "answer": str(i + 1)}) for i in range(40)))
    done = run(flags | dict(steps=2, task=str(path), data__prompt_key="question"))
    assert done.returncode == 0, done.stderr
    assert [e["n"] for e in lines(flags) if e["type"] == "eval"] == [4, 4]


# -- ends ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_leaves_nothing(flags, how):
    before = shared_memory()
    process, pids = start_and_wait_for(flags | dict(steps=100_000), step=2)
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in err, err
    assert not alive(pids.values()) and not left_in_shared_memory(before)
    saved = list((Path(flags["out"]) / "checkpoints").iterdir())
    assert len(saved) == 1 and (saved[0] / "model.safetensors").exists() and saved[0].name in err


def test_workers_do_not_outlive_a_killed_parent(flags):
    process, pids = start_and_wait_for(flags | dict(steps=100_000), step=2)
    process.kill()
    process.communicate()
    limit = time.monotonic() + 15
    while alive(pids.values()) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not alive(pids.values())


WRONG_PUBLISH = """
import learner
published = learner.LearnerWorker.publish
def wrong(self):      # from version 3 on all are damaged; a single one might never be loaded
    seconds = published(self)
    if self.version >= 3:
        self.shared.weights.flat[self.version % 2] *= 1.5
    return seconds
learner.LearnerWorker.publish = wrong
"""
WRONG_LOAD = """
import engines.hf
NAME = 'model.layers.0.self_attn.q_proj.weight'
load = engines.hf.HFEngine.load
def wrong(self, tensors, version):                # from the fourth push on one tensor stays as it was
    self.pushes = getattr(self, 'pushes', 0) + 1
    if self.pushes > 3:
        tensors = tensors | {NAME: self.model.get_parameter(NAME).detach().clone()}
    load(self, tensors, version)
engines.hf.HFEngine.load = wrong
"""


@pytest.mark.parametrize("dtype, code, said", [
    ("float32", WRONG_PUBLISH, "did not arrive in the engine"),
    ("bfloat16", WRONG_LOAD, "in 1 of 14 tensors, the first of them model.layers.0.self_attn.q_proj.weight")])
def test_a_wrong_push_ends_the_run(flags, tmp_path, dtype, code, said):
    (tmp_path / "asyncopd_wrong.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n"
        "import asyncopd\n"
        "if __name__ == '__main__':\n    sys.exit(asyncopd.main(sys.argv[1:]))\n")
    how = command(flags | dict(steps=50, dtype=dtype))[2:]
    done = complete([sys.executable, str(tmp_path / "asyncopd_wrong.py"), *how])
    assert done.returncode == 1 and said in done.stderr and "rollout0" in done.stderr, done.stderr
    assert "did not arrive" in done.stderr and not any(e.get("what") == "restarted" for e in lines(flags))


# -- vLLM ------------------------------------------------------------------------------------------

def test_fifty_steps_with_vllm(flags):
    pytest.importorskip("vllm")
    before = shared_memory()
    done = run(flags | dict(steps=50, engine="vllm", overdue="keep", max_ahead=4), timeout=400)
    assert done.returncode == 0, done.stderr
    last = lines(flags)[-1]
    assert last["tokens_generated"] == last["tokens_trained"] + last["tokens_in_flight"] > 0
    assert all(s["lag_min"] <= s["lag_mean"] <= s["lag_max"] for s in steps(flags))
    assert all(s["engine_gap_max"] <= 1e-4 for s in steps(flags)), "after every push"
    assert not alive(lines(flags)[0]["pids"].values()) and not left_in_shared_memory(before)


# -- several learners ------------------------------------------------------------------------------

def test_two_learners_run_to_the_end_and_save_the_whole_student(flags, models):
    from transformers import AutoModelForCausalLM
    done = run(flags | dict(steps=3, schedule="sync", learners=2, save_every=2, eval__n=0))
    assert done.returncode == 0, done.stderr
    assert all(s["push_bytes"] > 0 and s["engine_gap_max"] <= 1e-4 and s["lag_max"] == 0 for s in steps(flags))
    assert "learner1" in lines(flags)[0]["pids"] and not alive(lines(flags)[0]["pids"].values())
    out = Path(flags["out"])
    assert not (out / ".learners").exists() and (out / "checkpoints" / "step-2" / "state.json").exists()
    sizes = [sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
             for folder in (models["student"], out / "student", out / "checkpoints" / "step-2")]
    assert len(set(sizes)) == 1


def test_a_killed_learner_of_two_ends_the_run_by_its_name(flags):
    process, pids = start_and_wait_for(flags | dict(steps=100_000, learners=2), step=2)
    os.kill(pids["learner1"], signal.SIGKILL)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 1 and "learner1" in err and "-9" in err, err
    assert not alive(pids.values())


def test_on_a_cpu_the_engine_hf_lets_the_others_go_first():
    """More responses run in a step then, and a run on two cores is 5% faster."""
    asked = """if True:
        import os, sys
        from config import Config
        from transport.process import use_cores
        use_cores(sys.argv[1], 0, Config(engine=sys.argv[2], rollouts=1, teachers=1, learners=1))
        print(os.nice(0))"""
    nice = {who: int(subprocess.run([sys.executable, "-c", asked, *who], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout)
            for who in [("rollout", "hf"), ("rollout", "vllm"), ("teacher", "hf"), ("learner", "hf")]}
    assert nice.pop(("rollout", "hf")) - os.nice(0) == YIELD
    assert set(nice.values()) == {os.nice(0)}


@pytest.mark.parametrize("schedule, rollouts, cores, threads, bound", [
    ("async", 1, 4, 2, ["0"]), ("async", 2, 4, 2, ["0", "1"]), ("async", 3, 2, 1, ["0", "0", "0"]),
    ("sync", 1, 4, 4, ["0,1,2,3"]), ("sync", 2, 4, 2, ["0,1", "2,3"]), ("sync", 3, 2, 1, ["0", "1", "0"])])
def test_a_synchronous_role_has_all_cores(schedule, rollouts, cores, threads, bound, monkeypatch):
    """Whoever works alone would be 1.6 times as slow on one of two cores."""
    from config import Config
    found = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setattr("torch.set_num_threads", found.append)
    cfg = Config(schedule=schedule, rollouts=rollouts, teachers=1, learners=1)
    for index in range(rollouts):
        environ: dict[str, str] = {}
        monkeypatch.setattr(os, "environ", environ)
        use_cores("rollout", index, cfg)
        assert environ == {"VLLM_CPU_OMP_THREADS_BIND": bound[index]}
    assert found == [threads] * rollouts


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 4])
def test_three_steps_on_gpus(flags, gpus):
    """One GPU for all roles; four for a rollout worker, a teacher and two learners."""
    import torch
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{gpus} GPUs are not here")
    done = run(flags | dict(gpus=gpus, steps=3, engine="vllm", learners=2 if gpus == 4 else 1))
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in steps(flags)] == [1, 2, 3] and all(s["push_bytes"] > 0 for s in steps(flags))

"""What people read of a run: samples, the card, and what is sent to a tracker's library."""
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from control.controller import Controller
from control.resolve import configure
from data.prompts import Row
from record import report
from record.log import Log, rewind
from record.trackers import TRACKERS
from tests.conftest import ROOT

ANSWERED = [(Row(f"prompt {i}", str(i)), [f"text {i}", "other"], [i % 2 == 0, False]) for i in range(10)]
SAID = dict(accuracy=0.25, n=10, k=2, avg_at_k=0.25, pass_at_k={"1": 0.25, "2": 0.5}, ci=[0.1, 0.4])
LINES = [
    dict(type="run", argv=["../there/asyncopd.py", "--task=hf:a/b", "--data.filter=level > 3"], commit="abc", pids={},
         config=dict(student="Org/Small", teacher="Org/Large", task="hf:a/b",
                     data=dict(filter="level > 3", suffix="", eval_task=""),
                     kl="reverse", estimator="reverse_mc", batch=8, lr=3e-6, lr_schedule="constant", seed=4,
                     dtype="bfloat16", schedule="async", eval=dict(temperature=1.0)),
         versions={"torch": "2"}, hardware={"cpu": "a processor", "cores": 2, "gpus": []}),
    dict(type="eval", step=0, who="student", **SAID),
    dict(type="eval", step=9, who="student", **SAID | {"accuracy": 1.0}),
    dict(type="done", steps=29, tokens_trained=1234, lag_mean=1.5, lag_max=3, wall_s=60.0,
         kl_before=0.5, kl_after=0.25)]


def test_an_evaluation_is_a_line_of_the_log_samples_in_a_file_and_three_lines_on_the_terminal(tmp_path, capsys):
    log = Log(tmp_path, steps=5)
    log.evaluation(5, "student", SAID, ANSWERED)
    log.close()
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line == dict(type="eval", step=5, who="student") | SAID
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("====") == report.SAMPLES and "sample 1: right, expected: 0\nprompt 0\n----\ntext 0\n" in text
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "eval at step 5, student: 25.0% [10.0, 40.0] of 10 prompts x 2  pass@2 50.0%"
    assert out[1:] == ["  right  prompt 0  ->  text 0", "  wrong  prompt 1  ->  text 1"]


def test_before_the_first_ticket_there_are_words_and_no_bar(tmp_path, capsys):
    """A bar at 0 tells nobody that models are being loaded."""
    log = Log(tmp_path, steps=400)
    log.progress("loading models: teacher0 (hf), learner")
    assert capsys.readouterr().err == "asyncopd: loading models: teacher0 (hf), learner\n"
    log.begin()
    assert "0/400" in (said := capsys.readouterr().err) and "the first batch is generated and scored" in said
    log.close()
    capsys.readouterr()
    quiet = Log(tmp_path, steps=400, quiet=True)
    quiet.progress("loading models")
    quiet.begin()
    quiet.close()
    assert capsys.readouterr().err == ""


def test_the_controller_says_which_workers_are_still_loading(config):
    said = []
    workers = [SimpleNamespace(name=name, role=role, ready=False)
               for name, role in (("rollout0", "rollout"), ("teacher0", "teacher"), ("learner", "learner"))]
    controller = SimpleNamespace(cfg=config(engine="hf"), pool=workers,
                                 recorder=SimpleNamespace(log=SimpleNamespace(progress=said.append)))
    controller.unready = lambda: Controller.unready(controller)
    for worker in workers:
        Controller.worker_ready(controller, worker, {})
    assert said == ["rollout0 is ready, still loading: teacher0 (hf), learner",
                    "teacher0 is ready, still loading: learner"]


def test_a_long_text_is_shortened_to_its_two_ends():
    said = report.shortened("first line\n" + "x" * 500 + " so \\boxed{72}", 60)
    assert len(said) <= 60 and said.startswith("first line") and said.endswith("so \\boxed{72}") and " ... " in said


def test_the_card_states_the_runs_facts_and_nothing_else(tmp_path):
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in LINES))
    card = report.model_card(tmp_path / "log.jsonl")
    for fact in ("base_model: Org/Small\n", "`Org/Large`", "`hf:a/b`, filter `level > 3`", "estimator `reverse_mc`",
                 "bfloat16, learnt in float32", "29 batches of 8 responses, 1,234 tokens", "learning rate 3e-06",
                 "seed 4", "mean 1.50, max 3", "60 s on a processor", "asyncopd abc; torch 2",
                 "| 0 | student | 25.0% | 10.0% to 40.0% | 10 | 2 |", "| 9 | student | 100.0% |", "temperature 1",
                 "0.5000 in the first ten batches, 0.2500 in the last ten",
                 "    .venv/bin/python asyncopd.py --task=hf:a/b '--data.filter=level > 3'"):
        assert fact in card, fact
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(x) for x in (LINES[0], LINES[-1] | {"steps": 19})))
    card = report.model_card(tmp_path / "log.jsonl")
    assert "It was not evaluated on a task." in card and "%" not in card
    assert "KL per token" not in card, "the first and the last ten batches overlap"


def told(kind, tmp_path, monkeypatch):
    """What a library with the three functions of wandb and trackio hears of a run's last lines."""
    heard = []
    monkeypatch.setitem(sys.modules, kind, SimpleNamespace(
        init=lambda **how: heard.append(("init", how)), finish=lambda: heard.append("finish"),
        log=lambda found, step: heard.append((step, found))))
    log = Log(tmp_path, steps=9, quiet=True)
    log.tracker = TRACKERS[kind](tmp_path, {"lr": 1})
    log.write("run", pids={"a": 3})
    log.write("event", what="cut", step=1)
    log.write("step", step=1, kl=0.5, trained=[[1, 2, 3]], lr=None)
    log.write("step", step=2, kl=0.25, finite=True)
    log.evaluation(1, "student", SAID, ANSWERED)           # comes after later steps
    log.write("done", steps=2, busy={"rollout": 0.5})
    log.close()
    return heard


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_hears_the_numbers_of_the_log_and_steps_never_go_back(kind, tmp_path, monkeypatch):
    heard = told(kind, tmp_path, monkeypatch)
    assert heard[0] == ("init", dict(project="asyncopd", name=tmp_path.name, config={"lr": 1}))
    assert heard[1:3] == [(1, {"step/step": 1, "step/kl": 0.5}), (2, {"step/step": 2, "step/kl": 0.25})]
    step, found = heard[3]
    assert step == 2 and found["eval/student/step"] == 1 and found["eval/student/pass_at_k/2"] == 0.5
    assert heard[4:] == [(2, {"done/steps": 2, "done/busy/rollout": 0.5}), "finish"]


def test_tensorboards_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = Log(tmp_path, steps=9, quiet=True)
    log.tracker = TRACKERS["tensorboard"](tmp_path, {"lr": 1})
    log.write("step", step=1, kl=0.5)
    log.write("step", step=2, kl=0.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/kl")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("kind", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_there_is_refused_with_its_remedy(kind, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == kind else there(name))
    with pytest.raises(ValueError, match=rf"--log {kind}: not installed \(pip install {kind}\)"):
        configure(["--gpus=0", f"--log={kind}"])


def test_no_tracker_is_imported_unasked():
    code = ("import sys, asyncopd, control.controller; print([m for m in ('wandb', 'trackio', 'tensorboard', "
            "'datasets', 'sympy', 'torch.utils.tensorboard') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done


def test_a_run_that_goes_on_takes_back_what_it_will_write_again(tmp_path):
    wrote = [dict(type="run"), dict(type="eval", step=0), *(dict(type="step", step=i) for i in range(1, 5)),
             dict(type="event", what="effopd", step=2), dict(type="event", what="effopd", step=4),
             dict(type="event", what="restarted", version=3), dict(type="event", what="cut", version=1),
             dict(type="event", what="cut", version=2), dict(type="done", steps=4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in wrote) + '{"type": "st')
    assert rewind(tmp_path / "log.jsonl", 2) == wrote[:4] + [wrote[6], wrote[8], wrote[9]]

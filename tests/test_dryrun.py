"""--dry-run of every shipped config, against what it printed when a person last read it.

To renew tests/snapshots: HF_HUB_OFFLINE=1 python -m tests.test_dryrun, and read the difference.
"""
import contextlib
import io
import re
from dataclasses import asdict, replace

import pytest
import transformers

from asyncopd import main
from control import dryrun, estimate
from control.resolve import configure
from models import footprint
from tests.conftest import ROOT

SNAPSHOTS = ROOT / "tests" / "snapshots"
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RUNS = [(name, gpus) for name in SHIPPED for gpus in ({"toy": [0], "smollm2": [0], "gsm8k": [1, 3]}.get(name, [8]))]


def said(name: str, gpus: int) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--config={ROOT}/configs/{name}.yaml", f"--gpus={gpus}", "--dry-run"]) == 0
    return out.getvalue()


def laptop(monkeypatch) -> None:
    """One that has never seen these models, with two cores of a known speed."""
    def absent(name, **how):
        raise OSError("not here")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", absent)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(footprint, "free_gb", dict)
    monkeypatch.setattr(estimate, "measured", lambda threads, dtype: (50e9, 10e9))
    monkeypatch.setattr(estimate, "usable_cores", lambda: 2)
    dryrun.known_model.cache_clear()


@pytest.fixture(autouse=True)
def on_a_laptop(monkeypatch):
    laptop(monkeypatch)


@pytest.mark.parametrize("name, gpus", RUNS)
def test_a_dry_run_says_what_it_said(name, gpus):
    assert said(name, gpus) == (SNAPSHOTS / f"{name}-{gpus}.txt").read_text()


def test_there_is_no_snapshot_without_a_config():
    assert {p.stem for p in SNAPSHOTS.glob("*.txt")} == {f"{name}-{gpus}" for name, gpus in RUNS}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_says_what_it_needs_and_how_to_run_it(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    head = text[:text.index("\n", text.rindex("\n#") + 1)]
    commands = re.findall(r"python asyncopd\.py ([^\n]*)", head)
    assert commands and all(len(line) <= 120 for line in text.splitlines())
    for command in commands:
        configure([*command.replace("configs/", f"{ROOT}/configs/").split(), "--dry-run"])
    assert name in ("toy", "smollm2") or ("no result of this file has been measured" in head and "# Needs:" in head)


@pytest.mark.parametrize("size", ["1.7b", "4b"])
@pytest.mark.parametrize("twin, what", [("sync", dict(schedule="sync", max_ahead=0)), ("step_off", dict(
    schedule="step-off", max_ahead=2)), ("forward", dict(
    kl="forward", estimator="forward_topk", top_k=16, draws="iid"))])
def test_a_twin_differs_from_its_base_in_what_its_name_says(size, twin, what):
    def flags(name: str) -> dict:
        cfg = configure([f"--config={ROOT}/configs/{name}.yaml", "--dry-run"])
        return asdict(replace(cfg, out="", config=""))
    base = flags(f"deepmath_{size}")
    other = flags(f"deepmath_{size}_{twin}")
    assert other == base | what


def test_eight_gpus_and_nothing_else_named_is_the_papers_setting():
    cfg = configure(["--gpus=8", "--kl=reverse", "--mc-samples=4", "--dry-run"])
    assert (cfg.student, cfg.teacher) == ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert (cfg.batch, cfg.minibatches, cfg.lr, cfg.max_prompt, cfg.max_response) == (256, 4, 3e-6, 2048, 16384)
    assert (cfg.rollouts, cfg.teachers, cfg.learners) == (4, 1, 3) and cfg.data.filter == "difficulty>=6"
    assert cfg.data.suffix.endswith("put your final answer within \\boxed{}.")
    assert "Qwen2.5-0.5B" in configure(["--gpus=1", "--dry-run"]).student
    for toy in (["--gpus=0"], ["--gpus=8", "--task=toy", "--dry-run"], []):
        assert configure(toy).task == "toy"


@pytest.mark.parametrize("name, gpus, gb, fits", [
    ("gsm8k", 1, 40, True), ("gsm8k", 1, 24, False), ("gsm8k", 3, 24, True), ("deepmath_4b", 8, 80, True),
    ("deepmath_1.7b", 8, 48, False)])
def test_what_does_not_fit_is_exit_code_2(name, gpus, gb, fits, monkeypatch, capsys):
    monkeypatch.setitem(dryrun.GPU, "gb", float(gb))
    code = main([f"--config={ROOT}/configs/{name}.yaml", f"--gpus={gpus}", "--dry-run"])
    err = capsys.readouterr().err
    assert code == (0 if fits else 2) and len(err.splitlines()) == 1 - fits
    assert fits or f"where {gb}.0 are free" in err


@pytest.mark.parametrize("gpus, seconds", [(1, sum), (2, lambda s: max(s[0], s[1] + s[2])), (3, max)])
def test_roles_on_one_gpu_take_turns(gpus, seconds):
    """Two GPUs: one generates, the other scores and learns."""
    out = said("gsm8k", gpus)
    roles = [float(x) for x in re.search(r"generate  score  learn\n +(\S+) +(\S+) +(\S+)", out).groups()]
    assert float(re.search(r"(\S+) s a batch", out)[1]) == pytest.approx(seconds(roles), abs=0.1)


def test_on_a_machine_with_as_many_gpus_theirs_is_the_memory_that_counts(monkeypatch):
    monkeypatch.setattr(footprint, "free_gb", lambda: {"cuda:0": 70.0, "gpu": 96.0})
    out = said("gsm8k", 1)
    assert "this machine's 96 GB" in out and out.count(" 70.0") == 3
    assert "assumed to have 80 GB" in said("gsm8k", 3)


@pytest.mark.parametrize("flags, named", [(["--steps=0"], "--steps 0"), (["--task=t.jsonl"], "--student"), ([
    "--gpus=8", "--task=t.jsonl", "--student=nobody/none", "--teacher=nobody/none"], "nobody/none")])
def test_a_dry_run_of_what_cannot_be_is_exit_code_2(flags, named, capsys):
    assert main([*flags, "--dry-run"]) == 2 and named in capsys.readouterr().err


def test_a_file_may_change_another_but_not_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("config: b.yaml\nsteps: 3\n")
    (tmp_path / "b.yaml").write_text("task: toy\nsteps: 5\nlr: 0.5\n")
    cfg = configure([f"--config={tmp_path}/a.yaml", "--gpus=0"])
    assert (cfg.steps, cfg.lr) == (3, 0.5)
    (tmp_path / "b.yaml").write_text("config: a.yaml\n")
    with pytest.raises(ValueError, match="names itself"):
        configure([f"--config={tmp_path}/a.yaml", "--gpus=0"])


@pytest.mark.parametrize("name, total, active", [
    ("Qwen/Qwen2.5-0.5B-Instruct", 0.49, 0.49), ("Qwen/Qwen2.5-1.5B-Instruct", 1.54, 1.54),
    ("Qwen/Qwen3-1.7B", 1.7, 1.7), ("Qwen/Qwen3-4B", 4.0, 4.0), ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.5, 3.3)])
def test_parameters_are_those_that_the_models_cards_state(name, total, active):
    model = dryrun.known_model("student", name)
    assert model.shape.P / 1e9 == pytest.approx(total, abs=0.06)
    assert model.active / 1e9 == pytest.approx(active, abs=0.06)
    assert model.source == "configs/shapes.json" and model.shape.V == 151_936


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        laptop(patch)
        for name, gpus in RUNS:
            (SNAPSHOTS / f"{name}-{gpus}.txt").write_text(said(name, gpus))

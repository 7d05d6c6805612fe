"""Flags, files of flags, and what is refused: exit code 2, one line that names the value."""

from dataclasses import fields

import pytest

from asyncopd import GROUPS, Config, plan
from tests.conftest import ROOT


def cli(*args):
    return Config.from_cli(["--task=toy", "--gpus=0", *args])


def test_default_then_file_then_flag(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-4\nsteps: 7\neval_teacher: true\n")
    cfg = cli(f"--config={path}", "--steps=9")
    assert (cfg.lr, cfg.steps, cfg.eval_teacher, cfg.batch) == (1e-4, 9, True, 256)


def test_every_shipped_config_parses():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path.name} opens with what it is"
        Config.from_cli([f"--config={path}", "--gpus=0"])


def test_without_a_gpu_and_without_flags_the_toy_runs():
    cfg = Config.from_cli(["--gpus=0"])
    assert cfg.task == "toy" and cfg.kl == "reverse" and cfg.estimator == "reverse_mc" and cfg.mc_samples == 4


def test_the_contracts_flags_and_defaults():
    cfg = Config.from_cli(["--gpus=0", "--task=x.jsonl", "--student=a", "--teacher=b"])
    assert (cfg.kl, cfg.mc_samples, cfg.schedule, cfg.max_ahead) == ("reverse", 4, "async", 4)
    assert cli("--kl=forward", "--top-k=8").estimator == "forward_topk"
    assert cli("--estimator=forward_topk").kl == "forward", "a row of the table overrides --kl"
    assert cli("--schedule=sync").max_ahead == 0


def test_the_plan_names_every_worker_once():
    assert plan(cli("--rollouts=2")) == {"rollout0": "cpu", "rollout1": "cpu", "teacher0": "cpu", "learner": "cpu"}


@pytest.mark.parametrize("what", ["file", "not a run"])
def test_a_folder_that_is_no_run_is_not_overwritten(what, tmp_path):
    from asyncopd import check_out
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out"):
        check_out(cli(f"--out={out}", "--overwrite"))


def test_an_unknown_key_in_a_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stepz: 3\n")
    with pytest.raises(ValueError, match="--stepz=3"):
        cli(f"--config={path}")


def test_help_has_every_flag_in_a_group_with_its_default(capsys):
    with pytest.raises(SystemExit):
        Config.from_cli(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')}" in said for f in fields(Config)) and "[16384]" in said
    assert [x for x in GROUPS.values() if f"\n{x}:\n" not in said] == []
    assert set(GROUPS) <= {f.name for f in fields(Config)} and "options:\n  -h" in said

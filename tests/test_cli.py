"""Flags, files of flags, and what is refused: exit code 2, one line that names the value."""

import json
import re
from dataclasses import asdict, replace

import pytest

from config import GROUPS, NESTED, Config, each_flag, flag_of
from control.plan import plan
from control.resolve import configure
from tests.conftest import ROOT


def cli(*args):
    return configure(["--task=toy", "--gpus=0", *args])


def test_default_then_file_then_flag(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-4\nsteps: 7\neval: {teacher: true}\n")
    cfg = cli(f"--config={path}", "--steps=9")
    assert (cfg.lr, cfg.steps, cfg.eval.teacher, cfg.batch) == (1e-4, 9, True, 256)


def test_every_shipped_config_parses():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path.name} opens with what it is"
        configure([f"--config={path}", "--gpus=0"])


def test_without_a_gpu_and_without_flags_the_toy_runs():
    cfg = configure(["--gpus=0"])
    assert cfg.task == "toy" and cfg.kl == "reverse" and cfg.estimator == "reverse_mc" and cfg.mc_samples == 4


def test_the_contracts_flags_and_defaults():
    cfg = configure(["--gpus=0", "--task=x.jsonl", "--student=a", "--teacher=b"])
    assert (cfg.kl, cfg.mc_samples, cfg.schedule, cfg.max_ahead) == ("reverse", 4, "async", 4)
    assert cli("--kl=forward", "--top-k=8").estimator == "forward_topk"
    assert cli("--estimator=forward_topk").kl == "forward", "a row of the table overrides --kl"
    assert cli("--schedule=sync").max_ahead == 0


def test_the_plan_names_every_worker_once():
    workers = plan(cli("--rollouts=2"))
    assert [(w.name, w.device) for w in workers] == [
        ("rollout0", "cpu"), ("rollout1", "cpu"), ("teacher0", "cpu"), ("learner", "cpu")]


@pytest.mark.parametrize("what", ["file", "not a run"])
def test_a_folder_that_is_no_run_is_not_overwritten(what, tmp_path):
    from record.run_folder import check_out, claim_folder
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="out"):
        cfg, claim = claim_folder(cli(f"--out={out}", "--overwrite"))
        with claim:
            check_out(cfg)
    assert what == "file" or [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_an_unknown_key_in_a_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stepz: 3\n")
    with pytest.raises(ValueError, match=r"c.yaml: stepz: no such flag \(did you mean steps\?\)"):
        cli(f"--config={path}")


def test_help_has_every_flag_in_a_group_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        configure(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name, _ in each_flag(Config()):
        assert re.search(rf"{flag_of(name)}\b", said), name
    for group in (*GROUPS, *NESTED):
        assert f"{group} options" in said, f"{group} is the title of a box"
    assert "default: 16384" in said


def test_help_shows_the_flags_of_an_extension_and_what_it_is(capsys):
    with pytest.raises(SystemExit):
        configure(["--extend=rock", "--help"])
    said = capsys.readouterr().out
    assert "rock options" in said and "--rock.weight FLOAT" in said and "Rock Tokens (arXiv 2605.09253)" in said


def test_extensions_may_be_switched_on_by_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("extend: rock\nrock: {k: 3, weight: 0}\n")
    cfg = cli(f"--config={path}", "--rock.weight=0.5")
    assert cfg.extensions == {"rock": dict(weight=0.5, k=3, every=20, types="")}
    assert cli().extensions == {}


def test_a_resumed_run_has_the_flags_of_its_log_below_those_of_the_command_line(tmp_path):
    first = cli("--extend=rock", "--rock.k=3", "--eval.n=7", "--data.suffix= -x", "--lr=1e-5", "--no-overwrite")
    (tmp_path / "log.jsonl").write_text(json.dumps({"type": "run", "config": asdict(first)}) + "\n")
    cfg = configure(["--resume", f"--out={tmp_path}", "--lr=2e-5"])
    assert cfg == replace(first, resume=True, out=str(tmp_path), lr=2e-5)


def test_there_are_few_flat_flags():
    flat = [name for name, _ in each_flag(Config()) if "." not in name]
    assert len(flat) <= 48, len(flat)


def test_the_papers_command_parses():
    cfg = configure(["--gpus", "8", "--kl", "reverse", "--mc-samples", "4", "--dry-run"])
    assert (cfg.gpus, cfg.kl, cfg.mc_samples) == (8, "reverse", 4)

"""Flags that cannot act, and lengths that nobody gave."""
from dataclasses import replace
from types import SimpleNamespace

import pytest

from asyncopd import main
from config import Config
from control.command_line import Given
from control.no_effect import NO_EFFECT, notes
from control.preflight import probe_tokens
from control.preflight_models import fit_lengths, positions
from control.resolve import configure_given
from tests.conftest import ROOT

TOY = ["--task=toy", "--gpus=0"]


def said(*flags) -> list[str]:
    return notes(*configure_given(flags))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_hold_no_flag_without_effect(path):
    assert said(f"--config={path}", "--dry-run") == []


def test_only_flags_that_somebody_wrote_count(tmp_path):
    assert said(*TOY, "--schedule=sync") == [], "the default of --max-ahead is silent"
    assert said("--gpus=0", "--steps=50") == [], "so is the file that runs where none is named"
    (tmp_path / "base.yaml").write_text("task: toy\nmc_samples: 8\n")
    (tmp_path / "c.yaml").write_text("config: base.yaml\nkl: forward\nbeta: 0.2\n")
    path = tmp_path / "c.yaml"
    assert said(f"--config={path}", "--gpus=0") == [f"beta 0.2 in {path} has no effect with forward_topk"]
    assert said(f"--config={path}", "--gpus", "0", "--mc-samples", "2") == [
        "--mc-samples 2 has no effect with forward_topk, which draws no candidates",
        f"beta 0.2 in {path} has no effect with forward_topk"]


def test_a_flag_of_the_command_line_overrides_a_file_and_this_is_said(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: toy\nkl: forward\n")
    cfg, given = configure_given([f"--config={path}", "--gpus=0", "--estimator=reverse_mc"])
    assert cfg.kl == "reverse"
    assert notes(cfg, given) == [f"kl forward in {path} has no effect with reverse_mc, which has the other KL"]
    path.write_text("task: toy\nestimator: reverse_mc\n")
    with pytest.raises(ValueError, match="--kl forward: contradicts --estimator reverse_mc"):
        configure_given([f"--config={path}", "--gpus=0", "--kl=forward"])


def test_a_dry_run_says_it_too(capsys):
    assert main([*TOY, "--dry-run", "--beta=0.2"]) == 0
    assert "\n  --beta 0.2 has no effect with reverse_mc\n" in capsys.readouterr().out


def test_every_rule_names_a_flag():
    from config import each_flag
    assert {rule.flag for rule in NO_EFFECT} <= {name for name, _ in each_flag(Config())}


@pytest.mark.parametrize("given, prompt, response", [
    ({}, 128, 384), ({"max_prompt": 100}, 100, 412), ({"max_response": 500}, 12, 500)])
def test_lengths_that_are_not_given_follow_from_the_models(given, prompt, response):
    cfg, said = fit_lengths(Config(**given), Given(line=given), {"--student S": 512, "--teacher T": 4096})
    assert (cfg.max_prompt, cfg.max_response) == (prompt, response)
    assert said == [f"--max-prompt {prompt} and --max-response {response}: the models take 512 tokens of both together"]


def test_a_teacher_in_vllm_needs_a_position_for_itself():
    models = SimpleNamespace(max_position_embeddings=1024), SimpleNamespace(max_position_embeddings=512)
    cfg = Config(student="S", teacher="T", engine="vllm", teacher_engine="vllm")
    room = positions(cfg, *models)
    assert room == {"--student S": 1024, "--teacher T in vLLM": 511}
    fitted, _ = fit_lengths(cfg, Given(), room)
    assert fitted.max_prompt + fitted.max_response == 511
    assert positions(replace(cfg, teacher_engine="hf"), *models) == {"--student S": 1024, "--teacher T": 512}
    assert positions(cfg, SimpleNamespace(), models[1]) == {"--student S": None, "--teacher T in vLLM": 511}


def test_the_probe_leaves_room_for_the_token_that_vllm_draws_after_it():
    prompts = [[3] * 40, [4] * 40]
    for limit in (3, 50, 64, 65):
        assert len(probe_tokens(prompts, limit)) == min(64, limit - 1)
    assert probe_tokens(prompts, 1000) == [3] * 40 + [4] * 24
    assert len(probe_tokens(prompts, 2)) == 2, "a single token has no log-prob"


def test_lengths_that_fit_stay_and_lengths_that_were_given_are_refused():
    assert fit_lengths(Config(), Given(), {"--student S": None, "--teacher T": 40_000}) == (Config(), [])
    for given in ({"max_prompt": 400, "max_response": 400}, {"max_prompt": 512}, {"max_response": 600}):
        with pytest.raises(ValueError, match="more than the 512 tokens of --student S"):
            fit_lengths(Config(**given), Given(below=given), {"--student S": 512, "--teacher T": None})

"""--dtype bfloat16 on a CPU: what runs on a GPU by default, from the engines to the folder of the trained student."""
import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import compute_dtype
from control import plan
from control.preflight_memory import check_disk
from control.resolve import configure
from engines.hf import HFEngine
from engines.table import engine_class
from learner import Learner
from models.footprint import Shape
from models.head import sequence_logp
from models.loading import load_model
from models.sharding import compute_in
from tests.runs import lines, run, steps
from tests.test_supports import config as full_config
from tests.test_supports import filled
from tests.test_supports import models as folders  # noqa: F401

PROMPTS = [[3, 4, 13, 5, 14], [9, 9, 13, 3, 4, 14], [5, 14]]


# -- the flag --------------------------------------------------------------------------------------

@pytest.mark.parametrize("gpus, dtype, found", [
    (0, "auto", "float32"), (8, "auto", "bfloat16"), (0, "bfloat16", "bfloat16"), (8, "float32", "float32")])
def test_the_dtype_follows_the_gpus_unless_it_is_given(gpus, dtype, found):
    cfg = configure([f"--gpus={gpus}", "--task=toy", f"--dtype={dtype}", "--dry-run"])
    assert cfg.dtype == found and compute_dtype(cfg) == getattr(torch, found)


def test_memory_and_disk_are_those_of_the_dtype_and_not_of_the_device(tmp_path, monkeypatch):
    shape = Shape(P=10 ** 9, V=50_000, L=10, H=1000, I=4000, A=1000, K=500)

    def needs(dtype: str) -> dict:
        cfg = configure(["--gpus=0", "--task=toy", f"--dtype={dtype}", "--engine=hf"])
        return cfg, {n.worker: n.parts for n in plan.memory(cfg, shape, shape)}
    (_, full), (cfg, half) = needs("float32"), needs("bfloat16")
    for worker, part in (("rollout0", "weights"), ("rollout0", "cache"), ("teacher0", "weights"),
                         ("teacher0", "activations"), ("shared", "weights")):
        assert half[worker][part] == pytest.approx(full[worker][part] / 2), (worker, part)
    assert half["learner"]["gradients"] == full["learner"]["gradients"], "float32, as the optimizer's moments are"
    assert half["learner"]["activations"] < full["learner"]["activations"]
    assert half["teacher0"]["logits"] * 1e9 == 1024 * 50_000 * 10 + 4 * 50_000 * 1000, "a CPU's product is float32"
    room = 1e9 * (2 + 2 * (2 + 12))                # the student, and two checkpoints with float32 weights
    cfg = replace(cfg, save_every=1, steps=1, out=str(tmp_path))
    monkeypatch.setattr("control.preflight_memory.free_bytes", lambda cfg: room)
    with pytest.raises(ValueError, match="30.0 GB for the student"):
        check_disk(cfg, shape, plan.Additions())
    monkeypatch.setattr("control.preflight_memory.free_bytes", lambda cfg: room + 1)
    check_disk(cfg, shape, plan.Additions())


# -- engines and learner ---------------------------------------------------------------------------

def draw_all(engine) -> dict:
    for key, prompt in enumerate(PROMPTS):
        engine.add(key, prompt, 20, uid=key, position=0)
    drawn = {}
    while len(drawn) < len(PROMPTS):
        drawn |= engine.take(engine.step())
    return drawn


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_an_engine_in_bf16_holds_what_was_published_and_records_what_it_drew(kind, models, monkeypatch):
    """It does not round its logits either: near 8 they would be multiples of 1/32."""
    if kind == "vllm":
        pytest.importorskip("vllm")
    cfg = configure(["--task=toy", f"--student={models['student']}", f"--teacher={models['teacher']}", "--gpus=0",
                     "--dtype=bfloat16", f"--engine={kind}", "--max-prompt=16", "--max-response=24", "--max-running=4"])
    engine = engine_class(kind)(cfg, "cpu", torch.bfloat16)
    model = load_model(models["student"], "cpu", torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    engine.load({name: p.detach() for name, p in model.named_parameters()}, 1)
    torch.testing.assert_close(engine.logp(PROMPTS[1]), sequence_logp(model, PROMPTS[1]), rtol=0, atol=0.02)
    module = import_module(type(engine).__module__)
    rounded = []

    def draw_rows(logits, *args, draw=module.draw_rows):
        rounded.append((logits == logits.bfloat16()).float().mean().item())
        return draw(logits, *args)
    monkeypatch.setattr(module, "draw_rows", draw_rows)
    for key, drawn in draw_all(engine).items():
        want = sequence_logp(model, PROMPTS[key] + drawn.tokens.tolist())[len(PROMPTS[key]) - 1:]
        assert drawn.logmu.dtype == torch.float32
        torch.testing.assert_close(drawn.logmu, want, rtol=0, atol=0.02)
    assert rounded and max(rounded) < 0.1


def bf16_learner(folders, **flags) -> tuple[Learner, list]:       # noqa: F811
    cfg = full_config(folders, "reverse_mc", dtype="bfloat16", **flags)
    return Learner(cfg, "cpu", torch.bfloat16), filled(cfg, folders)[1]


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
def test_the_learner_computes_in_bf16_and_adds_up_in_float32(folders, flags):     # noqa: F811
    learner, segments = bf16_learner(folders, **flags)
    exact = Learner(full_config(folders, "reverse_mc", **flags), "cpu", torch.float32)
    for made in (learner, exact):
        rows = made.student.rows(segments)
        assert rows.dtype == made.student.dtype, "what passes between layers too"
        made.backward(segments, sum(map(len, segments)))
    for (name, p), (_, q) in zip(learner.student.trained(), exact.student.trained()):
        assert p.dtype == p.grad.dtype == torch.float32, name
        if q.grad.norm() > 0:                      # the first matrix of a new adapter has none
            assert 0 < (p.grad - q.grad).norm() < 0.1 * q.grad.norm(), name


def test_a_module_has_its_float32_weights_back_even_after_a_failure():
    layer = torch.nn.Linear(4, 3)
    compute_in(layer, torch.bfloat16)
    assert layer(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 5).bfloat16())
    assert "weight" not in vars(layer) and layer.weight is layer.get_parameter("weight")


def test_at_lag_0_the_learner_repeats_the_log_probs_of_the_engine(folders):       # noqa: F811
    """Both round in the same places. A residual stream in float32, as under autocast alone, would be 5 times as far."""
    learner, _ = bf16_learner(folders)
    engine = HFEngine(replace(learner.cfg, max_response=20), "cpu", torch.bfloat16)
    gaps = []
    for key, drawn in draw_all(engine).items():
        logp = learner.student.probe_logp(PROMPTS[key] + drawn.tokens.tolist())
        gaps.append(logp[len(PROMPTS[key]) - 1:] - drawn.logmu)
    assert torch.cat(gaps).abs().max() < 0.02 and torch.cat(gaps).std() < 0.005


# -- whole runs ------------------------------------------------------------------------------------

@pytest.mark.parametrize("learners", [1, 2])
def test_a_run_in_bf16_from_the_engine_to_the_trained_student(flags, learners):
    """Three steps, resumed for two more: what is published, saved and exported is bf16, what goes on is float32."""
    flags = flags | dict(steps=3, dtype="bfloat16", learners=learners, schedule="sync", save_every=2)
    done = run(flags)
    assert done.returncode == 0, done.stderr
    out = Path(flags["out"])
    saved = load_file(out / "checkpoints" / "step-2" / "train.safetensors")
    assert {x.dtype for name, x in saved.items() if name.endswith(("/master", "/exp_avg"))} == {torch.float32}
    for folder in (out / "student", out / "checkpoints" / "step-2"):
        assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16", "as readers of it expect"
    numbers = sum(x.numel() for x in load_file(out / "student" / "model.safetensors").values())
    assert all(s["push_bytes"] == 2 * numbers and s["lag_max"] == 0 for s in steps(flags))
    assert all(abs(math.log(s["w_max"])) < 0.05 and 0 < s["engine_gap_max"] < 0.05 for s in steps(flags))
    assert lines(flags)[0]["config"]["dtype"] == "bfloat16"
    assert "bfloat16, learnt in float32" in (out / "student" / "README.md").read_text()
    done = run(dict(resume=True, out=flags["out"], steps=5))
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in steps(flags)][-3:] == [3, 4, 5]


def test_vllm_runs_in_bf16_too(flags):
    pytest.importorskip("vllm")
    done = run(flags | dict(steps=3, dtype="bfloat16", engine="vllm", schedule="sync", eval__n=0))
    assert done.returncode == 0, done.stderr
    assert all(abs(math.log(s["w_max"])) < 0.1 and 0 < s["engine_gap_max"] < 0.1 for s in steps(flags))

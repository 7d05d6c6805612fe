"""LoRA: what is trained, what is published and saved, and that a run with it learns."""
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from control.resolve import configure
from learner import Learner
from models.footprint import Shape
from models.loading import load_model
from models.lora import Merged, save_adapter, with_lora
from tests.conftest import save_tiny
from tests.runs import run, steps
from tests.test_learner import ready

peft = pytest.importorskip("peft")
TOKENS = torch.tensor([[3, 4, 5, 6, 7]])


def learner_after(config, student: str, updates: int, **flags) -> Learner:
    learner = Learner(config(student=student, lora_rank=3, lr=0.01, **flags), "cpu", torch.float32)
    for version in range(updates):
        learner.step(ready([5, 1, 7, 3])[1], version)
    return learner


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["student", "tied"])
def test_only_adapters_learn_and_at_first_they_change_nothing(config, models, name):
    plain, learner = load_model(models[name], "cpu", torch.float32), learner_after(config, models[name], 0)
    assert torch.equal(logits(learner.student.model), logits(plain))
    learner = learner_after(config, models[name], 2)
    trained = {n for n, p in learner.student.model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in learner.student.model.parameters() if p.requires_grad)
    assert count == Shape.of(plain.config).adapters(3), "what the memory plan counts"
    assert len(trained) == 2 * 7 and all(".lora_" in n for n in trained), "the seven linear layers of the one layer"
    assert sum(len(g["params"]) for g in learner.optimizer.param_groups) == len(trained)
    before = dict(plain.named_parameters())
    kept = {n.replace(".base_layer.", "."): p for n, p in learner.student.model.named_parameters() if n not in trained}
    assert kept.keys() == before.keys() and all(torch.equal(p, before[n]) for n, p in kept.items())
    assert (logits(learner.student.model) - logits(plain)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["student", "tied"])
def test_what_is_published_and_saved_is_what_peft_merges(config, models, name, tmp_path):
    learner = learner_after(config, models[name], 3)
    learner.save(tmp_path / "out")
    again = peft.PeftModel.from_pretrained(load_model(models[name], "cpu", torch.float32), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(again), logits(learner.student.model))
    theirs, ours = dict(again.merge_and_unload().named_parameters()), Merged(learner.student.model)
    saved = load_model(str(tmp_path / "out"), "cpu", torch.float32)
    assert theirs.keys() == ours.keys() == dict(saved.named_parameters()).keys()
    for n, p in saved.named_parameters():
        torch.testing.assert_close(ours[n], theirs[n], rtol=0, atol=1e-7)
        assert torch.equal(p, ours[n])
    torch.testing.assert_close(logits(saved), logits(learner.student.model), rtol=0, atol=1e-5)


def test_a_resumed_learner_takes_the_same_next_step(config, models, tmp_path):
    learner = learner_after(config, models["student"], 2)
    learner.checkpoint(tmp_path)
    resumed = Learner(learner.cfg, "cpu", torch.float32, checkpoint=str(tmp_path))
    first, second = (x.step(ready([4, 6])[1], 2) for x in (learner, resumed))
    assert first.metrics["loss"] == second.metrics["loss"] and resumed.updates == 3
    for (n, a), (_, b) in zip(learner.student.model.named_parameters(), resumed.student.model.named_parameters()):
        assert torch.equal(a, b), n


def test_gradient_checkpointing_changes_nothing(config, models):
    """Not even below the first layer, whose input has no gradient: the embedding is frozen."""
    cfg = config(student=models["student"], lora_rank=3, lr=0.01)
    plain, again = (Learner(replace(cfg, gradient_checkpointing=x), "cpu", torch.float32) for x in (False, True))
    for learner in (plain, again):
        learner.step(ready([5, 1, 7, 3])[1], 0)
    for (n, a), (_, b) in zip(plain.student.model.named_parameters(), again.student.model.named_parameters()):
        torch.testing.assert_close(a, b, msg=n)
    moved = [p for n, p in again.student.model.named_parameters() if "lora_B" in n]
    assert all(p.abs().max() > 0 for p in moved), "each has moved from 0"


def test_merging_is_done_in_float32(models, tmp_path):
    """In bf16 an update of this size would be lost."""
    before = dict(load_model(models["student"], "cpu", torch.float32).named_parameters())
    model = with_lora(load_model(models["student"], "cpu", torch.float32), 2, seed=0)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.fill_(1e-6)
    moved = {n: (p - before[n]).abs().max() for n, p in Merged(model).items() if not torch.equal(p, before[n])}
    assert len(moved) == 7 and all(0 < x < 1e-5 for x in moved.values())
    save_adapter(model, models["student"], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_run_lowers_the_kl_and_every_push_arrives(flags, tmp_path):
    """The teacher is the student with other linear layers: the head, which is not trained, suits both."""
    flags |= dict(student=save_tiny(tmp_path / "student", seed=0, sharp=8.0), teacher=str(tmp_path / "teacher"))
    teacher, g = load_model(flags["student"], "cpu", torch.float32), torch.Generator().manual_seed(1)
    for layer in teacher.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data += 0.1 * torch.randn(layer.weight.shape, generator=g)
    teacher.save_pretrained(flags["teacher"])
    AutoTokenizer.from_pretrained(flags["student"]).save_pretrained(flags["teacher"])
    done = run(flags | dict(steps=30, lr=0.01, lora_rank=8, batch=16, schedule="sync"))
    assert done.returncode == 0, done.stderr
    kl = [s["kl"] for s in steps(flags)]
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5]), kl
    assert all(s["engine_gap_max"] <= 1e-4 for s in steps(flags))
    base = load_model(flags["student"], "cpu", torch.float32)
    peft.PeftModel.from_pretrained(base, f"{flags['out']}/student/adapter")


@pytest.mark.parametrize("args, named", [(["--lora-rank=-1"], "--lora-rank -1"),
                                         (["--lora-rank=4", "--learners=2"], "--lora-rank 4: with one learner")])
def test_a_rank_that_cannot_be_is_refused(args, named):
    with pytest.raises(ValueError, match=named):
        configure(["--task=toy", "--gpus=0", *args])

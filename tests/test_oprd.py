"""OPRD: which states are compared, what they cost, the gradient, the fit before the run, and runs with it."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import asyncopd
from cache import Segment, Slots
from config import Config
from control import plan
from control.command_line import as_flag
from control.memory import allocate
from control.preflight import prepare, prepare_one
from control.resolve import configure
from extension import Extensions, ModelPair, Step, prepared_file
from extensions import oprd
from extensions.oprd import OPRD, STATES, StateProjection, Sums, layer_pairs
from learner import Learner, rows_in_use, summarize
from models.footprint import Shape
from models.loading import load_model, text_config
from models.sharding import Ranks
from teacher import HFTeacher
from tests.conftest import ROOT, save_tiny
from tests.runs import alive, children_of, command, complete, in_two, run, start_and_wait_for, steps
from transport.process import alone

LAYERS, WIDTH, T = 3, 64, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student of three layers; teachers: its continuation, another seed, five layers, another width, a tied head."""
    root = tmp_path_factory.mktemp("oprd")
    student = save_tiny(root / "student", seed=0, layers=LAYERS, sharp=4.0)
    model, g = load_model(student, "cpu", torch.float32), torch.Generator().manual_seed(5)
    for p in model.parameters():
        p.data += 0.2 * p.data.std() * torch.randn(p.shape, generator=g)
    from transformers import AutoTokenizer
    model.save_pretrained(root / "continued")
    AutoTokenizer.from_pretrained(student).save_pretrained(root / "continued")
    save_tiny(root / "other", seed=7, layers=LAYERS)
    save_tiny(root / "deep", seed=8, layers=5)
    save_tiny(root / "tied", seed=9, layers=LAYERS, tied=True)
    from data import toy
    tokenizer = toy.toy_tokenizer()
    toy.small_model(tokenizer, layers=2, hidden=32, seed=3).save_pretrained(root / "narrow")
    tokenizer.save_pretrained(root / "narrow")
    return root


@pytest.fixture
def config(folders, tmp_path):
    """config(oprd__rank=5) is --oprd.rank=5; OPRD alone, unless an estimator is given; extend="" leaves OPRD out."""
    def make(teacher="continued", **flags):
        given = dict(task="toy", student=folders / "student", teacher=folders / teacher, gpus=0, engine="hf", batch=4,
                     max_prompt=8, max_response=T, max_running=64, lr=1e-3, estimator="none", extend="oprd",
                     out=str(tmp_path / "run")) | flags
        return configure([as_flag(name.replace("__", "."), value) for name, value in given.items()])
    return make


def extension(cfg) -> OPRD:
    made, = Extensions.load(cfg)
    return made


def pair_of(cfg) -> ModelPair:
    """What the parent knows of the two models."""
    configs = text_config(str(cfg.student)), text_config(str(cfg.teacher))
    return ModelPair(*map(Shape.of, configs), *configs)


def fitted(cfg):
    """What a run does before its workers start."""
    prompts = [[3 + i % 10, 13, 3 + i // 10] for i in range(100)]
    Path(cfg.out).mkdir(exist_ok=True)
    prepared_file(cfg, "oprd").write_bytes(prepare_one(cfg, ("oprd", prompts), "cpu", torch.float32))
    return cfg


def scored(cfg, cut=0):
    """Slots as the learner gets them; the last response goes on from `cut` tokens."""
    extra = {name: (t.shape, t.dtype) for name, t in Extensions.load(cfg).slot_tensors(pair_of(cfg)).items()}
    slots = Slots(4, 8, T, 4, extra=extra)
    for x in slots.extra.values():
        x.fill_(torch.nan)                                                 # nobody may read what nobody has written
    g = torch.Generator().manual_seed(1)
    for s, (prompt, before, n) in enumerate([(3, 0, 5), (2, 0, 1), (8, 0, 7), (4, cut, 3)]):
        slots.open(s, s, torch.randint(3, 17, (prompt + before,), generator=g), prompt, 0)
        ids = torch.randint(3, 17, (n, 4), generator=g)
        logpi = -3 * torch.rand(n, 4, generator=g)
        slots.append(s, ids[:, 0], ids, logpi, logpi[:, 0], torch.zeros(n))
    HFTeacher(cfg, "cpu", torch.float32).score([slots.read(s) for s in range(4)], slots)
    return slots, [slots.read(s) for s in range(4)]


def gradient(cfg, segments, size=4, ranks=None):
    """{parameter: gradient} of one train batch, and its metrics."""
    learner, measured = Learner(cfg, "cpu", torch.float32, ranks=ranks), []
    count, used = sum(map(len, segments)), rows_in_use(segments)
    for i in range(0, len(segments), size):
        measured.append(learner.backward(segments[i:i + size], count, used))
    metrics = summarize(measured)
    for made in learner.extensions:
        metrics |= made.after_step(Step(segments, measured, 0)).metrics
    return {name: p.grad for name, p in learner.student.model.named_parameters()}, metrics


def naive(cfg, segments, shift=1):
    """One sequence at a time, the formula as in the paper. `shift` is 1 where a row predicts its token."""
    models = [load_model(m, "cpu", torch.float32) for m in (cfg.student, cfg.teacher)]
    total, n, made = 0.0, 0, extension(cfg)
    for s in segments:
        ours, theirs = (m.base_model(input_ids=s.tokens[None].long(), output_hidden_states=True).hidden_states
                        for m in models)
        layers = layer_pairs(made.flags.layers, len(ours) - 1, len(theirs) - 1)
        for t in range(len(s))[made.compared(s)]:
            at = min(s.start + t - shift, len(s.tokens) - 1)
            each = [(ours[i + 1][0, at] - theirs[j + 1][0, at].detach().bfloat16().float()).square().mean()
                    for i, j in layers]
            total, n = total + sum(each) / len(each), n + 1
    (total / n).backward()
    return {name: p.grad for name, p in models[0].named_parameters()}, (total / n).item()


def close(got, want, tolerance=1e-4):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] is None) == (want[name] is None), name
        assert want[name] is None or (got[name] - want[name]).norm() <= tolerance * want[name].norm(), name


# -- what is compared ------------------------------------------------------------------------------

@pytest.mark.parametrize("which, S, T, want", [
    ("all", 3, 3, [(0, 0), (1, 1), (2, 2)]), ("all", 3, 5, [(0, 0), (1, 2), (2, 4)]), ("all", 1, 4, [(0, 3)]),
    ("even", 4, 4, [(0, 0), (2, 2)]), ("odd", 4, 7, [(1, 2), (3, 6)]), ("last", 28, 36, [(27, 35)]),
    ("all", 5, 3, [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)]), ("odd", 1, 1, [])])
def test_layers_are_paired_by_their_depth(which, S, T, want):
    assert layer_pairs(which, S, T) == want


@pytest.mark.parametrize("positions, tokens, before, want", [
    ("last", 4, 0, [6, 7, 8, 9]), ("last", 40, 0, list(range(10))), ("last", 4, 7, [6, 7, 8, 9]),
    ("first", 4, 0, [0, 1, 2, 3]), ("first", 4, 3, [0]), ("first", 4, 4, []), ("first", 4, 9, []),
    ("all", 4, 3, list(range(10)))])
def test_positions_after_a_cut_too(positions, tokens, before, want):
    """`before`: tokens of the response that were trained before it was cut."""
    made = OPRD("oprd", Config(), OPRD.Flags(positions=positions, tokens=tokens))
    blank = torch.empty(10, 0)
    s = Segment(slot=0, tokens=torch.zeros(3 + before + 10), prompt=3, start=3 + before, version=blank, ids=blank,
                logpi=blank, logmu=blank, logq=blank)
    assert list(range(10)[made.compared(s)]) == want


@pytest.mark.parametrize("flags", [
    dict(), dict(oprd__layers="even"), dict(oprd__layers="odd"), dict(oprd__layers="last"),
    dict(oprd__positions="first", oprd__tokens=4), dict(oprd__positions="last", oprd__tokens=4), dict(teacher="deep"),
    dict(oprd__positions="all", oprd__tokens=1)], ids=str)
@pytest.mark.parametrize("cut", [0, 2, 5])
def test_a_batch_is_what_a_naive_loop_makes_of_it(config, flags, cut):
    cfg = config(oprd__head=False, **flags)
    slots, segments = scored(cfg, cut)
    made = extension(cfg)
    assert [len(s.extra[STATES]) for s in segments] == [len(range(len(s))[made.compared(s)]) for s in segments]
    got, metrics = gradient(cfg, segments)
    want, distance = naive(cfg, segments)
    assert metrics["oprd"] == pytest.approx(distance, rel=1e-4) and metrics["loss"] == 0
    close(got, want)


@pytest.mark.parametrize("late", [False, True])
def test_states_that_are_one_position_late_would_be_seen(config, monkeypatch, late):
    """The check above, fed with a teacher whose rows are those of the emitted tokens."""
    def shifted(hidden, segments):
        return torch.cat([hidden[b, s.start:s.start + len(s)] for b, s in enumerate(segments)])
    cfg = config(oprd__head=False)
    if late:
        monkeypatch.setattr("teacher.response_rows", shifted)
    _, segments = scored(cfg)
    monkeypatch.undo()
    got, metrics = gradient(cfg, segments)
    want, distance = naive(cfg, segments)
    assert (metrics["oprd"] == pytest.approx(distance, rel=1e-3)) != late
    assert naive(cfg, segments, shift=0)[1] != pytest.approx(distance, rel=1e-3), "both late: another number again"


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("positions, P", [("last", 4), ("first", 4), ("all", T)])
def test_a_slot_costs_two_bytes_per_rank_layer_and_position(config, rank, positions, P):
    cfg = config(oprd__rank=rank, oprd__positions=positions, oprd__tokens=4, oprd__layers="even", max_ahead=2)
    models = pair_of(cfg)
    tensor, = extension(cfg).slot_tensors(models).values()
    slots, plain = Slots(12, 8, T, 1, extra={STATES: (tensor.shape, tensor.dtype)}), Slots(12, 8, T, 1)
    states = slots.extra[STATES]
    assert slots.bytes - plain.bytes - slots.used[STATES].nbytes == states.nbytes == 12 * 2 * (rank or WIDTH) * 2 * P
    off = dataclasses.replace(cfg, extend="", extensions={})
    gb = []
    for c in (cfg, off):
        added = plan.additions(c, Extensions.load(c), models)
        needs = plan.memory(c, models.student, models.teacher, added=added)
        gb.append(next(n for n in needs if n.worker == "shared").parts["cache"])
    assert gb[0] - gb[1] == pytest.approx(states.nbytes / 1e9), "(2 + 1) batches of 4"
    cfg, job = prepare(cfg)
    assert allocate(cfg, job).slots.extra[STATES].shape == (12, *tensor.shape)


# -- the gradient ----------------------------------------------------------------------------------

def test_the_head_learns_from_a_divergence_and_from_nothing_else(config):
    _, segments = scored(config())
    alone, _ = gradient(config(), segments)
    assert alone["lm_head.weight"] is None and sum(g is not None for g in alone.values()) == len(alone) - 1
    both, _ = gradient(config(estimator="reverse_mc", oprd__weight=3.0), segments)
    kl, m = gradient(config(estimator="reverse_mc", extend=""), segments)
    # the head of the first two is the teacher's: give the divergence alone the same
    plain, _ = gradient(config(estimator="reverse_mc", oprd__weight=3.0, oprd__head=False), segments)
    assert torch.equal(plain["lm_head.weight"], kl["lm_head.weight"]) and kl["lm_head.weight"].any()
    assert "oprd" not in m
    for name in kl.keys() - {"lm_head.weight"}:
        torch.testing.assert_close(plain[name], kl[name] + 3 * alone[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(both["lm_head.weight"], kl["lm_head.weight"]), "another head, another gradient"


def test_the_head_stays_what_it_is_to_the_bit(config):
    learner = Learner(config(weight_decay=0.5), "cpu", torch.float32)
    before = {n: p.clone() for n, p in learner.student.model.named_parameters()}
    learner.step(scored(config())[1], version=0)
    same = {n for n, p in learner.student.model.named_parameters() if torch.equal(p, before[n])}
    assert same == {"lm_head.weight"}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("estimator", ["none", "reverse_mc"])
def test_micro_batches_change_nothing(config, size, estimator):
    cfg = config(estimator=estimator, oprd__weight=2.0, oprd__positions="first", oprd__tokens=4)
    _, segments = scored(cfg, cut=2)
    (want, m), (got, n) = gradient(cfg, segments), gradient(cfg, segments, size)
    close(got, want, 1e-5)
    assert m == pytest.approx(n, rel=1e-5)


def test_a_step_divides_by_the_compared_positions_of_its_own_minibatch(config):
    """In minibatches of unequal size, and in one that compares nothing."""
    cfg = config(oprd__positions="first", oprd__tokens=2, minibatches=2, micro_tokens=1, clip=1e9)
    _, segments = scored(cfg, cut=2)
    norms = [torch.stack([g.norm() for g in gradient(cfg, segments[i:i + 2])[0].values() if g is not None]).norm()
             for i in (0, 2)]
    learner = Learner(dataclasses.replace(cfg, minibatches=1), "cpu", torch.float32)
    assert learner.step(segments[:2], 0).metrics["grad_norm"] == pytest.approx(norms[0].item(), rel=1e-4)
    learner = Learner(dataclasses.replace(cfg, minibatches=1), "cpu", torch.float32)
    trained = learner.step(segments[3:], 0)
    metrics = trained.metrics
    assert len(segments[3].extra[STATES]) == metrics["grad_norm"] == 0 and not trained.skipped
    assert metrics["oprd"] != metrics["oprd"], "the mean of nothing: nan, null in the log"


def test_lag_and_weights_do_not_enter(config):
    cfg = config()
    slots, segments = scored(cfg)
    want, m = gradient(cfg, segments)
    slots.version -= 50
    slots.logpi -= 5 * torch.rand(slots.logpi.shape)
    slots.logmu -= 5 * torch.rand(slots.logmu.shape)
    got, n = gradient(cfg, segments)
    assert all(torch.equal(got[name], g) for name, g in want.items() if g is not None)
    assert m["oprd"] == n["oprd"] and m["w_max"] != n["w_max"]


@pytest.mark.parametrize("flags", [dict(gradient_checkpointing=True), dict(lora_rank=3),
                                   dict(lora_rank=3, gradient_checkpointing=True)], ids=str)
def test_layers_that_are_computed_again_and_adapters(config, flags):
    if "lora_rank" in flags:
        pytest.importorskip("peft")
    cfg = config(oprd__head=False, **flags)
    _, segments = scored(cfg)
    plain = dataclasses.replace(cfg, gradient_checkpointing=False)
    (got, m), (want, _) = gradient(cfg, segments), gradient(plain, segments)
    close(got, want, 1e-6)
    assert m["oprd"] == pytest.approx(naive(cfg, segments)[1], rel=1e-4)
    assert all((g is not None) == (("lora_" in name) if cfg.lora_rank else name != "lm_head.weight")
               for name, g in got.items())


def one_of_two(rank, cfgs, segments, root):
    torch.set_num_threads(1)
    ranks, found = Ranks(rank, 2, str(root / "meeting")), []
    for cfg in cfgs:
        learner = Learner(cfg, "cpu", torch.float32, ranks=ranks)
        for group in ranks.groups(segments, cfg.micro_tokens):
            learner.backward(group, sum(map(len, segments)), rows_in_use(segments))
        parameters = learner.student.model.named_parameters()
        grads = ranks.collect((n, p.grad) for n, p in parameters if p.grad is not None)
        learner.optimizer.zero_grad()
        learner.extensions[0].distances.clear()
        found.append((grads, learner.step(segments, 0).metrics))
    torch.save(found, root / f"{rank}.pt")
    ranks.leave()


def test_two_learners_have_the_gradient_of_one(config, tmp_path):
    """Three segments, one at a time: the second learner has nothing left when the first takes its last."""
    cfgs = [config(estimator=e, oprd__weight=2.0, oprd__layers="even", micro_tokens=1, learners=2, clip=1e9, **more)
            for e, more in (("none", {}), ("reverse_mc", {}), ("none", dict(gradient_checkpointing=True)))]
    segments = scored(cfgs[0])[1][:3]
    in_two(one_of_two, cfgs, segments, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for i, cfg in enumerate(cfgs):
        want, _ = gradient(cfg, segments, size=1)
        close(both[0][i][0], {n: g for n, g in want.items() if g is not None}, 1e-5)
        metrics = Learner(cfg, "cpu", torch.float32).step(segments, 0).metrics
        assert both[0][i][1] == both[1][i][1]
        for name, value in metrics.items():
            assert both[0][i][1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_nan_among_the_states_is_not_learnt_from_and_named(config):
    slots, segments = scored(config())
    slots.extra[STATES][2, 1, 5] = torch.nan
    learner = Learner(config(), "cpu", torch.float32)
    trained = learner.step(segments, 0)
    skipped, = trained.skipped
    assert skipped["slots"] == [2] and skipped["why"].startswith("oprd_states: ")
    assert trained.metrics["oprd"] != trained.metrics["oprd"]
    slots.extra[STATES][2, 1, 5] = 0
    assert learner.step(segments, 1).metrics["oprd"] > 0


def test_a_step_of_which_one_update_was_not_made_has_no_distance(config):
    slots, segments = scored(config())
    slots.extra[STATES][2, 1, 5] = torch.nan
    trained = Learner(config(minibatches=2), "cpu", torch.float32).step(segments, 0)
    assert len(trained.skipped) == 1 and trained.metrics["oprd"] != trained.metrics["oprd"], "as its kl"
    assert trained.metrics["kl"] != trained.metrics["kl"]


# -- projections, and what is found before the run -------------------------------------------------

def test_a_projection_of_full_rank_is_the_raw_distance(config):
    raw = config()
    want, m = gradient(raw, scored(raw)[1])
    cfg = fitted(config(oprd__rank=WIDTH))
    got, n = gradient(cfg, scored(cfg)[1])
    assert n["oprd"] == pytest.approx(m["oprd"], rel=1e-2), "to the bfloat16 of the cache"
    close(got, want, 2e-2)
    few = fitted(config(oprd__rank=WIDTH // 2))
    assert 0 < gradient(few, scored(few)[1])[1]["oprd"] < 0.9 * m["oprd"]


def test_a_projection_keeps_the_directions_in_which_the_teacher_varies():
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    h = (torch.randn(20_000, 6, generator=g) * spread).double() @ turn.T + 7
    sums = Sums(3, bridge=False)
    for part in h.split(1000):
        sums.add(torch.zeros(len(part), 6), part)
    found = sums.solve()
    overlap = found["teacher.basis"].T @ turn[:, :3]
    torch.testing.assert_close(overlap.abs(), torch.eye(3).double(), rtol=0, atol=0.02)
    assert torch.equal(found["student.basis"], found["teacher.basis"]) and (found["teacher.mean"] - 7).abs().max() < 0.2


def test_a_bridge_recovers_a_linear_map(tmp_path, config, folders):
    """Student states that are a linear image of the teacher's: no distance is left, in states it was not fitted on."""
    cfg = config(teacher="narrow", oprd__bridge=True, oprd__rank=5, oprd__layers="last")
    g, sums = torch.Generator().manual_seed(0), Sums(5, bridge=True)
    image, shift = torch.randn(32, WIDTH, generator=g, dtype=torch.float64), torch.randn(WIDTH, generator=g)
    for _ in range(20):
        theirs = torch.randn(500, 32, generator=g, dtype=torch.float64) * torch.linspace(0.2, 4, 32) + 3
        sums.add(theirs @ image + shift, theirs)
    Path(cfg.out).mkdir()
    save_file({name: x[None].float().contiguous() for name, x in sums.solve().items()}, prepared_file(cfg, "oprd"))
    ours, his = extension(cfg), extension(cfg).load_projection("teacher")
    ours.projection = ours.load_projection("student")
    assert isinstance(his, StateProjection)
    theirs = torch.randn(50, 32, generator=g, dtype=torch.float64) * torch.linspace(0.2, 4, 32) + 3
    cached = his.show(0, theirs)
    assert ours.distance([theirs @ image + shift], cached).max() < 1e-6
    assert ours.distance([theirs @ image + 20 * shift], cached).mean() > 1e-3, "the intercept matters"
    assert ours.distance([torch.randn(50, WIDTH, generator=g)], cached).mean() > 0.1, "and not whatever it is given"


def test_the_fit_of_a_bridge_lowers_the_distance_of_real_models(config, monkeypatch):
    monkeypatch.setattr(oprd, "ROLLOUTS", {True: 200})
    cfg = fitted(config(teacher="narrow", oprd__bridge=True))
    assert extension(cfg).rank == 8
    found = load_file(prepared_file(cfg, "oprd"))
    assert found["student.basis"].shape == (3, WIDTH, 8) and found["teacher.basis"].shape == (3, 32, 8)
    fit = gradient(cfg, scored(cfg)[1])[1]["oprd"]
    found["student.basis"] = found["student.basis"].flip(2).contiguous()
    save_file(found, prepared_file(cfg, "oprd"))
    assert fit < 0.7 * gradient(cfg, scored(cfg)[1])[1]["oprd"]


def test_cosines_are_those_of_the_two_models_side_by_side(config, monkeypatch):
    monkeypatch.setattr(oprd, "ROLLOUTS", {False: 8})
    cfg = fitted(config())
    cosine = load_file(prepared_file(cfg, "oprd"))["cosine"]
    assert cosine.shape == (LAYERS,) and (cosine > 0.5).all() and (cosine < 0.999).all(), cosine
    same = fitted(config(teacher="student"))
    assert load_file(prepared_file(same, "oprd"))["cosine"].tolist() == pytest.approx([1.0] * 3)


# -- the head --------------------------------------------------------------------------------------

def test_the_student_begins_with_the_teachers_head_and_goes_on_with_its_own(config, folders, tmp_path):
    theirs = load_model(str(folders / "continued"), "cpu", torch.float32).lm_head.weight
    cfg = config(estimator="reverse_mc", oprd__weight=1.0, lr=0.01)
    learner = Learner(cfg, "cpu", torch.float32)
    assert torch.equal(learner.student.head.weight, theirs)
    learner.step(scored(cfg)[1], 0)
    learner.checkpoint(tmp_path)
    resumed = Learner(cfg, "cpu", torch.float32, str(tmp_path))
    head = resumed.student.head.weight
    assert torch.equal(head, learner.student.head.weight) and not torch.equal(head, theirs)


@pytest.mark.parametrize("teacher, flags, given", [
    ("continued", {}, True), ("continued", dict(oprd__head=False), False), ("tied", {}, False), ("deep", {}, True),
    ("narrow", dict(oprd__bridge=True), False), ("continued", dict(lora_rank=2), False)])
def test_whether_a_head_is_given(config, teacher, flags, given):
    if "lora_rank" in flags:
        pytest.importorskip("peft")
    cfg = config(teacher, **flags)
    models = pair_of(cfg)
    made = extension(cfg)
    assert made.copies_head(models.student_config, models.teacher_config) == given
    assert len(made.check(models)) == (not given)
    assert extension(config(teacher, estimator="reverse_mc", **flags)).check(models) == []
    theirs = load_model(cfg.teacher, "cpu", torch.float32).get_output_embeddings().weight
    if made.rank:
        fitted(cfg)
    head = Learner(cfg, "cpu", torch.float32).student.head.weight
    assert (head.shape == theirs.shape and torch.equal(head, theirs)) == given


def test_a_tied_head_is_not_given_since_the_embedding_would_come_along(config, folders):
    cfg = config("tied", student=folders / "tied")
    models = pair_of(cfg)
    assert not extension(cfg).copies_head(models.student_config, models.teacher_config)


def test_a_sliding_window_is_refused_before_the_run(config, folders, tmp_path):
    shutil.copytree(folders / "student", tmp_path / "slides")
    file = tmp_path / "slides" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(use_sliding_window=True, sliding_window=8)))
    with pytest.raises(ValueError, match="slides: has a sliding window"):
        prepare(config(student=tmp_path / "slides"))


# -- runs ------------------------------------------------------------------------------------------

@pytest.fixture
def flags(folders, tmp_path):
    return dict(task="toy", student=folders / "student", teacher=folders / "continued", gpus=0, engine="hf", batch=8,
                max_prompt=8, max_response=T, max_running=64, lr=1e-3, eval__n=8, steps=12, out=str(tmp_path / "run"))


def refused(flags) -> str:
    done = run(flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not Path(flags["out"]).exists()
    return done.stderr


def test_a_teacher_of_another_origin_is_refused_and_nothing_is_created(flags, folders):
    alone = dict(estimator="none", extend="oprd")
    said = refused(flags | dict(teacher=folders / "other", **alone))
    assert "layer 0" in said and "cosine" in said and "--oprd.bridge" in said and str(folders / "other") in said
    said = refused(flags | dict(teacher=folders / "narrow", **alone))
    assert "32 wide, the student's 64 (--oprd.bridge" in said


def test_a_run_brings_the_states_closer_asynchronously_and_resumes(flags, folders):
    """With a projection, which a resumed run reads and does not fit again."""
    flags |= dict(estimator="reverse_mc", extend="oprd", oprd__weight=2.0, oprd__rank=8, max_ahead=4, steps=40)
    process, _ = start_and_wait_for(flags, step=15)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    file = Path(flags["out"]) / "oprd.safetensors"
    before = file.stat().st_mtime_ns
    done = complete([*command(flags)[:2], "--resume", f"--out={flags['out']}"])
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mtime_ns == before and load_file(file)["teacher.basis"].shape == (LAYERS, WIDTH, 8)
    log = steps(flags)
    assert [s["step"] for s in log] == list(range(1, 41)) and max(s["lag_max"] for s in log) > 1
    distance = [s["oprd"] for s in log]
    assert sum(distance[-5:]) < 0.8 * sum(distance[:5]), distance
    with pytest.raises(ValueError, match="--resume cannot change"):          # its states are projected as the old one's
        configure(["--resume", f"--out={flags['out']}", f"--teacher={folders / 'deep'}"])
    file.unlink()
    with pytest.raises(ValueError, match="oprd.safetensors is gone"):
        prepare(configure(["--resume", f"--out={flags['out']}"]))


@pytest.mark.parametrize("engine, more", [
    ("hf", dict(estimator="none", extend="oprd", oprd__positions="first", oprd__tokens=5, max_ahead=1, max_lag=1)),
    ("hf", dict(extend="oprd", oprd__weight=1, kl="forward", top_k=4, oprd__layers="last", minibatches=2)),
    ("vllm", dict(estimator="none", extend="oprd", oprd__rank=4, max_ahead=4))])
def test_runs_of_other_kinds(flags, engine, more):
    if engine == "vllm":
        pytest.importorskip("vllm")
    done = run(flags | dict(engine=engine) | more)
    assert done.returncode == 0, done.stderr
    log = steps(flags)
    assert len(log) == 12 and all(s["oprd"] != 0 and s["kl"] is not None and s["skipped"] == 0 for s in log)
    assert all((s["loss"] == 0) == (more.get("estimator") == "none") for s in log)
    assert all(s["engine_gap_max"] <= 1e-4 for s in log), "version 0 has the teacher's head, in the engine too"


def test_a_dry_run_counts_the_states(capsys):
    """Qwen3-1.7B: 28 layers; the teacher's states are 2,048 wide. At rank 16 a token of them costs 896 bytes."""
    for rank, said in (("16", "896"), ("0", "114,688")):
        assert asyncopd.main([f"--config={ROOT}/configs/deepmath_1.7b.yaml", "--gpus=8", "--dry-run",
                              "--student=Qwen/Qwen3-1.7B", "--teacher=Qwen/Qwen3-30B-A3B-Instruct-2507",
                              "--extend=oprd", "--oprd.weight=1", f"--oprd.rank={rank}"]) == 0
        line, = (x for x in capsys.readouterr().out.splitlines() if STATES in x)
        assert line.split() == ["bytes", "per", "row", "of", "oprd_states", said]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_command_ends_the_fit(flags, how):
    """Before the run there is nothing to save, and nobody is left behind."""
    flags |= dict(estimator="none", extend="oprd", max_response=400, max_running=1)             # minutes of it
    process = subprocess.Popen(command(flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit, children = time.monotonic() + 60, []
    while not children and time.monotonic() < limit:             # until there is one that has begun
        time.sleep(0.05)
        children = [x for server in children_of(process.pid) for x in children_of(server)
                    if os.readlink(f"/proc/{x}/fd/2") == os.devnull]
    assert alive(children)
    process.send_signal(how)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    assert how == signal.SIGKILL or err.strip().endswith("interrupted, nothing is saved")
    while alive(children) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(children)
    left = [p.name for p in Path(flags["out"]).rglob("*")]
    if how == signal.SIGKILL:          # the file of its claim, which nobody holds: the next run may use the folder
        assert left == [".claim"]
    else:
        assert not Path(flags["out"]).exists()


def test_a_fit_that_dies_is_a_failure_and_no_refusal():
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        alone(dies, Config(gpus=0), 3, "cpu")
    with pytest.raises(RuntimeError, match="KeyError"):
        alone(dies, Config(gpus=0), "key", "cpu")
    with pytest.raises(ValueError, match="^no$"):
        alone(dies, Config(gpus=0), "no", "cpu")


def dies(cfg, how, device, dtype):
    if how == 3:
        os._exit(3)
    raise {"key": KeyError("a"), "no": ValueError("no")}[how]

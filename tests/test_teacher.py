"""The teacher's two engines against each other, what vLLM is refused for, and a teacher that knows nothing."""
import dataclasses
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

from cache import Slots
from config import Config
from control import plan
from control.preflight import prepare
from control.resolve import configure
from draws import draw_iid
from estimators import ESTIMATORS
from models import footprint
from models.alignment import pad, response_rows
from models.head import teacher_logq
from models.loading import load_model
from teacher import HFTeacher, TeacherCheck, answers, score, teacher_class
from teacher import complete as complete_for_real
from tests.conftest import save_tiny
from tests.runs import command, complete, lines, steps
from transport.process import visible_gpus

T, N, K = 12, 4, 5
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"      # in vLLM two ways to the same numbers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """By name, a teacher in vLLM: made once and kept, since the end of one would take the others' groups with it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    root, made = tmp_path_factory.mktemp("teachers"), {}
    save_tiny(root / "student", seed=0)
    for name, how in {"untied": dict(layers=2, sharp=8.0), "tied": dict(tied=True, sharp=8.0),
                      "wide": dict(vocab=40, sharp=8.0), "narrow": dict(vocab=24, sharp=8.0)}.items():
        save_tiny(root / name, seed=1, **how)
        cfg = Config(task="toy", student=str(root / "student"), teacher=str(root / name), gpus=0,
                     estimator="reverse_mc", mc_samples=N, top_k=K, max_prompt=8, max_response=T, micro_tokens=64)
        made[name] = cfg, teacher_class("vllm")(cfg, DEVICE, torch.float32)
    return made


BYPASSED = range(3, 10)            # words whose positions are not stored, in sparse slots


def drawn(support: str, sparse: bool = False) -> Slots:
    """Segments of several lengths, one of them the rest of a cut response; columns as the student draws them."""
    row = next(e for e in ESTIMATORS.values() if e.support == support)
    slots, g = Slots(4, 8, T, row.columns(N, K), sparse=sparse), torch.Generator().manual_seed(0)
    for s, (prompt, before, n) in enumerate([(3, 0, T), (1, 0, 1), (8, 0, 5), (4, 6, 6)]):
        slots.open(s, s, torch.randint(3, 17, (prompt + before,), generator=g), prompt, 0)
        ids = torch.randint(0, 32, (n, row.drawn(N) + row.top(K)), generator=g)
        ids[:, 0] %= 24                          # what is emitted becomes context: a word that every teacher has
        kept = ~torch.isin(ids[:, 0], torch.tensor(BYPASSED)) if sparse else None
        slots.append(s, ids[:, 0], ids, torch.full(ids.shape, -1.0), torch.full((n,), -1.0), torch.zeros(n), kept)
    return slots


@pytest.mark.parametrize("support", ["sampled", "candidates", "student_topk", "teacher_topk"])
@pytest.mark.parametrize("name", ["untied", "tied", "wide", "narrow", "untied, sparse"])
def test_vllm_scores_as_transformers_does(teachers, name, support):
    """To 1e-4, with as many, more and fewer rows in the teacher's head than in the student's."""
    name, _, sparse = name.partition(", ")
    sparse = bool(sparse)
    cfg, vllm = teachers[name]
    cfg = dataclasses.replace(cfg, estimator=next(e for e, row in ESTIMATORS.items() if row.support == support))
    vllm.support, hf = support, HFTeacher(cfg, DEVICE, torch.float32)
    got, want = drawn(support, sparse), drawn(support, sparse)
    for teacher, slots in ((vllm, got), (hf, want)):
        teacher.score([slots.read(s) for s in range(4)], slots)
    known = want.logq[0][want.logq[0].isfinite()]
    assert torch.equal(got.logq.isnan(), want.logq.isnan()) and known.max() - known.min() > 2
    torch.testing.assert_close(got.logq, want.logq, rtol=0, atol=1e-4, equal_nan=True)
    assert torch.equal(got.ids, want.ids) and got.ids.max() < 32
    assert not sparse or got.logq[0, :, 0].isnan().any(), "rows that nobody has use for"


def test_greedy_answers_are_the_same_and_end_where_they_are_told(teachers):
    cfg, vllm = teachers["untied"]
    prompts, hf = [[3 + i % 14, 3 + i // 14, 13] for i in range(60)], HFTeacher(cfg, DEVICE, torch.float32)
    want = [a[:a.index(9) + 1] if 9 in a else a for a in hf.complete(prompts, T, [9])]
    assert vllm.complete(prompts, T, [9]) == want
    assert any(9 in a for a in want) and any(1 in a[:-1] for a in want), "the tokenizer's own end is none"


def test_a_gpu_is_asked_for_a_row_per_new_token_and_for_no_word_beyond_its_head(teachers):
    """Row i of `prompt_logprob_token_ids` scores the token after prompt_logprob_start + i: here token start + i."""
    vllm = teachers["narrow"][1]
    vllm.support, vllm.on_gpu, slots = "candidates", True, drawn("candidates")
    try:
        for s in (slots.read(s) for s in range(4)):
            asked = vllm.question(s)
            ids = torch.from_numpy(asked.prompt_logprob_token_ids)
            assert len(ids) == len(s.tokens) - 1 - asked.prompt_logprob_start == len(s)
            assert torch.equal(ids, torch.where(s.ids < 24, s.ids, -1)) and asked.prompt_logprob_start == s.start - 1
        slots = drawn("candidates", sparse=True)
        for s in (slots.read(s) for s in range(4)):
            ids = torch.from_numpy(vllm.question(s).prompt_logprob_token_ids)
            assert len(ids) == len(s) and torch.equal(ids[s.kept], torch.where(s.ids < 24, s.ids, -1))
            assert (ids[~s.kept] == -1).all(), "nothing is asked of what is bypassed"
    finally:
        vllm.on_gpu = torch.cuda.is_available()


def test_padding_costs_the_teacher_neither_a_mask_nor_a_cache(models, monkeypatch):
    """With a mask attention takes a slow kernel; a cache is read by nobody. The scores are those with both."""
    model, slots = load_model(models["teacher"], DEVICE, torch.float32), drawn("candidates")
    segments = [slots.read(s) for s in range(4)]
    attend = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(*args, attn_mask=None, is_causal=False, **how):
        seen.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **how)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr("transformers.DynamicCache.update", lambda *_, **__: pytest.fail("a cache"))
    score(model, segments, slots, "candidates", 32)
    assert len(seen) == 2 and all(mask is None and causal for mask, causal in seen)
    monkeypatch.undo()
    tokens, mask = pad(segments, DEVICE)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    want = teacher_logq(model.get_output_embeddings(), response_rows(hidden, segments), 32)
    got = torch.cat([slots.read(s).logq for s in range(4)])
    ids = torch.cat([s.ids for s in segments]).long().to(DEVICE)
    torch.testing.assert_close(got, want.gather(-1, ids).cpu(), rtol=0, atol=1e-5)


# -- what vLLM is refused for ----------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.head])
def test_what_vllm_cannot_score_is_refused_with_the_remedy(name):
    args = ["--task=toy", "--gpus=0", f"--estimator={name}", "--teacher-engine=vllm"]
    if ESTIMATORS[name].support in ("sampled", "candidates", "student_topk", "sampled_topk", "teacher_topk"):
        assert configure(args).teacher_engine == "vllm"
    else:
        with pytest.raises(ValueError, match=rf"--teacher-engine vllm: {name} needs .*--teacher-engine hf"):
            configure(args)


@pytest.mark.parametrize("name, fine", [("reverse_mc", False), ("forward_topk", True)])
def test_a_large_vocabulary_is_refused_where_a_cpu_would_move_all_of_it(name, fine, models, tmp_path):
    large = save_tiny(tmp_path / "large", seed=0, vocab=10_001)
    args = ["--task=toy", "--gpus=0", f"--estimator={name}", "--teacher-engine=vllm", f"--student={models['student']}",
            f"--teacher={large}", "--max-prompt=8", "--max-response=8"]
    if fine:
        prepare(configure(args))
    else:
        with pytest.raises(ValueError, match="all 10,001 words"):
            prepare(configure(args))


# -- a teacher that knows nothing ------------------------------------------------------------------

def scored(logits_mu: torch.Tensor, logits_q: torch.Tensor, n: int = 32) -> list:
    """One segment whose T positions hold n draws from mu, scored by q; logits [T, V]."""
    slots = Slots(1, 1, T, n)
    u = torch.rand(T, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chosen = draw_iid(logits_mu, u, n)
    slots.open(0, 0, [3], 1, 0)
    slots.append(0, chosen.ids[:, 0], *chosen, torch.zeros(T))
    slots.logq[0] = logits_q.log_softmax(-1).gather(-1, chosen.ids)
    return [slots.read(0)]


def test_the_entropy_is_exact_for_a_dead_teacher_and_close_for_a_live_one(config, models):
    watch = TeacherCheck(config(batch=1, mc_samples=32))
    mu = 4 * torch.randn(T, 32, generator=torch.Generator().manual_seed(0))
    assert f"{math.log(32):.2f} nats" in watch.see(scored(mu, torch.zeros(T, 32)))
    assert watch.see(scored(mu, torch.zeros(T, 32))) == "", "said once"
    alive = TeacherCheck(config(batch=1000, mc_samples=512))
    q = mu + torch.randn(T, 32, generator=torch.Generator().manual_seed(1))
    assert alive.see(scored(mu, q, 512)) == ""
    truth = torch.distributions.Categorical(logits=q).entropy().mean().item()
    assert (alive.sums[0] / alive.sums[1]).item() == pytest.approx(truth, rel=0.1) and truth < 0.6 * math.log(32)


def test_a_dead_teacher_is_named_in_log_and_terminal(flags, tmp_path):
    """It gives every word 1 / V, so that KL(p || q) is ln V - H(p): exact in a run without lag, scored by vLLM."""
    engine = "vllm" if importlib.util.find_spec("vllm") else "hf"
    dead = save_tiny(tmp_path / "dead", seed=1, sharp=0.0)
    done = complete([*command(flags | dict(steps=3, teacher=dead, teacher_engine=engine, schedule="sync")),
                     "--eval.teacher"])
    assert done.returncode == 0, done.stderr
    for s in steps(flags):
        assert s["kl"] == pytest.approx(math.log(32) - s["entropy"], abs=1e-4)
    said = [e for e in lines(flags) if e.get("what") == "warning"]
    assert len(said) == 1 and said[0]["worker"] == "teacher0" and "3.47 nats" in said[0]["why"]
    assert done.stderr.count("teacher0: the teacher's entropy is") == 1
    assert [e["n"] for e in lines(flags) if e.get("who") == "teacher" and e["type"] == "eval"] == [8]


def test_the_teacher_answers_as_many_at_a_time_as_memory_has_room_for(tmp_path):
    sizes, beats, folder = [], [], save_tiny(tmp_path / "model", seed=1)

    def complete(prompts, max_new, stop, beat):
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError
        return [[p[0]] for p in prompts]
    prompts, room = [[i] for i in range(100)], 20
    cfg, small = Config(student=folder, teacher=folder, max_response=5), SimpleNamespace(complete=complete)
    assert answers(small, cfg, prompts, lambda: beats.append(1)) == prompts
    assert sizes == [64, 32, 16, 16, 16, 16, 16, 16, 4] and len(beats) == 7
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        answers(small, cfg, prompts, print)
    beats.clear()
    complete_for_real(load_model(folder, "cpu", torch.float32), [[1, 2], [3]], 5, [], lambda: beats.append(1))
    assert len(beats) >= 5, "a sign of life at every token"


# -- a teacher over several GPUs -------------------------------------------------------------------

def test_a_teacher_takes_as_many_gpus_as_it_is_told_and_the_others_move_up():
    cfg = Config(gpus=8, rollouts=3, teachers=2, teacher_gpus=2, learners=1)
    assert {w.name: w.device for w in plan.plan(cfg)} == {
        "rollout0": "cuda:0", "rollout1": "cuda:1", "rollout2": "cuda:2",
        "teacher0": "cuda:3,4", "teacher1": "cuda:5,6", "learner": "cuda:7"}
    assert plan.split(8, 0, 0, 0, teacher_gpus=3) == (3, 1, 2)
    shape = footprint.Shape(P=10 ** 9, V=1000, L=2, H=8, I=8, A=8, K=8)
    cfg = dataclasses.replace(cfg, estimator="reverse_mc", engine="hf")
    parts = {n.device: n.parts["weights"] for n in plan.memory(cfg, shape, shape) if n.worker == "teacher0"}
    assert parts == {"cuda:3": pytest.approx(1.0), "cuda:4": pytest.approx(1.0)}        # 2 GB in bf16
    assert "2 to score on 2 GPUs each" in plan.why(cfg)
    vllm = dataclasses.replace(cfg, teacher_engine="vllm", teacher_gpus=1)
    held = [n for n in plan.memory(vllm, shape, shape, gpu_gb=80.0) if n.worker == "teacher0"]
    assert [n.parts["weights"] + n.parts["cache"] for n in held] == [pytest.approx(0.85 * 80)], "vLLM takes its share"


def test_a_worker_sees_its_own_gpus_only_counted_from_zero():
    assert visible_gpus("cuda:4,5", None) == ("4,5", "cuda:0,1")
    assert visible_gpus("cuda:1", "7,3,5") == ("3", "cuda:0")
    assert visible_gpus("cuda:0,2", "7,3,5") == ("7,5", "cuda:0,1")


@pytest.mark.parametrize("flags, named", [
    (["--teacher-gpus=2", "--gpus=0"], "--teacher-gpus 2: with --gpus 0"), (["--teacher-gpus=0"], "--teacher-gpus 0")])
def test_gpus_that_are_not_there_are_refused(flags, named):
    with pytest.raises(ValueError, match=named):
        configure(["--task=toy", "--gpus=0", *flags])


@pytest.mark.parametrize("support", ["candidates", "full"])
def test_a_model_that_accelerate_has_dealt_out_scores_as_a_whole_one_does(models, tmp_path, support):
    """Without several GPUs: one layer comes from a file whenever it is its turn."""
    accelerate = pytest.importorskip("accelerate")
    whole = load_model(models["teacher"], "cpu", torch.float32)
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "lm_head": "cpu"}
    dealt = accelerate.dispatch_model(load_model(models["teacher"], "cpu", torch.float32), where, main_device="cpu",
                                      offload_dir=str(tmp_path), force_hooks=True)
    assert dealt.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    compare(whole, dealt, support)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_teacher_over_two_gpus_scores_as_on_one(models):
    compare(*(load_model(models["teacher"], device, torch.float32) for device in ("cuda:0", "cuda:0,1")), "full")


def compare(one, other, support: str) -> None:
    results = []
    for model in (one, other):
        slots = drawn(support)
        slots.hidden = torch.zeros(4, T, 64)
        score(model, [slots.read(s) for s in range(4)], slots, support, 32)
        results.append((slots.logq, slots.hidden))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, equal_nan=True)

"""
From a row of the table to a gradient: what the engine records, the teacher scores and the learner trains, for every
estimator, in one process on a tiny random Qwen3, float32. The processes have their own tests.
"""
import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cache import Slots
from config import Config
from control.controller import Controller
from control.memory import memory_rows
from control.plan import plan
from control.preflight import prepare
from data import toy
from engines.hf import HFEngine
from engines.sampling import Drawing, draw_rows
from estimators import ESTIMATORS, QUESTIONS, Estimator, estimator_table
from learner import Learner, summarize
from models.head import teacher_logq
from models.loading import load_model
from record.metrics import METRICS
from teacher import score

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
VOCAB, HIDDEN, T, N, K = 32, 64, 6, 3, 5
WITH_LOSS = [name for name, row in ESTIMATORS.items() if row.head]       # on log-probs; the other: tests/test_oprd.py


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a student, of the weights that generate, and of teachers whose heads have 32 and 40 rows."""
    root, tokenizer = tmp_path_factory.mktemp("models"), toy.toy_tokenizer()
    for name, how in {"student": dict(layers=1, hidden=32, seed=1), "teacher": dict(layers=1, hidden=HIDDEN, seed=3),
                      "wide": dict(layers=1, hidden=HIDDEN, seed=3, vocab=40)}.items():
        model = toy.small_model(tokenizer, **how)
        with torch.no_grad():
            for x in model.parameters():
                x.mul_(3)                       # away from the uniform distribution
            if name == "student":
                model.save_pretrained(root / name)
                tokenizer.save_pretrained(root / name)
                g, name = torch.Generator().manual_seed(9), "stale"
                for x in model.parameters():
                    x.add_(0.05 * torch.randn(x.shape, generator=g))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def config(models, estimator, **more):
    draws = ("iid", *ESTIMATORS[estimator].designs)[0 if "extend" in more else -1]
    how = dict(estimator=estimator, kl=ESTIMATORS[estimator].kl, draws=draws, student=str(models / "student"),
               teacher=str(models / "teacher"), mc_samples=N,
               top_k=K, max_prompt=8, max_response=T, minibatches=1, micro_tokens=10_000, seed=3)
    return Config(**how | more)


def filled(cfg, models, responses=4):
    """Slots as they reach the learner: drawn by the stale student, scored by the teacher."""
    row = ESTIMATORS[cfg.estimator]
    slots = Slots(responses, cfg.max_prompt, T, row.columns(cfg.mc_samples, cfg.top_k),
                  hidden=HIDDEN if row.support == "full" else 0)
    engine = HFEngine(dataclasses.replace(cfg, student=str(models / "stale")), "cpu", torch.float32)
    engine.ends = set()
    for s in range(responses):
        prompt = [3 + (s + i) % 10 for i in range(2 + s)]
        slots.open(s, s, prompt, len(prompt), 0)
        engine.add(s, prompt, T - s % 3, uid=s, position=0)
    while engine.rows or engine.new:
        for s, drawn in engine.take(engine.step()).items():
            slots.append(s, *drawn)
    segments = [slots.read(s) for s in range(responses)]
    score(load_model(cfg.teacher, "cpu", torch.float32), segments, slots, row.support, VOCAB, seed=cfg.seed,
          design=cfg.draws)
    return slots, [slots.read(s) for s in range(responses)]


def gradient(learner, segments, size=None):
    """Of one train batch, without taking the step; and its metrics."""
    learner.batch_context = learner.prepass(segments)
    size = size or len(segments)
    measured = []
    for i in range(0, len(segments), size):
        measured.append(learner.backward(segments[i:i + size], sum(map(len, segments))))
    found = torch.cat([p.grad.flatten() for p in learner.student.model.parameters()])
    learner.optimizer.zero_grad()
    return found, summarize(measured)


# -- every row -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WITH_LOSS)
def test_every_estimator_steps_and_its_numbers_are_finite(models, name):
    learner = Learner(config(models, name, minibatches=2), "cpu", torch.float32)
    _, segments = filled(learner.cfg, models)
    before = learner.student.head.weight.clone()
    trained = learner.step(segments, 2)
    metrics = trained.metrics
    assert trained.skipped == trained.events == [] and not trained.flush and metrics.keys() <= METRICS.keys()
    assert all(torch.tensor(float(x)).isfinite() for x in metrics.values())
    assert metrics["tokens"] == sum(map(len, segments)) and metrics["kl"] != 0
    assert not torch.equal(before, learner.student.head.weight)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_splitting_a_batch_or_its_logits_changes_nothing(models, name):
    whole = Learner(config(models, name), "cpu", torch.float32)
    split = Learner(config(models, name, micro_tokens=20), "cpu", torch.float32)
    split.student.chunk = 2
    _, segments = filled(whole.cfg, models)
    a, m = gradient(whole, segments)
    b, n = gradient(split, segments, size=1)
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max().item()), (a - b).abs().max()
    assert m == pytest.approx(n, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_slot_costs_what_the_table_says(name):
    row, hidden = ESTIMATORS[name], 16
    columns = row.columns(N, K)
    slots = Slots(2, 8, 50, columns, hidden=hidden if row.support == "full" else 0, dtype=torch.bfloat16)
    held = sum(getattr(slots, x).nbytes for x in ("ids", "logpi", "logmu", "logq", "hidden"))
    assert held == 2 * 50 * row.bytes(N, K, 2 * hidden)


def test_a_new_row_in_the_table_is_all_that_a_new_estimator_takes(models):
    """Total variation on the student's best words: no other file knows of it."""
    def tv_topk(logp, logq, logmu):
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    ESTIMATORS["tv_topk"] = Estimator(tv_topk, "reverse", "student_topk", unbiased=False)
    try:
        learner = Learner(config(models, "tv_topk"), "cpu", torch.float32)
        _, segments = filled(learner.cfg, models)
        first = learner.step(segments, 0).metrics["loss"]
        for _ in range(20):
            last = learner.step(segments, 0).metrics["loss"]
        assert 0 < last < first < 1
    finally:
        del ESTIMATORS["tv_topk"]


def test_no_other_module_names_an_estimator():
    names = "|".join(name for name, row in ESTIMATORS.items() if row.head)       # `none` is a word
    for file in ("cache.py", "rollout.py", "learner.py", "record/log.py", "data/tasks.py"):
        assert not re.search(rf"\b({names})\b", (ROOT / file).read_text()), file
    found = re.findall(rf'^.*\b(?:{names})\b.*$', (ROOT / "asyncopd.py").read_text(), re.M)
    assert all("knob(" in line for line in found), "in the parent only the help of a flag may name one"
    assert re.findall(r"^(?:from|import) (\w+)", (ROOT / "estimators.py").read_text(), re.M) == [
        "__future__", "collections", "dataclasses", "functools", "typing", "torch", "torch", "torch"]


def test_the_table_has_a_row_for_each_and_every_docstring_its_six_lines():
    assert len(estimator_table().splitlines()) == 2 + len(ESTIMATORS)
    assert QUESTIONS == ("Target", "Candidates", "Gradient", "Value", "Stale mu", "Not covered")
    for name, row in ESTIMATORS.items():
        assert row.fn.__name__ == ("no_divergence" if name == "none" else name)
        for question in QUESTIONS:
            assert len(row.says(question)) > 3, (name, question)


def test_an_answer_ends_where_the_next_question_or_the_prose_begins():
    def loss(logp, logq, logmu):
        """A loss.

        Target      one line
        Candidates  two
                    lines
        Gradient    the last

            indented prose
        """
    row = Estimator(loss, "reverse", "sampled")
    answers = [row.says(question) for question in QUESTIONS]
    assert answers == ["one line", "two lines", "the last", "", "", ""]


# -- what the engine records, what the teacher scores -----------------------------------------------

def test_the_student_records_its_best_words_with_their_log_probs(models):
    cfg = config(models, "reverse_topk")
    _, segments = filled(cfg, models)
    model = load_model(str(models / "stale"), "cpu", torch.float32)
    for s in segments:
        with torch.no_grad():
            truth = model(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
        assert torch.equal(s.ids[:, 0], s.tokens[s.start:]), "column 0 is the emitted token"
        assert torch.allclose(s.logpi, truth.gather(-1, s.ids.long()), atol=1e-4)
        assert torch.allclose(s.logpi[:, 1:], truth.topk(K).values, atol=1e-4)


def test_best_words_under_temperature_and_nucleus_are_those_of_what_was_sampled():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    ids, logpi, _ = draw_rows(logits, [0], [0], Drawing(n=2, k=5, design="iid", temperature=0.5, top_p=0.9, seed=0))
    p = (2 * logits[0]).softmax(-1)
    kept = (p[:2] / p[:2].sum()).log()
    assert ids.shape == (1, 7) and set(ids[0, :2].tolist()) <= {0, 1}
    assert torch.allclose(logpi[0, 2:4], kept, atol=1e-5) and (logpi[0, 4:] == -torch.inf).all()


def test_a_set_as_large_as_the_vocabulary_makes_the_set_exact(models):
    got, _ = gradient(learner := Learner(config(models, "reverse_topk", top_k=VOCAB), "cpu", torch.float32),
                      filled(learner.cfg, models)[1])
    want, _ = gradient(learner := Learner(config(models, "reverse_dense"), "cpu", torch.float32),
                       filled(learner.cfg, models)[1])
    assert torch.allclose(got, want, atol=2e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", ["reverse_topk", "forward_topk", "reverse_dense"])
def test_the_parent_makes_slots_as_the_table_says_and_no_wider_than_the_vocabulary(models, tmp_path, name):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12+34="}\n')
    cfg, job = prepare(config(models, name, top_k=100, task=str(tmp_path / "rows.jsonl"), gpus=0, batch=2, max_ahead=1))
    controller = Controller(cfg, job, plan(cfg))
    row, hidden = ESTIMATORS[name], HIDDEN if ESTIMATORS[name].support == "full" else 0
    assert controller.cfg.top_k == VOCAB and controller.slots.hidden.shape == (4, T, hidden)
    assert controller.slots.ids.shape == (4, T, row.columns(N, VOCAB))
    printed = memory_rows(cfg, job, controller.shared)
    assert [f"a token's scores ({name})", f"{row.bytes(N, VOCAB, 4 * hidden):,} bytes"] in printed


def test_the_teacher_draws_from_its_own_distribution_and_repeats_itself(models):
    cfg = config(models, "forward_mc", mc_samples=3000, draws="iid")
    _, segments = filled(cfg, models, responses=1)
    again = filled(cfg, models, responses=1)[1]
    assert torch.equal(segments[0].ids, again[0].ids)
    other = filled(config(models, "forward_mc", mc_samples=3000, seed=4, draws="iid"), models, responses=1)[1]
    assert not torch.equal(segments[0].ids[:1], other[0].ids[:1])
    s, model = segments[0], load_model(cfg.teacher, "cpu", torch.float32)
    with torch.no_grad():
        q = model(s.tokens[None].long()).logits[0, s.start - 1:-1].softmax(-1)
    for t in range(len(s)):
        seen = torch.bincount(s.ids[t, 1:].long(), minlength=VOCAB) / 3000
        common = q[t] > 5 / 3000
        chi = ((seen - q[t])[common] ** 2 / q[t][common]).sum() * 3000
        assert chi < common.sum() + 5 * (2 * common.sum()) ** 0.5, f"position {t}: chi square {chi:.1f}"
    assert torch.allclose(s.logq.exp(), q.gather(-1, s.ids.long()), atol=1e-5)


@pytest.mark.parametrize("teacher", ["teacher", "wide"])
def test_exact_divergences_match_both_models_run_side_by_side(models, teacher):
    """Also where the teacher's head has more rows than the student's."""
    learner = Learner(config(models, "reverse_dense", teacher=str(models / teacher)), "cpu", torch.float32)
    _, segments = filled(learner.cfg, models)
    got, metrics = gradient(learner, segments)
    p, q = load_model(learner.cfg.student, "cpu", torch.float32), load_model(learner.cfg.teacher, "cpu", torch.float32)
    total = 0.0
    for s in segments:
        logp = p(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
        with torch.no_grad():
            logq = q(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)[:, :VOCAB]
        total = total + (logp.exp() * (logp - logq)).sum()
    (total / sum(map(len, segments))).backward()
    want = torch.cat([x.grad.flatten() for x in p.parameters()])
    assert torch.allclose(got, want, atol=2e-5 * want.abs().max().item())
    assert metrics["kl"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["kl"] == pytest.approx(total.item() / sum(map(len, segments)), rel=1e-4)


@pytest.mark.parametrize("size", [None, 1])
def test_a_tail_too_small_for_a_difference_still_has_its_gradient(models, size):
    """The student is its teacher, but surer: it leaves the words outside the set 1e-8. Against a loop in float64."""
    sure = 16.0
    learner = Learner(config(models, "forward_topk", student=str(models / "teacher")), "cpu", torch.float32)
    learner.student.chunk = 3
    _, segments = filled(learner.cfg, models)
    p, total, tails = load_model(learner.cfg.student, "cpu", torch.float64), 0.0, []
    with torch.no_grad():
        learner.student.head.weight.mul_(sure)
        p.lm_head.weight.mul_(sure)
    got, _ = gradient(learner, segments, size)
    for s in segments:
        logp = p(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
        best, logq = s.ids[:, 1:].long(), s.logq[:, 1:].double()
        tail = logp.scatter(-1, best, -torch.inf).logsumexp(-1)
        total = total - (logq.exp() * logp.gather(-1, best)).sum() - ((1 - logq.exp().sum(-1)) * tail).sum()
        tails.append(tail.detach())
    (total / sum(map(len, segments))).backward()
    want = torch.cat([x.grad.flatten() for x in p.parameters()])
    assert torch.cat(tails).exp().median() < 1e-7
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize("name", ["forward_topk", "forward_mc", "reverse_mc"])
def test_a_wider_teacher_offers_no_word_the_student_lacks(models, name):
    learner = Learner(config(models, name, teacher=str(models / "wide")), "cpu", torch.float32)
    _, segments = filled(learner.cfg, models)
    assert all(int(s.ids.max()) < VOCAB for s in segments)
    assert torch.tensor(learner.step(segments, 0).metrics["loss"]).isfinite()


def test_rows_that_only_one_head_has_are_cut_or_impossible():
    rows, head = torch.randn(2, 8), torch.nn.Linear(8, 10)
    truth = head(rows).log_softmax(-1)
    assert torch.equal(teacher_logq(head, rows, 7), truth[:, :7])
    wider = teacher_logq(head, rows, 12)
    assert torch.equal(wider[:, :10], truth) and (wider[:, 10:] == -torch.inf).all()


def test_what_the_whole_batch_knows_is_the_student_before_its_first_update(models):
    learner = Learner(config(models, "decoupled_ppo", minibatches=2, lr=0.1), "cpu", torch.float32)
    _, segments = filled(learner.cfg, models)
    model = load_model(learner.cfg.student, "cpu", torch.float32)
    learner.step(segments, 0)
    for s in segments:
        with torch.no_grad():
            truth = model(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
        assert torch.allclose(learner.batch_context[s.slot]["prox"], truth.gather(-1, s.ids.long()), atol=1e-4)


# -- what the log says -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["reverse_mc", "reverse_ppo", "reverse_topk", "forward_topk", "forward_mc",
                                  "reverse_dense"])
def test_diagnostics_are_those_of_the_columns_that_mu_drew(models, name):
    learner = Learner(config(models, name), "cpu", torch.float32)
    _, segments = filled(learner.cfg, models)
    _, got = gradient(learner, segments)
    model, n = load_model(learner.cfg.student, "cpu", torch.float32), ESTIMATORS[name].drawn(N)
    w, entropy, value, duplicates, exact = [], [], [], [], []
    teacher = load_model(learner.cfg.teacher, "cpu", torch.float32)
    with torch.no_grad():
        for s in segments:
            logp = model(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
            logq = teacher(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1)
            exact += (logp.exp() * (logp - logq)).sum(-1).tolist()
            for t in range(len(s)):
                ids = s.ids[t, :n].tolist()
                weights = [(logp[t, a] - s.logpi[t, i]).exp().item() for i, a in enumerate(ids)]
                w.append((logp[t, ids[0]] - s.logmu[t]).exp().item())
                entropy.append(-sum(x * logp[t, a].item() for x, a in zip(weights, ids)))
                value.append([x * (logp[t, a] - logq[t, a]).item() for x, a in zip(weights, ids)] if
                             ESTIMATORS[name].kl == "reverse" else
                             [((logq[t, a] - s.logpi[t, i]).exp() * (logq[t, a] - logp[t, a])).item()
                              for i, a in enumerate(ids)])
                duplicates.append(1 - len(set(ids)) / n)
    size, value = len(w), [sum(x) for x in value]
    want = {"w_mean": sum(w) / size, "w_max": max(w), "w_p99": sorted(w)[math.ceil(0.99 * size) - 1],
            "entropy": sum(entropy) / size,
            "ess": sum(w) ** 2 / sum(x * x for x in w) / size, "duplicates": sum(duplicates) / size,
            "kl": sum(exact if ESTIMATORS[name].support == "full" else value) / size}
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_nothing_to_train_on_is_a_loss_of_zero(models):
    learner = Learner(config(models, "reverse_mc"), "cpu", torch.float32)
    slots, _ = filled(learner.cfg, models)
    slots.length[0] = 0
    measured = learner.backward([slots.read(0)], 1)
    assert measured["loss"].sum() == 0 and all((p.grad == 0).all() for p in learner.student.model.parameters())
    _, segments = slots, [slots.read(s) for s in range(4)]
    assert learner.step(segments, 0).metrics["tokens"] == sum(map(len, segments))


@pytest.mark.parametrize("source", ["logq", "logmu", "hidden", "logp"])
def test_a_nan_is_not_learnt_from_and_named(models, source):
    learner = Learner(config(models, "reverse_dense"), "cpu", torch.float32)
    slots, segments = filled(learner.cfg, models)
    if source == "logp":
        with torch.no_grad():
            learner.student.head.weight[0, 0] = torch.nan
    else:
        getattr(slots, source)[2, 1] = torch.nan
    before = learner.student.model.base_model.embed_tokens.weight.clone()
    skipped, = learner.step(segments, 0).skipped
    assert torch.equal(before, learner.student.model.base_model.embed_tokens.weight)
    assert skipped["why"].startswith("the gradient" if source == "logp" else source)
    assert skipped["slots"] == ([s.slot for s in segments] if source == "logp" else [2])


@pytest.mark.parametrize("estimator", ["m2po", "decoupled_ppo"])
def test_a_learner_that_reads_the_whole_batch_first_gives_a_sign_of_life(models, estimator):
    beats, cfg = [], config(models, estimator, micro_tokens=1)
    _, segments = filled(cfg, models)
    Learner(cfg, "cpu", torch.float32).prepass(segments, SimpleNamespace(beat=lambda: beats.append(1)))
    assert len(beats) == len(segments) > 1

"""Jumps: what moves and how far, gates that are not fooled, a pipeline that empties, runs that go on after a kill."""
import dataclasses
import math
import multiprocessing
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from control import plan
from control.command_line import as_flag
from control.preflight import prepare
from engines.hf import HFEngine
from estimators import reverse_value
from extension import Extensions, ModelPair
from extensions.effopd import BETTER, EffOPD, OwnEngine, climb, is_trigger, kept_copies
from learner import Learner
from models.footprint import Shape
from models.loading import load_model
from models.sharding import Ranks
from record.checkpoint import State, seal, unsealed
from tests.conftest import ROOT
from tests.runs import Process, in_two, lines, steps
from tests.test_supports import HIDDEN, config, filled
from tests.test_supports import models as folders  # noqa: F401
from transport.link import Link


def with_effopd(folders, estimator, gate="kl", most=5, **flags):       # noqa: F811
    """gate="" leaves EffOPD out."""
    if gate:
        flags |= dict(extend="effopd", extensions={"effopd": dict(gate=gate, most=most)})
    return config(folders, estimator, **flags)


def jumps_of(learner) -> EffOPD:
    made, = learner.extensions
    return made


@pytest.fixture
def learner(folders):       # noqa: F811
    """learner(estimator, **flags) -> a learner with the gate `kl`, and rollouts scored by its teacher.

    The gate holds them already, so that the first step is a trigger. What a run holds is a test of its own.
    """
    def make(estimator="reverse_mc", **flags):
        cfg = with_effopd(folders, estimator, **dict(lr=1e-3) | flags)
        made, segments = Learner(cfg, "cpu", torch.float32), filled(cfg, folders)[1]
        for jumps in made.extensions:
            jumps.set = kept_copies(segments)
        return made, segments
    return make


def weights(learner):
    return {name: p.detach().clone() for name, p in learner.student.model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- which steps, which weights, how far -----------------------------------------------------------

def test_it_is_time_after_1_2_4_8_steps():
    assert [t for t in range(1, 300) if is_trigger(t)] == [1, 2, 4, 8, 16, 32, 64, 128, 256]


def test_attention_and_mlp_move_and_nothing_else(learner):
    jumps = jumps_of(learner()[0])
    still = {name for name, _ in jumps.learner.student.model.named_parameters()} - set(jumps.moving)
    assert still == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                     "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
    assert all(".self_attn." in name or ".mlp." in name for name in jumps.moving) and len(jumps.moving) == 9


def test_a_jump_from_w_is_that_of_a_chain_of_jumps(learner):
    made, segments = learner(most=3)
    made.step(segments, 2)                               # step 3: no trigger
    jumps, now = jumps_of(made), jumps_of(made).copies()
    chained = {name: w.clone() for name, w in now.items()}
    for k in (1, 2, 3):
        jumps.move(now, k)
        for name, p in jumps.moving.items():
            d = now[name] - jumps.ref[name]
            chained[name] += 2 * d
            torch.testing.assert_close(p.detach(), chained[name], rtol=1e-6, atol=1e-7)
            assert d.abs().max() > 0 and torch.equal(p.detach(), now[name] + 2 * k * d)
    jumps.move(now, 0)
    assert same(now, jumps.copies()), "bit for bit"


# -- what is accepted ------------------------------------------------------------------------------

VALUES = st.lists(st.floats(width=32) | st.sampled_from([0.0, 1.0]), min_size=6, max_size=6)


@given(VALUES, st.integers(0, 5), st.sampled_from(sorted(BETTER)))
def test_the_best_is_taken_up_to_the_first_that_is_not_better(given_values, most, gate):
    better = BETTER[gate]
    k, values = climb(lambda i: given_values[i], most, better)
    assert len(values) in (k + 1, k + 2) and k <= most
    assert all(better(values[i + 1], values[i]) for i in range(k)), "each accepted one is strictly better"
    assert len(values) == most + 1 if len(values) == k + 1 else not better(values[k + 1], values[k])
    assert k == 0 or not (math.isnan(values[k]) or math.isnan(values[0])), "nan is never better, and nothing than nan"


def test_where_every_candidate_is_worse_the_weights_are_those_of_the_optimizer(learner):
    """The gate sees all words: to an estimate from few of them, noise may look better."""
    made, segments = learner("reverse_dense")
    plain, _ = learner("reverse_dense", gate="")
    noise = torch.Generator().manual_seed(0)
    for ref in jumps_of(made).ref.values():                  # D is then mostly noise
        ref += torch.randn(ref.shape, generator=noise)
    event, = made.step(segments, 0).events
    plain.step(segments, 0)
    assert event["k"] == 0 and len(event["values"]) == 2 and event["values"][1] > event["values"][0]
    assert same(weights(made), weights(plain)) and same(jumps_of(made).ref, jumps_of(made).copies())


def test_a_direction_that_helps_is_gone_on_with(learner):
    """Eight steps of the forward KL over all words on the rollouts that the gate holds: no noise, and the same goal."""
    made, segments = learner("forward_dense", lr=3e-4)
    before = jumps_of(made).copies()
    events = [event for version in range(8) for event in made.step(segments, version).events]
    assert [len(e["values"]) for e in events] >= [2] * 4 and sum(e["k"] for e in events) > 0
    first = events[0]
    assert first["k"] > 0 and first["values"][first["k"]] == min(first["values"])
    assert first["tokens"] == sum(len(s.tokens) for s in segments) * len(first["values"])
    assert not same(before, jumps_of(made).ref) and same(jumps_of(made).ref, jumps_of(made).copies())


def test_the_best_of_several_is_put_back_exactly(learner, monkeypatch):
    made, segments = learner()
    seen, said = [], iter([1.0, 0.5, 0.3, 0.4])
    monkeypatch.setattr(jumps_of(made), "kl", lambda: seen.append(jumps_of(made).copies()) or next(said))
    event, = made.step(segments, 0).events
    assert (event["k"], event["values"]) == (2, [1.0, 0.5, 0.3, 0.4])
    assert same(jumps_of(made).copies(), seen[2]) and same(jumps_of(made).ref, seen[2]) and not same(seen[2], seen[1])


def test_a_learner_told_to_hurry_keeps_the_best_so_far(learner, monkeypatch):
    made, segments = learner()
    link, said, seen = Link(None, torch.zeros(2)), iter([1.0, 0.5, 0.3]), []

    def value():
        seen.append(jumps_of(made).copies())
        link.pulse[1] = len(seen) == 2
        return next(said)
    monkeypatch.setattr(jumps_of(made), "kl", value)
    event, = made.step(segments, 0, link).events
    assert (event["k"], event["values"]) == (1, [1.0, 0.5, None]) and same(jumps_of(made).copies(), seen[1])


def test_answers_are_not_drawn_to_the_end_when_the_run_is_told_to(learner, monkeypatch):
    made, segments = learner()
    link, seen = Link(None, torch.zeros(2)), []

    def value():                                         # as the gate `accuracy`, which asks after every token
        seen.append(jumps_of(made).copies())
        link.pulse[1] = len(seen) == 3
        jumps_of(made).one_token()
        return 1.0 / len(seen)
    monkeypatch.setattr(jumps_of(made), "kl", value)
    event, = made.step(segments, 0, link).events
    assert (event["k"], event["values"]) == (1, [1.0, 0.5, None]) and same(jumps_of(made).copies(), seen[1])


# -- the gate `kl` ---------------------------------------------------------------------------------

@pytest.mark.parametrize("estimator", ["reverse_mc", "forward_topk", "reverse_dense"])
def test_the_gate_is_the_forward_kl_of_a_naive_loop(learner, estimator):
    made, segments = learner(estimator, micro_tokens=20)
    made.student.chunk = 2
    student, teacher = (load_model(folder, "cpu", torch.float32) for folder in (made.cfg.student, made.cfg.teacher))
    jumps_of(made).set, total, n = kept_copies(segments), 0.0, made.estimator.drawn(segments[0].ids.shape[1])
    for s in segments:
        for t in range(len(s)):
            with torch.no_grad():
                logp, logq = (m(s.tokens[None, :s.start + t].long()).logits[0, -1].log_softmax(-1)
                              for m in (student, teacher))
            if estimator == "reverse_dense":
                total += (logq.exp() * (logq - logp)).sum().item()
            else:
                a = s.ids[t, :n].long()
                total += ((logq[a] - s.logpi[t, :n]).exp() * (logq[a] - logp[a])).sum().item()
    assert jumps_of(made).kl() == pytest.approx(total / sum(map(len, segments)), rel=1e-4)


def test_the_reverse_estimate_likes_a_student_that_has_forgotten_every_word_and_the_gate_does_not(learner):
    made, segments = learner()
    jumps_of(made).set = kept_copies(segments[:2])
    said = torch.cat([s.ids for s in jumps_of(made).set]).long().unique()
    assert len(said) < 32, "of 32 words some were not drawn"

    def reverse():
        rows = made.student.rows(jumps_of(made).set)
        ids, logpi, logq = (made.cached(jumps_of(made).set, name) for name in ("ids", "logpi", "logq"))
        return reverse_value(made.student.logp(rows, ids.long()), logq, logpi).mean().item()
    before = reverse(), jumps_of(made).kl()
    forget = torch.zeros(len(made.student.head.weight))
    forget[said] = -30.0
    made.student.head.bias = torch.nn.Parameter(forget)          # the others share all of its mass
    after = reverse(), jumps_of(made).kl()
    assert after[0] < before[0] and abs(after[0]) < 1e-3, "the estimate has it for a perfect student"
    assert after[1] > before[1] + 1, "the gate has not"


def test_nan_is_never_accepted_and_what_is_nan_is_not_kept(learner):
    made, segments = learner()
    bad = dataclasses.replace(segments[1], slot=9, logq=torch.full_like(segments[1].logq, torch.nan))
    assert [len(s) for s in kept_copies([segments[0], bad, segments[2]])] == [len(segments[0]), len(segments[2])]
    for ref in jumps_of(made).ref.values():
        ref.fill_(torch.nan)                             # every candidate is nan
    event, = made.step(segments, 0).events
    assert event["k"] == 0 and event["values"][1] is None
    assert all(p.isfinite().all() for p in made.student.model.parameters())
    made.student.model.lm_head.weight.data.fill_(torch.nan)      # and a student that is: nothing is better than that
    event, = made.step(segments, 1).events
    assert event["k"] == 0 and event["values"] == [None, None]


def test_the_set_is_that_of_the_first_batch_and_a_copy(learner):
    made, segments = learner()
    jumps_of(made).set = []
    assert not made.step(segments[:2], 0).events, "these rollouts are the set, and no judges of this step"
    first = [s.logq.clone() for s in jumps_of(made).set]
    made.step(segments[2:], 1)
    segments[0].logq.zero_()
    assert len(first) == 2 and all(torch.equal(a, s.logq) for a, s in zip(first, jumps_of(made).set))


def pieces(s, n):
    """A response that is cut after n tokens: its beginning, and its rest."""
    def part(rows, start, stop):
        return dataclasses.replace(s, tokens=s.tokens[:stop], start=start, **{
            name: getattr(s, name)[rows] for name in ("version", "ids", "logpi", "logmu", "logq", "hidden")})
    return part(slice(0, n), s.start, s.start + n), part(slice(n, None), s.start + n, len(s.tokens))


@pytest.mark.parametrize("cut", [(), (0,), (0, 1)])
def test_no_response_judges_a_direction_that_it_has_made(folders, monkeypatch, cut):       # noqa: F811
    """Nine batches. At every trigger: the uids that judge, and those of the steps from W_ref to W_t. The responses
    `cut` begin in the first batch and end in the third."""
    cfg = with_effopd(folders, "reverse_mc", lr=1e-3, max_prompt=30)
    segments = filled(cfg, folders, responses=18)[1]
    uids = {tuple(s.tokens[:s.prompt].tolist()): uid for uid, s in enumerate(segments)}
    batches = [segments[i:i + 2] for i in range(0, 18, 2)]
    for uid in cut:
        batches[0][uid], rest = pieces(segments[uid], 2)
        batches[2] = [*batches[2], rest]
    made = Learner(cfg, "cpu", torch.float32)
    jumps, judged = jumps_of(made), {}

    def uids_of(of):
        return {uids[tuple(s.tokens[:s.prompt].tolist())] for s in of}

    def judge():
        began, = [i for i, w in enumerate(after) if same(w, jumps.ref)]
        judged[len(after)] = uids_of(jumps.set), uids_of(s for batch in batches[began:len(after)] for s in batch)
        return 0.0
    monkeypatch.setattr(jumps, "kl", judge)
    after = [jumps.copies()]
    for version, batch in enumerate(batches):
        made.step(batch, version)
        after.append(jumps.copies())
    assert list(judged) == [2, 4, 8] and all(judges and not judges & makers for judges, makers in judged.values())
    assert judged[2] == ({0, 1}, {2, 3})
    assert judged[8][0] == ({0, 1} - set(cut) or {4, 5, *cut})


@pytest.mark.parametrize("estimator", ["reverse_mc", "forward_dense"])
def test_a_checkpoint_remembers_where_it_jumps_from_and_by_which_rollouts(learner, tmp_path, estimator):
    made, segments = learner(estimator)
    for version in range(3):
        made.step(segments, version)
    partial = unsealed(tmp_path, 3)
    made.checkpoint(partial)
    folder = seal(partial, State(3, 9, [], {}))
    other = Learner(made.cfg, "cpu", torch.float32, str(folder))
    assert same(jumps_of(made).ref, jumps_of(other).ref) and not same(jumps_of(made).ref, jumps_of(other).copies())
    for version in range(3, 8):
        a, b = made.step(segments[1:], version), other.step(segments[1:], version)
        for event in a.events + b.events:
            event.pop("seconds")
        assert a == b
    assert same(weights(made), weights(other)) and same(jumps_of(made).ref, jumps_of(other).ref)


# -- two learners ----------------------------------------------------------------------------------

def jump(cfg, segments, ranks, folder):
    """A step and its jump, and from its checkpoint another."""
    learner = Learner(cfg, "cpu", torch.float32, ranks=ranks)
    jumps_of(learner).set = kept_copies(segments)
    first = learner.step(segments, 0).events
    learner.checkpoint(folder)
    ranks.all("learner 0 has written it")
    again = Learner(cfg, "cpu", torch.float32, str(folder), ranks)
    events = first + again.step(segments, 1).events
    ess = jumps_of(again).sample_sizes(segments, Link(None, torch.zeros(2)))
    return events, ess, ranks.collect(again.student.model.named_parameters())


def one_of_two(rank, cfg, segments, root):
    torch.set_num_threads(1)
    ranks = Ranks(rank, 2, str(root / "meeting"))
    torch.save(jump(cfg, segments, ranks, root / "two"), root / f"{rank}.pt")
    ranks.leave()


@pytest.mark.parametrize("estimator", ["forward_dense"])
def test_two_learners_jump_as_one(folders, tmp_path, estimator):       # noqa: F811
    cfg = with_effopd(folders, estimator, lr=3e-4, learners=2, micro_tokens=20)
    segments = filled(cfg, folders, responses=5)[1]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    in_two(one_of_two, cfg, segments, tmp_path)
    (a, ess_a, one), (b, ess_b, two), (c, ess_c, _) = (
        jump(cfg, segments, Ranks(), tmp_path / "one"), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert [e["k"] for e in a] == [e["k"] for e in b] == [e["k"] for e in c] and a[0]["k"] > 0
    assert [e["values"] for e in b] == [e["values"] for e in c] and [e["tokens"] for e in a] == [e["tokens"] for e in b]
    assert ess_b == ess_c == pytest.approx(ess_a, rel=1e-3)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)


# -- the gate `accuracy` ---------------------------------------------------------------------------

@pytest.mark.parametrize("again", [False, True])
def test_the_learners_engine_draws_what_an_engine_of_its_own_weights_draws(folders, again):       # noqa: F811
    cfg = with_effopd(folders, "reverse_mc", gate="accuracy", gradient_checkpointing=again, max_running=3)
    learner = Learner(cfg, "cpu", torch.float32)
    apart, prompts = HFEngine(cfg, "cpu", torch.float32), [[3, 4], [5, 6, 7], [8], [9, 4], [7, 7, 7]]
    sent, link = [], Link(None, torch.zeros(2))
    link.send, link.answer = lambda kind, **body: sent.append(body["answers"]), lambda wanted: 0.25
    jumps = jumps_of(learner)
    jumps.validation_prompts, jumps.link = prompts, link
    assert jumps.accuracy() == jumps.accuracy() == 0.25
    assert sent[0] == sent[1] == apart.complete(prompts, cfg.max_response, temperature=1.0, stream=3)
    assert sent[0] != apart.complete(prompts, cfg.max_response, temperature=1.0), "not the draws of an evaluation"
    assert isinstance(jumps.engine, OwnEngine) and jumps.tokens == 2 * sum(map(len, sent[0]))
    assert all(layer.training == again for layer in learner.student.model.model.layers)


def test_orders_that_come_while_an_answer_is_waited_for_are_heard_afterwards():
    ours, theirs = multiprocessing.Pipe()
    link = Link(ours, torch.zeros(2))
    orders = [("checkpoint", "a"), ("export", "b"), ("validation_share", 0.5), ("stop", None)]
    sender = threading.Thread(target=lambda: [(time.sleep(0.01), theirs.send(x)) for x in orders])
    sender.start()
    assert link.answer("validation_share") == 0.5
    sender.join()
    assert list(link.orders(wait=False)) == [orders[0], orders[1], orders[3]], "in their order"


def test_fifty_training_rows_are_graded_and_memory_is_counted(config):
    cfg, job = prepare(config(extend="effopd", effopd__gate="accuracy"))
    asked = job.validation_prompts
    assert len(asked) == 50 and asked == job.prompts[:50] != job.eval_prompts[:50]
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    sums = [f";{eval(tokenizer.decode(prompt)[:-1])}" for prompt in asked]
    sums[7] = ";5"
    _, grades = job.grade_validation([[tokenizer.encode(s)] for s in sums])
    assert [right for right, in grades] == [i != 7 for i in range(50)]
    shape = Shape(P=1000, V=32, L=1, H=HIDDEN, I=96, A=64, K=64)
    needs = {gate: needs_of(config(**dict(extend="effopd", effopd__gate=gate) if gate else {}), shape)
             for gate in ("", "kl", "accuracy")}
    assert "extensions" not in needs[""] and needs["accuracy"]["extensions"]["extensions"] * 1e9 == 8000
    batch = needs["kl"]["extensions"]["extensions"] - 8e-6
    assert batch * 5 == pytest.approx(needs["kl"]["shared"]["cache"]), "the gate's set is a batch, of 4 + 1"
    assert needs["accuracy"]["learner"]["extensions"] * 1e9 == 16 * (16 + 12) * 2 * 64 * 4
    assert "extensions" not in needs["kl"]["learner"]
    checkpoint = {gate: Extensions.load(config(extend="effopd", effopd__gate=gate)).extra_gb(ModelPair(shape, shape))
                  for gate in BETTER}
    assert all(gb["checkpoint"] * 1e9 == 4000 for gb in checkpoint.values())


def needs_of(cfg, shape) -> dict[str, dict[str, float]]:
    """By worker, the parts of its memory."""
    added = plan.additions(cfg, Extensions.load(cfg), ModelPair(shape, shape))
    return {n.worker: n.parts for n in plan.memory(cfg, shape, shape, added=added)}


# -- the flush -------------------------------------------------------------------------------------

def test_a_response_is_weighed_by_its_emitted_tokens(learner):
    made, segments = learner(micro_tokens=20)
    model, link = load_model(made.cfg.student, "cpu", torch.float32), Link(None, torch.zeros(2))
    found = jumps_of(made).sample_sizes(segments, link)
    assert set(found) == {s.slot for s in segments} and link.pulse[0] > 0
    for s in segments:
        with torch.no_grad():
            logp = model(s.tokens[None].long()).logits[0].log_softmax(-1)
        w = (torch.stack([logp[s.start + t - 1, s.ids[t, 0].long()] for t in range(len(s))]) - s.logmu).exp()
        assert found[s.slot] == pytest.approx((w.sum() ** 2 / (w ** 2).sum() / len(s)).item(), rel=1e-4) and len(s) > 1
    assert len({round(x, 3) for x in found.values()}) > 1 and all(0 < x < 1 for x in found.values())


# -- real runs -------------------------------------------------------------------------------------

FORKED = """
import multiprocessing.forkserver, os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, {root!r})
import torch, transformers
torch.set_num_threads(1)
import asyncopd
from control import controller as run
from control.scheduler import Scheduler
from extensions import effopd
torch.multiprocessing.get_context = lambda method=None: multiprocessing.context._concrete_contexts["fork"]
multiprocessing.forkserver.ensure_running = lambda: None
{patch}
sys.exit(asyncopd.main(sys.argv[1:]))
"""
ALWAYS = "effopd.BETTER['kl'] = lambda a, b: True"
NEVER = "effopd.BETTER['kl'] = effopd.BETTER['accuracy'] = lambda a, b: False"


def begun(flags, patch="", *more) -> Process:
    """The command, its workers forked, so that they are patched too."""
    given_flags = [as_flag(name.replace("__", "."), value) for name, value in flags.items()]
    return Process([sys.executable, "-c", FORKED.format(root=str(ROOT), patch=patch), *given_flags, *more])


def ran(flags, patch="", *more) -> list[dict]:
    process = begun(flags, patch, *more)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return lines(flags)


def jumping(most=5, gate="kl") -> dict:
    return dict(extend="effopd", effopd__gate=gate, effopd__most=most)


def events(log, what):
    return [line for line in log if line.get("what") == what]


@pytest.mark.parametrize("rule, light", [("cut", 0.0), ("cut", 2.0), ("keep", 0.5), ("drop", 0.5)])
def test_after_every_jump_the_pipeline_empties_and_all_tokens_are_accounted_for(flags, rule, light):
    """Two tries are accepted whatever they are worth; `light` is the ESS below which a response is dropped."""
    log = ran(flags | jumping(2) | dict(steps=9, batch=4, max_ahead=4, max_lag=6, overdue=rule, rollouts=2),
              f"{ALWAYS}; effopd.MIN_ESS = {light}")
    jumps, flushes, last = events(log, "effopd"), events(log, "flush"), log[-1]
    assert [e["step"] for e in jumps] == [2, 4, 8] and all(e["k"] == 2 and len(e["values"]) == 3 for e in jumps)
    assert [e["step"] for e in flushes] == [2, 4, 8]
    assert last["tokens_generated"] == sum(last[f"tokens_{x}"] for x in ("trained", "in_flight", "dropped", "lost"))
    assert last["tokens_dropped"] == sum(e["dropped_tokens"] for e in flushes) or rule == "drop"
    assert (light == 2.0) <= all(e["dropped"] >= e["examined"] > 0 for e in flushes)
    assert light > 0.0 or last["tokens_dropped"] == 0 < sum(e["cut_tokens"] for e in flushes)
    assert rule != "drop" or sum(e["cut"] for e in flushes) == 0
    assert max(s["lag_max"] for s in steps(flags)) <= 6
    assert light < 2.0 or all(s["lag_max"] <= s["step"] - 1 - max(t for t in (0, 2, 4, 8) if t < s["step"])
                              for s in steps(flags)), "where all is dropped, nothing is older than the last jump"


def test_a_gate_that_accepts_nothing_changes_nothing(flags, tmp_path):
    """Its generation has random numbers of its own; the weights come back bit for bit."""
    runs = [flags | dict(steps=4, schedule="sync", out=str(tmp_path / name)) for name in ("a", "b", "c")]
    logs = [ran(runs[0]), ran(runs[1] | jumping(gate="accuracy"), NEVER), ran(runs[2] | jumping(), NEVER)]
    assert [e["k"] for log in logs[1:] for e in events(log, "effopd")] == [0] * (3 + 2) and not events(logs[1], "flush")
    assert all(e["values"] == [0.0, 0.0] and e["tokens"] > 100 for e in events(logs[1], "effopd")), "of random models"
    a, b, c = (load_file(Path(run["out"]) / "student" / "model.safetensors") for run in runs)
    assert same(a, b) and same(a, c)


@pytest.mark.parametrize("victim", ["parent", "learner"])
def test_a_killed_and_resumed_run_ends_as_an_undisturbed_one(flags, tmp_path, victim):
    whole, halved = (flags | jumping(2) | dict(steps=17, schedule="sync", save_every=3, batch=4,
                                               out=str(tmp_path / name)) for name in ("whole", "halved"))
    ran(whole, ALWAYS)
    process, limit = begun(halved, ALWAYS), time.monotonic() + 60
    log = Path(halved["out"]) / "log.jsonl"
    while time.monotonic() < limit and not (log.exists() and '"step": 5,' in log.read_text()):
        time.sleep(0.01)
    if victim == "parent":
        process.kill()
    else:
        import os
        os.kill(lines(halved)[0]["pids"]["learner"], signal.SIGKILL)
    assert process.wait(60) != 0
    process.stderr.close()
    again = ran({"out": halved["out"]}, ALWAYS, "--resume")
    assert events(again, "resumed")[0]["step"] in (3, 6, 9, 12, 15), "it was killed in its middle"
    assert {e["step"] for e in events(again, "effopd")} >= {2, 4, 8, 16}
    a, b = (load_file(Path(run["out"]) / "student" / "model.safetensors") for run in (whole, halved))
    assert same(a, b) and [s["loss"] for s in steps(whole)] == [s["loss"] for s in steps(halved)]


@pytest.mark.parametrize("victim", ["rollout0", "teacher0"])
def test_a_worker_that_dies_in_a_flush_is_restarted_and_the_flush_ends(flags, victim):
    """The parent kills it as it asks for the cut, when the pipeline is full."""
    patch = f"""
{ALWAYS}
import os, signal
trained = Scheduler.trained
def deadly(scheduler, flush=False):
    if flush and scheduler.version == 3:
        os.kill(next(handle.process.pid for handle in RUN[0].pool if handle.name == {victim!r}), 9)
    return trained(scheduler, flush)
Scheduler.trained = deadly
RUN, start = [], run.Controller.start
run.Controller.start = lambda self, resume=None: (RUN.append(self), start(self, resume))[1]
"""
    log = ran(flags | jumping(1) | dict(steps=9, batch=4, max_ahead=4), patch)
    assert [e["worker"] for e in events(log, "restarted")] == [victim]
    assert [e["step"] for e in events(log, "flush")] == [2, 4, 8]
    assert log[-1]["tokens_generated"] == sum(log[-1][f"tokens_{x}"] for x in
                                              ("trained", "in_flight", "dropped", "lost"))


def test_an_interrupt_in_a_flush_saves_and_goes_on(flags):
    """The signal comes when the learner is to examine what was in flight."""
    patch = f"""
{ALWAYS}
import os, signal
for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, run.SIGNALS)
to_examine = Scheduler.to_examine
def told(scheduler):
    old = to_examine(scheduler)
    if old is not None and scheduler.version == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return old
Scheduler.to_examine = told
"""
    flags |= jumping(1) | dict(steps=9, batch=4, max_ahead=4)
    process = begun(flags, patch)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "step-4" in err, err
    log = ran({"out": flags["out"]}, ALWAYS, "--resume")
    assert [s["step"] for s in steps(flags)] == list(range(1, 10)) and 8 in {e["step"] for e in events(log, "flush")}
    assert log[-1]["tokens_generated"] == sum(log[-1][f"tokens_{x}"] for x in
                                              ("trained", "in_flight", "dropped", "lost"))

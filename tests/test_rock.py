"""Rock Tokens: the mask, the denominator, the bypass, the choice and its versions; runs that bypass or are resumed."""
# ruff: noqa: F811
import dataclasses
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cache import Segment, Slots
from control.resolve import configure
from engines.drawn import Drawn
from engines.hf import HFEngine
from estimators import ESTIMATORS
from extension import ModelPair, Step
from extensions import rock
from extensions.rock import AUDITED, CHOSEN, COUNT, Rock, audited, choose
from learner import Learner, summarize
from models.alignment import kept_rows
from models.loading import load_model
from models.sharding import Ranks
from rollout import Worker
from teacher import TeacherCheck, score
from tests.runs import command, complete, in_two, lines, run, start_and_wait_for, steps
from tests.test_supports import HIDDEN, VOCAB, T, config, gradient
from tests.test_supports import models as folders  # noqa: F401
from transport.shared import SharedMemory

ROCKS = list(range(0, VOCAB, 2))       # half of the words of models that know nothing


def drawn(cfg, folders, responses=5) -> list[tuple]:
    """(prompt, tokens, ids, logpi, logmu, versions) of responses of the stale student."""
    engine = HFEngine(dataclasses.replace(cfg, student=str(folders / "stale")), "cpu", torch.float32)
    engine.ends = set()
    prompts = [[3 + (s + i) % 10 for i in range(2 + s)] for s in range(responses)]
    out = {}
    for s, prompt in enumerate(prompts):
        engine.add(s, prompt, T - s % 3, uid=s, position=0)
    while engine.rows or engine.new:
        out |= engine.take(engine.step())
    return [(prompts[s], *out[s]) for s in range(responses)]


def write(cfg, slots: Slots, bypass: dict[str, Tensor], s: int, drawn: tuple[Tensor, ...]) -> None:
    """What a rollout worker does with new tokens (tokens, ids, logpi, logmu, versions) of slot s."""
    engine = SimpleNamespace(take=lambda wanted: {wanted[0]: Drawn(*drawn)})
    worker = Worker(cfg, None, SharedMemory(slots=slots, weights=None, tensors=bypass), engine)
    worker.flush([s])


def scored(cfg, responses: list[tuple], bypass: dict[str, Tensor] | None = None) -> tuple[Slots, list[Segment]]:
    """Slots as they reach the learner; every response is handed over in two pieces. `bypass`: shared tensors."""
    row = ESTIMATORS[cfg.estimator]
    slots = Slots(len(responses), cfg.max_prompt, T, row.columns(cfg.mc_samples, cfg.top_k),
                  hidden=HIDDEN if row.support == "full" else 0, sparse=bypass is not None)
    for s, (prompt, *parts) in enumerate(responses):
        slots.open(s, 10 + s, prompt, len(prompt), 0)
        for piece in (slice(0, 2), slice(2, None)):
            new = [x[piece] for x in parts]
            if bypass is None:
                slots.append(s, *new)
            else:
                write(cfg, slots, bypass, s, new)
    score(load_model(cfg.teacher, "cpu", torch.float32), [slots.read(s) for s in range(len(responses))], slots,
          row.support, VOCAB, seed=cfg.seed)
    return slots, [slots.read(s) for s in range(len(responses))]


def bypassing(cfg, rocks=ROCKS) -> dict[str, Tensor]:
    """The shared tensors, as the learner has written them."""
    flags = Rock.Flags(**cfg.extensions["rock"])
    shared = Rock("rock", cfg, flags).shared_tensors(ModelPair(SimpleNamespace(V=VOCAB), None))
    shared[CHOSEN][rocks] = True
    return shared


def with_rock(folders, estimator="reverse_mc", *, weight, k=3, every=20, types="", **more):
    own = dict(weight=weight, k=k, every=every, types=types)
    return config(folders, estimator, **dict(task="toy") | more, extend="rock", extensions={"rock": own})


def rocky(folders, estimator="reverse_mc", rocks=ROCKS, weight=0.0, **more):
    """With a fixed set."""
    return with_rock(folders, estimator, **dict(weight=weight, types=",".join(map(str, rocks))) | more)


@pytest.fixture(autouse=True)
def every_row_is_a_word(monkeypatch):
    """The tiny models draw rows that the tokenizer has no word for; --rock.types refuses these."""
    monkeypatch.setattr(rock, "fixed_types", lambda text, tokenizer: [int(x) for x in text.split(",")])


# -- mask and denominator ----------------------------------------------------------------------------

def weighed(folders, cfg, segments, weight) -> torch.Tensor:
    """The gradient, a sequence at a time; weight(segment, t) of the loss at y_t, which is none of its candidates."""
    model, total = load_model(cfg.student, "cpu", torch.float32), 0.0
    for s in segments:
        logp = model(s.tokens[None].long()).logits[0, s.start - 1:-1].log_softmax(-1).gather(-1, s.ids.long())
        w = (logp - s.logpi).detach().exp() * s.ids.shape[1]
        losses = -(w * (s.logq - logp).detach() * logp)[:, 1:].mean(-1)
        total = total + sum(weight(s, t) * losses[t] for t in range(len(s)))
    (total / sum(map(len, segments))).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_weight_is_that_of_the_predicted_token_and_the_denominator_stays(folders):
    cfg = rocky(folders, weight=0.3)
    _, segments = scored(cfg, drawn(cfg, folders))
    got, measured = gradient(Learner(cfg, "cpu", torch.float32), segments)

    def by_token(shift):
        def weight(s, t):
            at = min(max(s.start + t + shift, 0), len(s.tokens) - 1)
            return 0.3 if int(s.tokens[at]) in ROCKS else 1.0
        return weight
    want = weighed(folders, cfg, segments, by_token(0))
    close = 1e-5 * want.abs().max().item()
    assert torch.allclose(got, want, atol=close), (got - want).abs().max()
    for shift in (-1, 1):
        assert not torch.allclose(got, weighed(folders, cfg, segments, by_token(shift)), atol=100 * close), "off by one"
    mass = sum(by_token(0)(s, t) for s in segments for t in range(len(s))) / sum(map(len, segments))
    assert mass < 0.9 and not torch.allclose(got, want / mass, atol=100 * close), "renormalised"
    plain = summarize([Learner(config(folders, "reverse_mc"), "cpu", torch.float32).backward(segments, 1)])
    assert measured["kl"] != plain["kl"] and measured["loss"] != pytest.approx(plain["loss"])


def test_the_weight_of_a_token_leaves_the_expected_gradient_that_of_the_divergence(folders):
    """All 3^4 candidates of a position, under a stale mu; with the emitted token among them it would be another."""
    cfg = rocky(folders, rocks=[1], weight=0.1)
    learner = Learner(cfg, "cpu", torch.float32)
    ids = torch.cartesian_prod(*[torch.arange(3)] * cfg.mc_samples)
    mu, q = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.2, 0.7, 0.1])
    chance = mu[ids].prod(-1)
    logits = torch.tensor([0.3, 0.9, -0.4], requires_grad=True)

    def gradient_of(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]
    logp = logits.log_softmax(-1)
    divergence = (logp.exp() * (logp - q.log())).sum()
    n = cfg.mc_samples
    cached = {"ids": ids, "logpi": mu.log()[ids] + math.log(n), "logmu": mu.log()[ids[:, 0]], "logq": q.log()[ids]}
    measured = learner.measure(logp[ids], None, cached, {})
    mass = 0.8 + 0.2 * 0.1
    torch.testing.assert_close(gradient_of((chance * measured["loss"]).sum()), mass * gradient_of(divergence))
    others = ids[:, 0] != 1
    torch.testing.assert_close((chance * measured["kl"])[others].sum() / chance[others].sum(), divergence.detach())
    every = learner.estimator.fn(logp[ids], cached["logq"], cached["logpi"]) * learner.extensions.weight(ids[:, 0])
    assert not torch.allclose(gradient_of((chance * every).sum()), mass * gradient_of(divergence), rtol=0.02)


@pytest.mark.parametrize("flags, remedy", [(["--mc-samples=1"], "--mc-samples 2"),
                                           (["--estimator=reverse_ppo"], "--estimator reverse_mc")])
def test_a_weight_by_the_only_candidate_is_refused(flags, remedy):
    with pytest.raises(ValueError, match=f"only candidate.*{remedy}"):
        configure(["--task=toy", "--gpus=0", "--extend=rock", *flags])
    configure(["--task=toy", "--gpus=0", "--extend=rock", "--estimator=forward_topk", "--mc-samples=1"])


# m2po's margins follow from what is stored
@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.head and name != "m2po"])
def test_a_bypass_is_a_weight_of_zero(folders, name):
    """The same gradient whether rocks are stored and weighed 0, or 95% of them are nowhere."""
    cfg = rocky(folders, name)
    responses = drawn(cfg, folders)
    want, _ = gradient(Learner(cfg, "cpu", torch.float32), scored(cfg, responses)[1])
    _, segments = scored(cfg, responses, bypassing(cfg))
    assert sum(len(s.ids) for s in segments) < 0.8 * sum(map(len, segments))
    for size in (None, 1):
        got, _ = gradient(Learner(cfg, "cpu", torch.float32), segments, size)
        assert (got - want).norm() <= 3e-6 * want.norm(), (got - want).norm() / want.norm()
    unweighed, _ = gradient(Learner(config(folders, name), "cpu", torch.float32), scored(cfg, responses)[1])
    assert not torch.allclose(unweighed, want, atol=1e-3 * want.abs().max().item())


def test_a_step_counts_what_was_bypassed(folders):
    cfg = rocky(folders, minibatches=2, clip=1e9)
    responses = drawn(cfg, folders)
    (_, all_of_it), (_, segments) = scored(cfg, responses), scored(cfg, responses, bypassing(cfg))
    one, other = (Learner(cfg, "cpu", torch.float32) for _ in range(2))
    trained = one.step(all_of_it, 0), other.step(segments, 0)
    full, short = (t.metrics for t in trained)
    n, stored = sum(map(len, segments)), sum(len(s.ids) for s in segments)
    rocks = sum(int(y) in ROCKS for s in segments for y in s.tokens[s.start:])
    assert short["tokens"] == full["tokens"] == n and (full["stored"], short["stored"]) == (1.0, stored / n)
    assert short["rock"] == full["rock"] == pytest.approx(rocks / n) and short["loss"] == pytest.approx(full["loss"])
    assert n - stored >= 0.8 * rocks and not trained[1].skipped
    assert short["grad_norm"] == pytest.approx(full["grad_norm"], rel=1e-4), "the denominator is that of all"
    for a, b in zip(one.student.model.parameters(), other.student.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["reverse_mc", "m2po", "decoupled_ppo", "forward_topk", "forward_mc", "reverse_dense"])
def test_a_response_or_a_batch_of_which_nothing_is_stored_breaks_nothing(folders, name, monkeypatch):
    cfg = rocky(folders, name, rocks=range(VOCAB))
    monkeypatch.setattr(rock, "AUDITED", 0.0)
    responses = drawn(cfg, folders)
    bypass = bypassing(cfg, range(VOCAB))
    slots, segments = scored(cfg, responses, bypass)
    assert [len(s.ids) for s in segments] == [0] * 5 and TeacherCheck(cfg).see(segments) == ""
    learner = Learner(cfg, "cpu", torch.float32)
    trained = learner.step(segments, 0)
    metrics = trained.metrics
    assert not trained.skipped and metrics["stored"] == 0 and metrics["tokens"] == sum(map(len, segments))
    bypass[CHOSEN][:] = False
    slots.open(2, 12, responses[2][0], len(responses[2][0]), 0)
    write(cfg, slots, bypass, 2, responses[2][1:])
    score(load_model(cfg.teacher, "cpu", torch.float32), [slots.read(s) for s in range(5)], slots,
          ESTIMATORS[name].support, VOCAB)
    trained = learner.step([slots.read(s) for s in range(5)], 1)
    metrics = trained.metrics
    assert not trained.skipped and torch.tensor(metrics["kl"]).isfinite() and 0 < metrics["stored"] < 1


# -- what is stored ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["reverse_mc", "forward_topk", "reverse_topk", "reverse_dense"])
def test_a_slot_holds_a_row_per_kept_token_in_their_order(folders, name):
    cfg = rocky(folders, name)
    responses = drawn(cfg, folders)
    (_, want), (_, got) = scored(cfg, responses), scored(cfg, responses, bypassing(cfg))
    for a, b in zip(want, got):
        assert torch.equal(a.tokens, b.tokens) and len(a) == len(b) and a.kept is None
        y = a.tokens[a.start:]
        assert torch.equal(b.kept, ~torch.isin(y, torch.tensor(ROCKS)) | audited(cfg.seed, 10 + b.slot, 0, len(b)))
        for x in ("ids", "logpi", "logmu", "logq", "hidden"):
            assert torch.equal(kept_rows(getattr(a, x), [b]), getattr(b, x)), x
    held = sum(getattr(s, x).nbytes for s in got for x in ("ids", "logpi", "logmu", "logq", "hidden"))
    each = ESTIMATORS[name].bytes(cfg.mc_samples, cfg.top_k, 4 * HIDDEN)
    assert held == each * sum(int(s.kept.sum()) for s in got) < 0.8 * each * sum(map(len, got))


def test_without_rocks_nothing_is_indexed_or_copied(folders):
    cfg = config(folders, "reverse_mc")
    slots, segments = scored(cfg, drawn(cfg, folders))
    rows = torch.zeros(3, 2)
    assert kept_rows(rows, segments) is rows and slots.kept.numel() == 0
    assert Learner(cfg, "cpu", torch.float32).extensions == []
    assert all(s.kept is None and s.ids.data_ptr() == slots.ids[s.slot].data_ptr() for s in segments)


def test_the_rest_of_a_cut_response_is_kept_as_the_whole_would_have_been(folders):
    cfg, g = rocky(folders), torch.Generator().manual_seed(0)
    y = torch.randint(3, VOCAB, (200,), generator=g)
    bypass = bypassing(cfg)
    whole, parts = (Slots(2, 300, 200, 1, sparse=True) for _ in range(2))

    def add(slots, s, piece, version):
        new = y[piece]
        zeros = torch.zeros(len(new))
        write(cfg, slots, bypass, s, (new, new[:, None], zeros[:, None], zeros, zeros + version))
    whole.open(0, 7, [3, 4, 5], 3, 0)
    add(whole, 0, slice(0, 200), 0)
    parts.open(0, 7, [3, 4, 5], 3, 0)
    add(parts, 0, slice(0, 60), 0)
    parts.open(1, 7, parts.read(0).tokens, 3, 4)
    for piece in (slice(60, 61), slice(61, 61), slice(61, 200)):
        add(parts, 1, piece, 4)
    first, rest, all_of_it = parts.read(0), parts.read(1), whole.read(0)
    assert torch.equal(torch.cat([first.kept, rest.kept]), all_of_it.kept) and rest.start == 63
    assert torch.equal(torch.cat([first.ids, rest.ids]), all_of_it.ids)
    assert 0 < sum(int(x) in ROCKS for x in all_of_it.ids) < 0.2 * sum(int(x) in ROCKS for x in y), "audited ones"
    parts.length[1] = 0                                  # its worker died
    add(parts, 1, slice(60, 200), 5)
    assert torch.equal(parts.read(1).ids, rest.ids)


def test_five_per_cent_are_audited_and_always_the_same_ones():
    found = torch.stack([audited(0, uid, 0, 1000) for uid in range(200)])
    assert found.float().mean() == pytest.approx(AUDITED, abs=0.002)
    assert found.float().mean(0).std() < 0.03, "at every position alike"
    assert torch.equal(audited(0, 5, 300, 80), found[5, 300:380])
    assert not torch.equal(audited(1, 5, 0, 1000), found[5]) and not torch.equal(found[6], found[5])


# -- the choice --------------------------------------------------------------------------------------

#        n    m  mean early
STATS = [(150, 150, 2.0, 2.0),         # 0 rock, R = 300
         (400, 400, 1.0, 1.2),         # 1 rock, R = 400
         (100, COUNT - 1, 3.0, 3.0),   # 2 too few measurements
         (100, 100, 2.5, 4.0),         # 3 falls
         (900, 900, 0.5, 0.5),         # 4 the median: not above it
         (900, 900, 0.1, 0.1), (900, 900, 0.1, 0.1), (900, 900, 0.1, 0.1),
         (100, 100, 2.5, torch.nan),   # 8 no early mean: whether it stays is not known
         (0, 0, torch.nan, torch.nan),
         (320, COUNT, 0.9, 1.0),       # 10 rock, R = 288: of a bypassed type n counts all
         (900, 900, 0.1, 0.1),
         (20, 20, 2.7, 2.7),           # 12 rare: R = 54, and the mean R is 203
         (900, 900, 0.1, 0.1)]


def chosen(k, **changes) -> list[int]:
    """By changes of STATS, {type: row}."""
    rows = [changes.get(f"t{i}", row) for i, row in enumerate(STATS)]
    return choose(*torch.tensor(rows, dtype=torch.float64).T, k).nonzero()[:, 0].tolist()


def test_every_clause_of_the_rule_decides_something():
    assert chosen(9) == [0, 1, 10]
    assert [chosen(k) for k in (1, 2)] == [[1], [0, 1]], "the largest shares of the loss, not the largest means"
    assert 2 in chosen(9, t2=(100, COUNT, 3.0, 3.0))
    assert 3 in chosen(9, t3=(100, 100, 2.5, 3.1))
    assert 4 in chosen(9, t4=(900, 900, 0.5, 0.5), t1=(400, 400, 0.3, 0.3))
    assert 8 in chosen(9, t8=(100, 100, 2.5, 2.5))
    assert 12 in chosen(9, t12=(100, 100, 2.7, 2.7))
    assert choose(*torch.zeros(4, 3, dtype=torch.float64), 2).sum() == 0, "nothing was measured"


def rocks(cfg, kept=()) -> Rock:
    """At the only learner. `kept`: what `state` returned, of a run that goes on."""
    r = Rock("rock", cfg, Rock.Flags(**cfg.extensions["rock"]))
    r.attach(SimpleNamespace(student=SimpleNamespace(words=VOCAB), ranks=Ranks()), dict(kept))
    return r


def see(r: Rock, segments: list[Segment], measured: list[dict], version: int) -> list[dict]:
    """The events after a train batch."""
    return r.after_step(Step(segments, measured, version)).events


def batch(tokens, kl, measured=None) -> tuple[list[Segment], list[dict]]:
    """A train batch of one response and what two learners measured of it."""
    y = torch.tensor(tokens)
    column = y[:, None]
    s = Segment(slot=0, tokens=torch.cat([torch.tensor([3, 4]), y]), prompt=2, start=2, version=torch.zeros(len(y)),
                ids=column, logpi=column, logmu=column[:, 0], logq=column)
    at = torch.arange(len(y)) if measured is None else torch.tensor(measured)
    found = {"y": y[at], "kl": torch.tensor(kl)[at]}
    return [s], [{k: x[i::2] for k, x in found.items()} for i in (0, 1)]


def test_windows_hold_successive_versions_and_are_never_mixed(folders, tmp_path):
    r = rocks(with_rock(folders, weight=0.5, k=1, every=2, out=str(tmp_path)))
    style, rest = [5] * 20, [6] * 20 + [7] * 20
    assert see(r, *batch(style + rest, [2.0] * 20 + [1.0] * 40), 3) == []
    event, = see(r, *batch(rest, [1.0] * 40), 4)
    assert event == {"what": "rock", "versions": [3, 4], "types": 0, "ids": []}, "the early window chooses nothing"
    assert r.early[5] == 2.0 and r.early[6] == 1.0 and r.early[8].isnan()
    assert r.n.sum() == r.m.sum() == r.total.sum() == 0 and r.versions == []
    see(r, *batch(style + rest, [1.9] * 20 + [0.5] * 40), 5)
    assert (r.n[5], r.m[6], r.total[7]) == (20, 20, 10) and r.versions == [5]
    with pytest.raises(AssertionError, match="version 5 after those of"):
        see(r, *batch(style, [2.0] * 20), 5)
    event, = see(r, *batch(style + rest, [1.9] * 20 + [0.5] * 40), 6)
    assert event["versions"] == [5, 6] and event["ids"] == [5] and r.early[5] == 2.0, "the first mean stays"
    assert torch.equal(r.weight(torch.tensor([5, 6])), torch.tensor([0.5, 1.0]))
    said = json.loads((tmp_path / "rocks.json").read_text())
    about, = said["types"]
    assert said["versions"] == [5, 6] and said["rule"]["weight"] == 0.5 and about["example"] == "01" + "2" * 5
    assert about | {"example": 0} == {"id": 5, "word": "2", "count": 40, "measured": 40, "mean": pytest.approx(1.9),
                                      "early": 2.0, "entered": pytest.approx(1.9), "weight": 0.5, "example": 0,
                                      "share": pytest.approx(76 / 116)}


def test_a_bypassed_type_is_judged_by_its_audit_and_leaves_when_that_says_so(folders, tmp_path):
    cfg = with_rock(folders, weight=0.0, k=1, every=1, out=str(tmp_path))
    style, rest = [5] * 400, [6] * 20 + [7] * 20
    for audits, mean, stays in ((20, 1.9, True), (20, 1.0, False), (10, 1.9, False)):
        r, everything = rocks(cfg), list(range(440))
        see(r, *batch(style + rest, [2.0] * 400 + [1.0] * 40), 0)
        assert see(r, *batch(style + rest, [1.8] * 400 + [0.2] * 40), 1)[0]["ids"] == [5]
        assert r.entered[5] == pytest.approx(1.8)
        r = rocks(cfg, dict(r.state()))                        # as it goes on after a resumption
        kl = [mean] * 400 + [0.2] * 40
        event, = see(r, *batch(style + rest, kl, everything[:audits] + everything[400:]), 2)
        assert event["ids"] == [5] * stays
        about, = json.loads((tmp_path / "rocks.json").read_text())["types"]
        assert (about["count"], about["measured"], about["weight"]) == (400, audits, 0.0 if stays else 1.0)
        assert about["mean"] == pytest.approx(mean) and (about["entered"] == pytest.approx(1.8) if stays else
                                                         about["entered"] is None)


def test_an_update_that_was_not_made_is_not_measured(folders):
    r = rocks(with_rock(folders, weight=0.0, k=1, every=9))
    see(r, *batch([5, 6], [1.0, torch.nan]), 0)
    assert r.n[[5, 6]].tolist() == [1, 1] and r.m[[5, 6]].tolist() == [1, 0] and r.total.isfinite().all()


def test_a_fixed_set_is_measured_and_not_replaced(folders, tmp_path):
    r = rocks(rocky(folders, rocks=[9], weight=0.5, k=2, every=1, out=str(tmp_path)))
    for version in range(3):
        event, = see(r, *batch([5] * 20 + [6] * 20, [2.0] * 20 + [1.0] * 20), version)
        assert event["ids"] == [9]
    assert Rock.Flags(weight=0.5, k=2).every == 20


# -- runs --------------------------------------------------------------------------------------------

def one_of_two(rank, cfg, segments, folder):
    torch.set_num_threads(1)
    ranks = Ranks(rank, 2, f"{folder}/meeting")
    learner = Learner(cfg, "cpu", torch.float32, ranks=ranks)
    found = [learner.step(segments, version) for version in range(3)]
    state = dict(learner.extensions.state())
    torch.save(([dataclasses.asdict(trained) for trained in found], state), f"{folder}/{rank}.pt")
    ranks.leave()


def test_two_learners_come_to_the_set_of_one(folders, tmp_path):
    (tmp_path / "run").mkdir()
    cfg = with_rock(folders, weight=0.0, k=3, every=1, micro_tokens=20, out=str(tmp_path / "run"), learners=2)
    responses = drawn(cfg, folders, responses=6) * 30
    _, segments = scored(cfg, responses)
    in_two(one_of_two, cfg, segments, str(tmp_path))
    (a, of_a), (b, of_b) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a == b and of_a["rock/chosen"].any() and all(torch.equal(of_a[k].nan_to_num(), of_b[k].nan_to_num())
                                                             for k in of_a)
    one = Learner(cfg, "cpu", torch.float32)
    alone = [one.step(segments, version) for version in range(3)]
    assert json.loads((tmp_path / "run" / "rocks.json").read_text())["versions"] == [2, 2]
    assert [t.events for t in alone] == [t["events"] for t in a]
    assert alone[2].metrics["rock"] == a[2]["metrics"]["rock"] > 0


@pytest.mark.parametrize("engine, teacher", [("hf", "hf"), ("vllm", "vllm")])
def test_a_run_bypasses_from_its_first_token(flags, engine, teacher):
    if engine == "vllm":
        pytest.importorskip("vllm")
    done = run(flags | dict(steps=12, engine=engine, teacher_engine=teacher, max_ahead=2, max_lag=2,
                            rollouts=2, extend="rock", rock__weight=0, rock__k=2, rock__every=4,
                            rock__types="4,+,9,10,11"))
    assert done.returncode == 0, done.stderr
    log, last = steps(flags), lines(flags)[-1]
    tokens = sum(s["tokens"] for s in log)
    rocks, stored = (sum(s[k] * s["tokens"] for s in log) / tokens for k in ("rock", "stored"))
    assert stored == pytest.approx(1 - (1 - AUDITED) * rocks, abs=0.02) and rocks > 0.05
    assert last["tokens_trained"] == tokens and not any(s["skipped"] for s in log)
    assert last["tokens_generated"] == tokens + last["tokens_in_flight"] and max(s["lag_max"] for s in log) <= 2
    said = [x for x in lines(flags) if x.get("what") == "rock"]
    assert [x["versions"] for x in said] == [[0, 3], [4, 7], [8, 11]] and [x["step"] for x in said] == [4, 8, 12]
    types = json.loads((Path(flags["out"]) / "rocks.json").read_text())["types"]
    assert [t["word"] for t in types] == ["1", "6", "7", "8", "+"] and said[0]["ids"] == [4, 9, 10, 11, 13]
    assert 1 - rocks < stored and all(t["measured"] < t["count"] for t in types), "the audited ones, and no more"


def test_a_killed_and_resumed_run_ends_as_an_undisturbed_one(flags, tmp_path):
    flags |= dict(schedule="sync", steps=21, save_every=3, batch=16, extend="rock", rock__weight=0, rock__k=3,
                  rock__every=4)
    whole = flags | dict(out=str(tmp_path / "whole"))
    assert run(whole).returncode == 0
    process, _ = start_and_wait_for(flags, step=10)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = complete([*command(dict(out=flags["out"])), "--resume"])
    assert done.returncode == 0, done.stderr
    a, b = (load_file(f"{f['out']}/student/model.safetensors") for f in (whole, flags))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for key in ("loss", "rock", "stored"):
        assert [s[key] for s in steps(whole)] == [s[key] for s in steps(flags)]
    assert (Path(whole["out"]) / "rocks.json").read_text() == (Path(flags["out"]) / "rocks.json").read_text()
    chosen = [e["ids"] for e in lines(whole) if e.get("what") == "rock"]
    assert len(chosen) == 5 and all(chosen[1:]) and steps(whole)[-1]["stored"] < 0.99, "it did bypass what it chose"

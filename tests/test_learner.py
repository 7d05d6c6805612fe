"""One learner step against the same step written naively; splitting changes nothing; saving and publishing."""
import math
from dataclasses import replace

import pytest
import torch

from estimators import DENSE, ESTIMATORS
from learner import Interrupted, Learner, summarize
from models.head import sequence_logp
from models.loading import load_model
from record.metrics import METRICS
from tests.test_cache import filled
from transport.link import Link
from transport.weights import Weights


def ready(lengths, columns=4):
    """Slots as the learner gets them: drawn and scored."""
    slots = filled(lengths, columns=columns)
    g = torch.Generator().manual_seed(1)
    for s, n in enumerate(lengths):
        slots.logpi[s, :n] = -torch.rand(n, columns, generator=g) * 3 + math.log(columns)
        slots.logmu[s, :n] = slots.logpi[s, :n, 0] - math.log(columns)
        slots.logq[s, :n] = -torch.rand(n, columns, generator=g) * 5
    return slots, [slots.read(s) for s in range(len(lengths))]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def naive_gradient(folder, segments):
    """No padding, no packing, no chunks: one sequence and one position at a time, the formula as in the paper."""
    model = load_model(folder, "cpu", torch.float32)
    total, count, loss = 0.0, 0, 0.0
    for s in segments:
        for t in range(len(s)):
            logp = model(s.tokens[None, :s.start + t].long()).logits[0, -1].log_softmax(-1)
            for n in range(s.ids.shape[1]):
                x = logp[s.ids[t, n].long()]
                weight = (x - s.logpi[t, n]).exp().item()
                loss = loss - weight * (s.logq[t, n] - x).item() * x
            count += 1
    total = loss / count
    total.backward()
    return total.item(), gradients(model)


def test_a_step_equals_a_naive_loop_without_padding(config, models):
    _, segments = ready([5, 1, 7, 3])
    before = [tuple(x.clone() for x in (s.tokens, s.ids, s.logpi, s.logmu, s.logq, s.version)) for s in segments]
    learner = Learner(config(micro_tokens=24), "cpu", torch.float32)
    learner.student.chunk = 6
    start = {k: v.clone() for k, v in learner.student.model.state_dict().items()}
    count = sum(map(len, segments))
    measured = [learner.backward([s], count) for s in segments]
    loss, wanted = naive_gradient(models["student"], segments)
    got = gradients(learner.student.model)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert summarize(measured)["loss"] == pytest.approx(loss, rel=1e-4)
    for s, x in zip(segments, before):
        after = s.tokens, s.ids, s.logpi, s.logmu, s.logq, s.version
        assert all(torch.equal(a, b) for a, b in zip(after, x)), "inputs changed"
    now = learner.student.model.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in now.items()), "no update was asked for"


@pytest.mark.parametrize("split", [(1, 10_000), (20, 10_000), (10_000, 1), (33, 5)])    # micro_tokens, chunk
def test_micro_batches_and_chunks_change_nothing(config, split):
    _, segments = ready([5, 1, 7, 3])
    results = []
    for micro_tokens, chunk in ((10_000, 10_000), split):
        learner = Learner(config(clip=1e9, micro_tokens=micro_tokens), "cpu", torch.float32)
        learner.student.chunk = chunk
        metrics = learner.step(segments, version=4).metrics
        results.append((metrics, dict(learner.student.model.named_parameters())))
    (m0, p0), (m1, p1) = results
    for key in m0:
        assert m1[key] == pytest.approx(m0[key], rel=1e-4, abs=1e-6), key
    for name in p0:
        torch.testing.assert_close(p1[name], p0[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_is_the_same_in_micro_batches_of_one_and_two_and_all(config, size):
    _, segments = ready([5, 1, 7, 3])
    learner = Learner(config(), "cpu", torch.float32)
    learner.backward(segments, 16)
    want = gradients(learner.student.model)
    learner.optimizer.zero_grad()
    for i in range(0, 4, size):
        learner.backward(segments[i:i + size], 16)
    for name, g in gradients(learner.student.model).items():
        assert (g - want[name]).norm() <= 1e-5 * want[name].norm(), name


def test_the_normaliser_is_the_number_of_positions_of_the_whole_batch(config):
    _, segments = ready([5, 1, 7, 3])
    learner = Learner(config(), "cpu", torch.float32)
    learner.backward(segments, 16)
    once = gradients(learner.student.model)
    learner.optimizer.zero_grad()
    learner.backward(segments, 32)
    for name, g in gradients(learner.student.model).items():
        torch.testing.assert_close(2 * g, once[name], rtol=1e-4, atol=1e-7)


def counts_of(learner, monkeypatch) -> list[float]:
    """What `learner` divides the losses of its updates by."""
    seen, backward = [], learner.backward
    monkeypatch.setattr(learner, "backward", lambda g, count, used: (seen.append(count), backward(g, count, used))[1])
    return seen


def test_a_token_weighs_the_same_in_every_batch_of_an_asynchronous_run(config, monkeypatch, tmp_path):
    """The first batches hold what ended first, the short responses; in lockstep a batch is what was begun together."""
    _, short = ready([2, 1, 1, 2])
    _, long = ready([5, 8, 7, 4])
    learner = Learner(config(minibatches=2, clip=1e9), "cpu", torch.float32)
    seen = counts_of(learner, monkeypatch)
    weights = [learner.step(batch, version=4).metrics["token_weight"] for batch in (short, long)]
    assert seen == [3.0] * 4 and weights == [1.0, 1.0]
    learner.checkpoint(tmp_path)
    resumed = Learner(config(minibatches=2), "cpu", torch.float32, str(tmp_path))
    seen = counts_of(resumed, monkeypatch)
    assert resumed.step(long, version=4).metrics["token_weight"] == 1.0 and seen == [3.0] * 2
    learner = Learner(config(minibatches=2, schedule="sync"), "cpu", torch.float32)
    seen = counts_of(learner, monkeypatch)
    weights = [learner.step(batch, version=4).metrics["token_weight"] for batch in (short, long)]
    assert seen == [3, 3, 13, 11] and weights == [1.0, 6 / 24]


def test_lag_is_counted_per_token_in_versions(config):
    slots, segments = ready([4, 3])
    slots.version[0, :4] = torch.tensor([2, 2, 5, 6])
    slots.version[1, :3] = 6
    metrics = Learner(config(), "cpu", torch.float32).step(segments, version=6).metrics
    assert (metrics["lag_min"], metrics["lag_max"]) == (0, 4)
    assert metrics["lag_mean"] == pytest.approx((4 + 4 + 1 + 0 + 0 + 0 + 0) / 7)


@pytest.mark.parametrize("name, value, why", [("logq", torch.nan, "teacher"), ("logpi", torch.nan, "engine"),
                                              ("logq", torch.inf, "teacher")])
def test_an_update_that_is_not_finite_is_skipped_and_its_slot_named(config, name, value, why):
    slots, segments = ready([4, 3, 5, 2])
    getattr(slots, name)[1, 2, 0] = value
    learner = Learner(config(minibatches=2), "cpu", torch.float32)          # slots 0, 1 and slots 2, 3
    start = {k: v.clone() for k, v in learner.student.model.state_dict().items()}
    trained = learner.step(segments[:2], version=0)
    assert [s["slots"] for s in trained.skipped] == [[1]] and why in trained.skipped[0]["why"]
    learner = Learner(config(), "cpu", torch.float32)
    learner.step(segments[:2], version=0)
    assert all(torch.equal(v, start[k]) for k, v in learner.student.model.state_dict().items()), "nothing was learnt"
    assert not learner.optimizer.state, "nor remembered"
    trained = learner.step(segments[2:], version=1)
    assert not trained.skipped and all(p.isfinite().all() for p in learner.student.model.parameters())


def test_a_student_that_is_not_finite_is_said_to_be_at_fault(config):
    _, segments = ready([4, 3])
    learner = Learner(config(), "cpu", torch.float32)
    learner.student.model.lm_head.weight.data[3] = torch.nan
    skipped, = learner.step(segments, version=0).skipped
    assert skipped["slots"] == [0, 1] and "norm is nan" in skipped["why"]


def test_a_hurried_step_is_abandoned_without_a_trace(config):
    _, segments = ready([4, 3, 5])
    link = Link(None, torch.zeros(2))
    learner = Learner(config(micro_tokens=1), "cpu", torch.float32)
    start = {k: v.clone() for k, v in learner.student.model.state_dict().items()}
    beat, link.beat = link.beat, lambda: (beat(), link.pulse[1].fill_(1))     # told to hurry after one micro-batch
    with pytest.raises(Interrupted):
        learner.step(segments, 0, link)
    assert link.pulse[0] > 0
    assert all(torch.equal(v, start[k]) for k, v in learner.student.model.state_dict().items())
    assert all(p.grad is None for p in learner.student.model.parameters()) and learner.updates == 0


def test_the_logged_kl_is_unbiased(config, models):
    """Many fresh draws from mu at one prefix: the mean of `kl` is the dense KL of student and teacher there."""
    student, teacher = (load_model(models[name], "cpu", torch.float32) for name in ("student", "teacher"))
    prompt = torch.tensor([[4, 9, 5, 13]])
    with torch.no_grad():
        logp, logq = (m(prompt).logits[0, -1].log_softmax(-1) for m in (student, teacher))
    logmu = (logp * 0.7).log_softmax(-1)                                          # stale
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logmu.exp(), 40_000, replacement=True, generator=g).view(100, 1, 400)
    slots, _ = ready([1] * 100, columns=400)
    for s in range(100):
        slots.open(s, s, prompt[0], 4, version=0)
        logpi = logmu[drawn[s]] + math.log(400)
        slots.append(s, drawn[s, :, 0], drawn[s], logpi, logmu[drawn[s, :, 0]], torch.zeros(1))
        slots.logq[s, :1] = logq[drawn[s]]
    for kl in ("reverse", "forward"):
        learner = Learner(config(), "cpu", torch.float32)
        learner.estimator = replace(ESTIMATORS["reverse_mc"], kl=kl)
        metrics = summarize([learner.backward([slots.read(s) for s in range(100)], 100)])
        assert metrics["kl"] == pytest.approx(DENSE[kl](logp, logq, logq).item(), rel=0.05)
    assert metrics["entropy"] == pytest.approx(-(logp.exp() * logp).sum().item(), rel=0.05)


def test_ess_is_one_on_policy_and_falls_with_unequal_weights():
    def ess(w):
        one = torch.ones(len(w))
        return summarize([{"w": torch.tensor(w), "loss": one}])["ess"]
    assert ess([1.0] * 8) == 1.0
    assert ess([1.0, 0.0, 0.0, 0.0]) == 0.25


def test_a_saved_student_loads_with_the_same_logprobs(config, tmp_path):
    learner = Learner(config(), "cpu", torch.float32)
    _, segments = ready([5, 2])
    learner.step(segments, version=2)
    learner.save(tmp_path / "student")
    tokens = [3, 7, 12, 5]
    loaded = load_model(str(tmp_path / "student"), "cpu", torch.float32)
    assert torch.equal(sequence_logp(loaded, tokens), sequence_logp(learner.student.model.eval(), tokens))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"], "no partial folder is left"


def test_what_is_published_is_the_model(config):
    learner = Learner(config(), "cpu", torch.float32)
    weights = Weights({n: p.shape for n, p in learner.student.model.named_parameters()}, [3, 4, 5, 6], torch.float32)
    learner.publish(weights, version=0)
    found = weights.read()
    version, tensors, probe = found.version, found.tensors, found.probe_logp
    assert version == 0 and all(torch.equal(tensors[n], p) for n, p in learner.student.model.named_parameters())
    torch.testing.assert_close(probe, sequence_logp(learner.student.model, weights.probe).detach())


def test_every_metric_says_what_it_is():
    assert all(len(text) > 10 for text in METRICS.values())

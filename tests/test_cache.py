"""Slots, scheduler, published weights, alignment and the teacher's scores."""
import itertools
import threading

import pytest
import torch

from cache import Slots
from models.alignment import by_length, pad, response_rows
from models.head import sequence_logp
from models.loading import load_model
from teacher import score
from transport.checksum import checksum
from transport.weights import Weights


def filled(lengths, *, prompt=3, columns=2, T=8) -> Slots:
    """Slots with a prompt and `lengths[s]` new tokens each."""
    slots = Slots(len(lengths), 6, T, columns)
    g = torch.Generator().manual_seed(0)
    for s, n in enumerate(lengths):
        slots.open(s, s, torch.randint(3, 17, (prompt + s % 2,), generator=g), prompt + s % 2, version=0)
        ids = torch.randint(3, 17, (n, columns), generator=g)
        logpi = torch.randn(n, columns, generator=g)
        slots.append(s, ids[:, 0], ids, logpi, logpi[:, 0] - 1, torch.full((n,), s))
    return slots


# -- slots -----------------------------------------------------------------------------------------

def test_a_slot_gives_back_what_was_written_in_pieces():
    slots = Slots(1, 4, 6, 2)
    slots.open(0, uid=7, context=[5, 6, 7], prompt=3, version=2)
    assert slots.read(0).logq.isnan().all() and len(slots.read(0)) == 0
    slots.append(0, torch.tensor([8, 9]), torch.tensor([[8, 1], [9, 2]]), -torch.ones(2, 2), -torch.ones(2),
                 versions=torch.tensor([2, 4]))
    slots.append(0, torch.tensor([4]), torch.tensor([[4, 3]]), torch.tensor([[-5., -6.]]), torch.tensor([-7.]),
                 versions=torch.tensor([5]))
    segment = slots.read(0)
    assert segment.tokens.tolist() == [5, 6, 7, 8, 9, 4] and segment.start == 3
    assert segment.ids.tolist() == [[8, 1], [9, 2], [4, 3]]
    assert segment.version.tolist() == [2, 4, 5] and int(slots.born[0]) == 2
    assert segment.logq.isnan().all(), "nothing is scored yet"


def test_a_slot_is_unscored_again_when_it_is_opened_again():
    slots = filled([3])
    slots.logq[0] = 0.0
    slots.open(0, 1, [3, 4], 2, version=1)
    slots.append(0, torch.tensor([5]), torch.tensor([[5, 5]]), torch.zeros(1, 2), torch.zeros(1), torch.ones(1))
    assert slots.read(0).logq.isnan().all()


def test_slots_are_seen_by_another_process(tmp_path):
    slots = filled([2, 3])
    process = torch.multiprocessing.get_context("spawn").Process(target=write_logq, args=(slots,))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and slots.read(1).logq.tolist() == [[1.5, 1.5]] * 3


def write_logq(slots):
    slots.logq[1] = 1.5


# -- published weights -----------------------------------------------------------------------------

def weights(P=200_000) -> Weights:
    return Weights({"a": torch.Size([P]), "b": torch.Size([2, 3])}, [1, 2, 3], torch.float32)


def test_weights_come_back_by_version_with_their_probe():
    w = weights(10)
    for v in range(3):
        w.publish({"a": torch.full((10,), float(v)), "b": torch.full((2, 3), -float(v))}, v, torch.full((2,), float(v)))
    found = w.read()
    assert found.version == 2 and found.tensors["a"].eq(2).all() and found.tensors["b"].eq(-2).all()
    assert found.probe_logp.eq(2).all() and found.checksums == {n: checksum(x) for n, x in found.tensors.items()}
    assert w.read(1).tensors["a"].eq(1).all(), "the one before is still there"
    assert found.tensors["a"].data_ptr() == w.views(0)["a"].data_ptr(), "they are read in place"
    with pytest.raises(AssertionError, match="overwritten"):
        w.read(0)


def test_a_reader_never_sees_half_of_a_version():
    w, stop = weights(), threading.Event()
    w.publish({"a": torch.zeros(200_000), "b": torch.zeros(2, 3)}, 0, torch.zeros(2))

    def write():
        v = 0
        while not stop.is_set():
            v += 1
            w.publish({"a": torch.full((200_000,), v), "b": torch.full((2, 3), v)}, v, torch.full((2,), v))
    kept = 0
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            found = w.read()
            a, b = (x.clone() for x in found.tensors.values())
            if w.holds(found.version):
                kept += 1
                assert a.min() == a.max() == b.max() == found.probe_logp.max() == found.version
                assert found.checksums == {"a": checksum(a), "b": checksum(b)}
        assert kept > 0
    finally:
        stop.set()
        writer.join()


# -- alignment -------------------------------------------------------------------------------------

def test_the_row_before_a_token_predicts_it():
    """A model that is certain that token i + 1 follows token i: right alignment gives log-prob 0, off by one -1000."""
    slots = Slots(2, 4, 6, 1)
    for s, (prompt, new) in enumerate([([3, 4], [5, 6, 7]), ([8], [9, 10])]):
        slots.open(s, s, prompt, len(prompt), version=0)
        slots.append(s, torch.tensor(new), torch.tensor(new)[:, None], torch.zeros(len(new), 1), torch.zeros(len(new)),
                     torch.zeros(len(new)))
    segments = [slots.read(0), slots.read(1)]
    tokens, mask = pad(segments, "cpu")
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    certain = torch.full((*tokens.shape, 20), -1000.0).scatter(-1, (tokens + 1)[..., None], 0.0)
    y = torch.cat([s.ids for s in segments]).long()
    assert response_rows(certain, segments).gather(-1, y).eq(0).all()
    for wrong in (-1, 1):
        assert response_rows(certain.roll(wrong, dims=1), segments).gather(-1, y).sum() <= -4000


def test_micro_batches_hold_every_segment_once_within_the_budget():
    slots = filled([1, 5, 3, 8, 2, 2])
    segments = [slots.read(s) for s in range(6)]
    groups = list(by_length(segments, token_budget=20))
    assert sorted(s.slot for g in groups for s in g) == list(range(6))
    assert all(len(g) == 1 or len(g) * max(len(s.tokens) for s in g) <= 20 for g in groups)


@pytest.mark.parametrize("budget", [24, 40, 1000])
@pytest.mark.parametrize("cost", [0.0, 0.1, 1.0])
def test_no_other_way_to_cut_the_sorted_segments_costs_less(monkeypatch, budget, cost):
    monkeypatch.setattr("models.alignment.PASS", cost)
    slots = filled([1, 5, 3, 8, 2, 2, 7, 8])
    segments = [slots.read(s) for s in range(8)]
    lengths = sorted((len(s.tokens) for s in segments), reverse=True)

    def price(groups):
        return sum(len(g) * max(g) + cost * budget for g in groups)

    prices = []
    for cuts in itertools.product((False, True), repeat=7):
        edges = [0, *(i + 1 for i in range(7) if cuts[i]), 8]
        groups = [lengths[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(g) == 1 or len(g) * max(g) <= budget for g in groups):
            prices.append(price(groups))
    found = [[len(s.tokens) for s in g] for g in by_length(segments, budget)]
    assert price(found) == pytest.approx(min(prices))
    if budget == 1000:
        assert {0.0: len(found) == len(set(lengths)), 1.0: len(found) == 1}.get(cost, True)


@pytest.mark.parametrize("support", ["candidates", "teacher_topk"])
def test_the_teachers_scores_equal_a_loop_over_single_sequences(models, support):
    model, slots = load_model(models["teacher"], "cpu", torch.float32), filled([4, 2, 7], columns=4)
    drawn = slots.ids.clone()
    score(model, [slots.read(s) for s in range(3)], slots, support, vocab=32, chunk=3)
    for s in range(3):
        segment = slots.read(s)
        for t in range(len(segment)):
            with torch.no_grad():
                logits = model(segment.tokens[None, :segment.start + t].long()).logits[0, -1]
            want = logits.log_softmax(-1)
            if support == "teacher_topk":
                assert segment.ids[t, 0] == drawn[s, t, 0], "column 0 stays the emitted token"
                assert segment.ids[t, 1:].tolist() == want.topk(3).indices.tolist()
            torch.testing.assert_close(segment.logq[t], want[segment.ids[t].long()], rtol=0, atol=1e-5)
        assert slots.logq[s, len(segment):].isnan().all(), "nothing is written beyond the response"


def test_sequence_logp_is_the_models_own(models):
    model, tokens = load_model(models["student"], "cpu", torch.float32), [3, 9, 4, 4, 12]
    with torch.no_grad():
        logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        torch.testing.assert_close(sequence_logp(model, tokens), logp[torch.arange(4), tokens[1:]], rtol=0, atol=1e-6)

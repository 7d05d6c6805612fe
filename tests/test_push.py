"""A push has arrived when the engine holds the bits that were published, and computes what the learner computes."""
import gc
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from cache import Slots
from engines.base import MORE_THAN_ROUNDING, ROUNDING, probe_tolerance
from engines.table import engine_class
from models.head import sequence_logp
from models.loading import load_model
from rollout import Worker
from tests.conftest import save_tiny
from transport import checksum as module
from transport.checksum import Shown, checksum, copy_and_sum, some_columns
from transport.link import Incurable
from transport.published import Published
from transport.shared import SharedMemory
from transport.weights import Weights

PROBE = [3, 4, 13, 5, 14, 9, 9, 13, 3, 4, 14, 5, 14, 6, 7]
Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
DTYPES = [torch.float32, torch.bfloat16]


# -- checksums -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (9, 8)])
def test_a_checksum_sees_every_number_and_its_place(dtype, shape, monkeypatch):
    x = torch.arange(1, 1 + math.prod(shape)).view(shape).to(dtype)
    seen = {checksum(x)}
    for i in range(x.numel()):
        changed = x.clone().view(-1)
        changed.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[i] ^= 1          # its last bit
        seen.add(checksum(changed))
        if i:
            swapped = x.clone().view(-1)
            swapped[[0, i]] = swapped[[i, 0]]
            seen.add(checksum(swapped))
    assert len(seen) == 2 * x.numel()
    before = checksum(x)
    for width, rows in ((1, 1), (2, 3)):
        monkeypatch.setattr(module, "WIDTH", width)
        monkeypatch.setattr(module, "ROWS", rows)
        assert checksum(x) == before, "however it is summed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_the_sum_of_its_words_by_their_place(dtype):
    for size in (1, 5, 16_384, 3 * 2 ** 18 + 7):                          # less than a row; rows and a rest
        x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        words = torch.nn.functional.pad(x, (0, -size % (8 // x.itemsize))).view(torch.int64).tolist()
        assert checksum(x) % 2 ** 64 == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2 ** 64


@pytest.mark.parametrize("shape", [(3,), (700, 100), (16_384,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_is_summed_as_it_is_written(dtype, shape):
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for target in (torch.zeros(shape, dtype=dtype), torch.zeros(*shape, 2, dtype=dtype)[..., 0]):   # in pieces; at once
        assert int(copy_and_sum(target, source)) == checksum(target)
        assert torch.equal(target, source.to(dtype))
    with pytest.raises(AssertionError):
        copy_and_sum(torch.zeros(5, 3), torch.zeros(3))                   # which copy_ would repeat


def test_a_checksum_takes_a_tensor_wherever_it_lies():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).bfloat16()
    for start in range(4):                                                # not aligned to 8 bytes
        assert checksum(x[start:start + 30]) == checksum(x[start:start + 30].clone())
    assert checksum(x.view(8, 5).T) == checksum(x.view(8, 5).T.contiguous()) != checksum(x)


def test_columns_are_compared_as_a_product_with_the_identity_shows_them():
    """-0 is 0 there."""
    x = torch.tensor([[-0.0, 1.0], [2.0, -3.0]])
    published = Published(0, {"x": x}, {"x": checksum(x)}, torch.zeros(1))
    at = some_columns(2, 0)
    assert published.checksum_like(Shown("x", 0, whole=False)) == checksum((x + 0)[:, at]) != checksum(x[:, at])


# -- the tolerance of the probe --------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
def test_the_probe_decides_by_the_dtype_and_by_how_far_it_was_moved(dtype):
    low, high = ROUNDING[dtype], MORE_THAN_ROUNDING[dtype]
    assert [probe_tolerance(dtype, moved, False) for moved in (0, 10 * low, 50 * low, 1e9)] == pytest.approx(
        [low, low, 5 * low, high])
    assert probe_tolerance(dtype, 0, True) == high


# -- engines and their faults ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("push") / "student", seed=3, layers=2, sharp=8.0)


def make_engine(kind, dtype, folder):
    from control.resolve import configure
    if kind == "vllm":
        pytest.importorskip("vllm")
    gc.collect()                         # a vLLM engine that goes later takes the process groups of the next with it
    cfg = configure(["--task=toy", f"--student={folder}", f"--teacher={folder}", "--gpus=0", f"--engine={kind}",
                     "--max-prompt=16", "--max-response=24", "--max-running=4"])
    return cfg, engine_class(kind)(cfg, "cpu", dtype)


@pytest.fixture(scope="module", params=[("hf", torch.float32), ("hf", torch.bfloat16), ("vllm", torch.float32),
                                        ("vllm", torch.bfloat16)], ids=str)
def made(request, student):
    return *make_engine(*request.param, student), request.param[1]


class Push:
    """A worker, and a learner that publishes: version v is the student after v updates."""

    def __init__(self, cfg, engine, dtype, folder, size=0.3):
        self.model = load_model(folder, "cpu", torch.float32)
        self.dtype, self.size, self.g = dtype, size, torch.Generator().manual_seed(0)
        parameters = dict(self.model.named_parameters())
        self.weights = Weights({n: p.shape for n, p in parameters.items()}, PROBE, dtype)
        link = SimpleNamespace(send=lambda *a, **k: None, span=lambda what: nullcontext())
        self.worker = Worker(cfg, link, SharedMemory(Slots(1, 16, 12, 4), self.weights), engine, dtype)
        self.publish(0)

    @torch.no_grad()
    def publish(self, version):
        """Every tensor moves by `size` of its own size."""
        for p in self.model.parameters():
            p.add_(self.size * p.std().nan_to_num(1) * torch.randn(p.shape, generator=self.g))
        in_dtype = load_model(self.worker.cfg.student, "cpu", self.dtype)
        in_dtype.load_state_dict(self.model.state_dict())
        self.weights.publish(dict(self.model.named_parameters()), version, sequence_logp(in_dtype, PROBE))


def lost(tensors, old):
    """One tensor does not arrive."""
    return tensors | {Q: old[Q]}


def stale(tensors, old):
    """One layer stays as it was."""
    return tensors | {name: x for name, x in old.items() if name.startswith("model.layers.0.")}


def swapped(tensors, old):
    """q and k have the same shape here."""
    return tensors | {Q: tensors[K], K: tensors[Q]}


FAULTS = {lost: Q, stale: "model.layers.0.", swapped: K}         # what each is blamed on: the first in order


def push_with(fault, push, monkeypatch):
    """Two versions that arrive, and one with the fault."""
    engine, load = push.worker.engine, push.worker.engine.load
    push.worker.load(None)
    push.publish(1)
    push.worker.load(None)
    old = {name: x.clone() for name, x in push.weights.views(1).items()}
    push.publish(2)
    monkeypatch.setattr(engine, "load", lambda tensors, version: load(fault(tensors, old), version))
    with pytest.raises(Incurable, match="weights of version 2 did not arrive in the engine") as e:
        push.worker.load(None)
    return str(e.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_stops_the_worker_and_is_named(made, student, fault, monkeypatch):
    cfg, engine, dtype = made
    push = Push(cfg, engine, dtype, student, size=0.01)
    said = push_with(fault, push, monkeypatch)
    assert f"the first of them {FAULTS[fault]}" in said and "other numbers than were published" in said


def test_a_tensor_that_is_left_out_of_the_load_is_noticed_by_vllm_engines_too(student, monkeypatch):
    cfg, engine = make_engine("vllm", torch.bfloat16, student)
    said = push_with(lambda tensors, old: {n: x for n, x in tensors.items() if n != Q},
                     Push(cfg, engine, torch.bfloat16, student, size=0.01), monkeypatch)
    assert "self_attn" in said


def test_every_tensor_is_shown(made, student):
    cfg, engine, dtype = made
    push = Push(cfg, engine, dtype, student)
    push.worker.load(None)
    shown = engine.checksums(push.weights.layout, 0)
    assert {x.name for x in shown} == push.weights.layout.keys()
    assert all(x.checksum == push.weights.read().checksum_like(x) for x in shown)
    assert all(x.whole for x in shown) == (type(engine).__module__ == "engines.hf")


def test_what_the_engine_holds_is_a_copy(made, student):
    """The learner writes over what was read, two versions later."""
    cfg, engine, dtype = made
    push = Push(cfg, engine, dtype, student)
    push.worker.load(None)
    before = engine.logp(PROBE)
    push.weights.flat.fill_(1.0)
    assert torch.equal(engine.logp(PROBE), before)


@pytest.mark.parametrize("fault", FAULTS)
def test_where_the_engine_shows_nothing_the_probe_tells(made, student, fault, monkeypatch):
    cfg, engine, dtype = made
    monkeypatch.setattr(engine, "checksums", lambda layout, version: [])
    said = push_with(fault, Push(cfg, engine, dtype, student), monkeypatch)
    assert "log-probs differ from the learner's" in said and "tolerance" in said


def test_a_few_columns_of_a_packed_matrix_are_enough_and_every_version_shows_others(student, monkeypatch):
    pytest.importorskip("vllm")
    cfg, engine = make_engine("vllm", torch.float32, student)
    monkeypatch.setattr(module, "COLUMNS", 2)
    assert some_columns(100, 5).tolist() == some_columns(100, 5).tolist() != some_columns(100, 6).tolist()
    assert sorted({int(c) for version in range(200) for c in some_columns(40, version)}) == list(range(40))
    push = Push(cfg, engine, torch.float32, student)
    assert f"the first of them {K}" in push_with(swapped, push, monkeypatch)


def test_one_wrong_number_of_a_packed_matrix_is_seen_when_its_column_is_shown(student, monkeypatch):
    pytest.importorskip("vllm")
    cfg, engine = make_engine("vllm", torch.float32, student)
    monkeypatch.setattr(module, "COLUMNS", 2)
    push = Push(cfg, engine, torch.float32, student)
    load = engine.load
    shown = some_columns(push.weights.layout[Q][1], 0).tolist()
    for column in range(push.weights.layout[Q][1]):
        changed = {name: x.clone() for name, x in push.weights.read().tensors.items()}
        changed[Q][0, column] += 1e-7
        monkeypatch.setattr(engine, "load", lambda tensors, version: load(changed, version))
        push.worker.version = -1
        with pytest.raises(Incurable, match=f"the first of them {Q}") if column in shown else nullcontext():
            push.worker.load(None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_head_is_shown_as_the_embedding(dtype, models):
    pytest.importorskip("vllm")
    cfg, engine = make_engine("vllm", dtype, models["tied"])
    push = Push(cfg, engine, dtype, models["tied"])
    for version in (1, 2):
        push.worker.load(None)
        names = [x.name for x in engine.checksums(push.weights.layout, version)]
        assert set(names) == push.weights.layout.keys() and names.count("model.embed_tokens.weight") == 2
        push.publish(version)


def test_weights_that_change_while_they_are_read_are_read_again(student, monkeypatch):
    cfg, engine = make_engine("hf", torch.float32, student)
    push = Push(cfg, engine, torch.float32, student)
    load = engine.load
    loads = []

    def interrupted(tensors, version):
        load(tensors, version)
        loads.append(len(loads))
        if len(loads) == 1:                                      # the learner is two versions ahead
            for version in (1, 2):
                push.publish(version)
    monkeypatch.setattr(engine, "load", interrupted)
    push.worker.load(None)
    assert len(loads) == 2 and push.worker.version == 2

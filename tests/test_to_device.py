"""
Drawing on a device never makes Python wait for it. The device here is torch's `meta`, whose tensors have no numbers:
whatever needs some of them in Python raises, and copies to it are counted.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.drawn import DrawnTable
from engines.sampling import Drawing, draw_rows
from engines.to_device import to_device

DEVICE = torch.device("meta")
R, V = 6, 5_000
DRAWINGS = {"iid": Drawing(n=4, design="iid", k=0, temperature=1.0, top_p=1.0, seed=1),
            "optimal": Drawing(n=4, design="optimal", k=0, temperature=1.0, top_p=1.0, seed=1),
            "optimal, N = 64": Drawing(n=64, design="optimal", k=0, temperature=0.7, top_p=1.0, seed=1),
            "top-p": Drawing(n=4, design="optimal", k=0, temperature=1.0, top_p=0.9, seed=1),
            "top-k": Drawing(n=1, design="iid", k=16, temperature=1.0, top_p=1.0, seed=1),
            "greedy": Drawing(n=1, design="iid", k=0, temperature=0, top_p=1.0, seed=1)}


class Copies(TorchDispatchMode):
    """Copies between the CPU and the device, by whether somebody waits for them."""

    def __init__(self):
        super().__init__()
        self.waiting, self.free = [], []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = fn(*args, **kwargs)
        if fn in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if fn is torch.ops.aten._to_copy.default else args[1]
            if source.device != out.device and source.numel():
                free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                (self.free if free else self.waiting).append(f"{source.device} -> {out.device}, {tuple(out.shape)}")
        return out


@pytest.fixture(scope="module")
def vllm():
    pytest.importorskip("vllm")
    import engines.vllm
    return engines.vllm


@pytest.fixture
def copies(monkeypatch):
    """Pinning needs a GPU, and is only noted; torch.tensor copies where no dispatch mode sees it."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(tuple(x.shape)) or x)
    make = torch.tensor

    def noted(numbers, device="cpu", **how):
        if torch.device(device).type != "cpu":
            copies.waiting.append(f"torch.tensor(.., device={device})")
        return make(numbers, device=device, **how)
    monkeypatch.setattr(torch, "tensor", noted)
    with Copies() as copies:
        copies.pinned = pinned
        yield copies


def drawn(drawing, table):
    """A position of R responses, drawn and kept."""
    chosen = draw_rows(torch.empty(R, V, device=DEVICE), list(range(R)), list(range(10, 10 + R)), drawing)
    table.write([f"response {i}" for i in range(R)], list(range(R)), chosen)
    return chosen


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_step_of_drawing_waits_for_nothing(copies, name):
    chosen = drawn(DRAWINGS[name], DrawnTable(DEVICE))
    assert chosen.ids.device == DEVICE and chosen.ids.shape == (R, DRAWINGS[name].n + DRAWINGS[name].k)
    assert not copies.waiting
    assert len(copies.free) == len(copies.pinned) > 0


def test_a_step_of_vllm_waits_for_nothing_of_ours(vllm, copies, monkeypatch):
    monkeypatch.setattr(vllm, "DRAWN", DrawnTable(DEVICE))
    draws = vllm.Draws(None, DEVICE, False)
    for at, uid in ((0, 5), (1, 3), (4, 8)):             # rows 2 and 3 are somebody else's
        draws.rows[at] = vllm.Row(vllm.Request(str(uid), DRAWINGS["optimal"], uid, 7), output=[])
    for _ in range(3):
        draws.apply(torch.empty(5, V, device=DEVICE))
        for row in draws.rows.values():
            row.output.append(1)
    assert not copies.waiting and len(copies.free) == len(copies.pinned) >= 3 * 4


def test_a_plain_copy_and_a_look_at_a_number_are_noticed(copies):
    torch.tensor([1, 2, 3]).to(DEVICE)
    torch.tensor([1, 2, 3], device=DEVICE)
    assert len(copies.waiting) == 2
    x = torch.empty(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="item"):
        x.sum().item()
    with pytest.raises(NotImplementedError, match="nonzero"):
        x[x > 0]


def test_on_a_cpu_it_is_a_tensor_of_these_numbers():
    x = to_device([[1, 2], [3, 2 ** 40]], "cpu")
    assert x.dtype == torch.int64 and x.tolist() == [[1, 2], [3, 2 ** 40]]
    assert to_device(range(3), torch.device("cpu")).tolist() == [0, 1, 2]

"""The head by hand against plain autograd, for every row of the table; nothing of size [positions, V] is ever made."""
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import Config
from estimators import ESTIMATORS, forward_topk
from models.head import head_backward, head_logp, sequence_logp, teacher_logq
from models.loading import load_model

M, H, V, C = 11, 6, 40, 5


def problem(name, *, bias=False, dtype=torch.float64, tokens=M):
    """A head, hidden states, a slot's columns, and what the estimator asks for besides."""
    g, row = torch.Generator().manual_seed(3), ESTIMATORS[name]
    head = torch.nn.Linear(H, V, bias=bias, dtype=dtype)
    for p in head.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
    rows = torch.randn(tokens, H, generator=g, dtype=dtype)
    ids = torch.randint(0, V, (tokens, C), generator=g)
    ids[:, 2] = ids[:, 1]                                              # duplicates are kept
    wide = torch.randn(2, tokens, V, generator=g, dtype=dtype).log_softmax(-1)
    logq, logmu = wide if row.support == "full" else wide.gather(-1, ids.expand(2, -1, -1))
    with torch.no_grad():
        known = row.batch(head(rows).log_softmax(-1).gather(-1, ids) + 0.05, logq, logmu) if row.batch else {}
    fn = row.bind(Config())

    def loss(at, logp, every, **tail):
        here = {k: x[at] if len(x) == tokens else x for k, x in known.items()} | tail
        return {"loss": fn(logp if every is None else every, logq[at], logmu[at], **here), "logp": logp[:, 0]}
    return head, rows, ids, loss, row.support == "full"


def plainly(head, rows, ids, loss, whole, count):
    """Autograd, all logits at once."""
    leaf = rows.clone().requires_grad_()
    every = head(leaf).log_softmax(-1)
    found = loss(slice(None), every.gather(-1, ids), every if whole else None)
    (found["loss"].sum() / count).backward()
    return leaf.grad, found, [p.grad for p in head.parameters()]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.head])
def test_gradients_are_those_of_plain_autograd(name, chunk):
    head, rows, ids, loss, whole = problem(name, bias=True)
    want, value, parameters = plainly(head, rows, ids, loss, whole, 7)
    head.zero_grad()
    back, found = head_backward(head, rows, ids, loss, all_words=whole, count=7, chunk=chunk, dtype=torch.float64)
    for got, wanted in zip([back, found["loss"], found["logp"], *(p.grad for p in head.parameters())],
                           [want, value["loss"], value["logp"], *parameters]):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12 * wanted.abs().max().item())


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_with_all_words_the_stored_ones_have_a_gradient_too(chunk):
    """A loss may use both: log-probs of all words, and those of the columns of a slot."""
    head, rows, ids, _, _ = problem("reverse_mc", bias=True)

    def loss(at, logp, every):
        return {"loss": logp.exp().sum(-1) + every.square().mean(-1)}
    want, value, parameters = plainly(head, rows, ids, loss, True, 3)
    head.zero_grad()
    back, found = head_backward(head, rows, ids, loss, all_words=True, count=3, chunk=chunk, dtype=torch.float64)
    for got, wanted in zip([back, found["loss"], *(p.grad for p in head.parameters())],
                           [want, value["loss"], *parameters]):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12 * wanted.abs().max().item())


def test_gradients_add_up_and_a_frozen_head_gets_none():
    head, rows, ids, loss, whole = problem("reverse_mc")
    for _ in range(2):
        head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=4, dtype=torch.float64)
    twice = head.weight.grad.clone()
    head.zero_grad()
    _, _, (once,) = plainly(head, rows, ids, loss, whole, 1)
    torch.testing.assert_close(twice, 2 * once)
    head.requires_grad_(False).zero_grad()
    back, _ = head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=4, dtype=torch.float64)
    assert head.weight.grad is None and back.abs().max() > 0


def test_a_head_in_bf16_gets_the_gradients_of_both_calls_bias_included():
    """The head's numbers are the same in both dtypes: what differs is how the gradients are kept."""
    head, rows, ids, loss, whole = problem("reverse_mc", bias=True, dtype=torch.float32)
    short = torch.nn.Linear(H, V, dtype=torch.bfloat16)
    for p, q in zip(short.parameters(), head.parameters()):
        p.data.copy_(q.data)
        q.data.copy_(p.data)
    for part in (slice(0, 4), slice(4, M)):
        for x in (head, short):
            head_backward(x, rows[part], ids[part], lambda at, logp, every, part=part: loss(
                slice(part.start + at.start, min(part.start + at.stop, part.stop)), logp, every),
                all_words=whole, count=1, chunk=3, dtype=torch.float32)
    for p, q in zip(short.parameters(), head.parameters()):
        assert p.grad.dtype == torch.bfloat16 and q.grad.abs().max() > 0.1
        assert (p.grad - q.grad).abs().max() <= 2 ** -7 * q.grad.abs().max(), "two roundings, of 8 bits each"


def tail_problem(mass, dtype):
    """A student that gives the words outside the teacher's four best about this mass, a teacher that gives them 0.2."""
    g = torch.Generator().manual_seed(5)
    head, rows = torch.nn.Linear(H, V, dtype=dtype), 0.3 * torch.randn(M, H, generator=g).to(dtype)
    best = torch.randperm(V, generator=g)[:4].expand(M, -1)
    ids = torch.cat([torch.randint(0, V, (M, 1), generator=g), best], 1)     # the emitted token first
    head.weight.data.copy_(torch.randn(V, H, generator=g))
    head.bias.data.fill_(math.log(mass) - math.log(V / 4))
    head.bias.data[ids[0, 1:]] = 0.0
    logq = (0.8 * torch.rand(M, 4, generator=g).softmax(-1)).log()
    return head, rows, ids, logq


def exact_forward_topk(head, rows, ids, logq):
    """In float64 by autograd: log-probs of the tail [M], and the gradients of rows, weight and bias."""
    head, leaf = copy.deepcopy(head).double(), rows.double().requires_grad_()
    logp, logq = head(leaf).log_softmax(-1), logq.double()
    inside = torch.zeros(M, V, dtype=torch.bool).scatter_(-1, ids[:, 1:], True)
    log_tail, q_tail = logp.masked_fill(inside, -torch.inf).logsumexp(-1), 1 - logq.exp().sum(-1)
    loss = (logq.exp() * (logq - logp.gather(-1, ids[:, 1:]))).sum(-1) + q_tail * (q_tail.log() - log_tail)
    loss.sum().backward()
    return log_tail.detach(), [leaf.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("mass", [0.3, 1e-5, 1e-8, 1e-20, 1e-60])
def test_the_tail_keeps_its_gradient_however_little_mass_the_student_leaves_it(mass, chunk):
    head, rows, ids, logq = tail_problem(mass, torch.float32)
    log_tail, want = exact_forward_topk(head, rows, ids, logq)
    worst = {}
    for best in (ids[:, 1:], None):
        head.zero_grad()
        back, found = head_backward(
            head, rows, ids, lambda at, logp, every, **tail: {"loss": forward_topk(
                logp[:, 1:], logq[at], logq[at], **tail), **tail}, all_words=False, count=1, chunk=chunk,
            dtype=torch.float32, best=best)
        got = [back, head.weight.grad, head.bias.grad]
        worst[best is None] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want))
        if best is not None:
            torch.testing.assert_close(found["log_tail"].double(), log_tail, rtol=1e-6, atol=1e-6)
    assert worst[False] < 1e-5 and (worst[True] > 0.05 or mass > 1e-6), worst


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_where_nothing_is_outside_there_is_no_tail(chunk):
    """K = V: the gradient of the whole KL(q || p)."""
    head, rows, _, loss, _ = problem("forward_dense", bias=True)
    every, seen = torch.arange(V).expand(M, -1), []
    want, _, parameters = plainly(head, rows, every, loss, True, 1)
    head.zero_grad()

    def whole(at, logp, every, **tail):
        seen.append(tail)
        return {"loss": loss(at, logp, logp)["loss"]}
    back, _ = head_backward(head, rows, every, whole, all_words=False, count=1, chunk=chunk, dtype=torch.float64,
                            best=every)
    assert not any(seen)
    for got, wanted in zip([back, *(p.grad for p in head.parameters())], [want, *parameters]):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["reverse_mc", "jsd_dense"])
def test_no_positions_are_a_loss_of_nothing(name):
    head, rows, ids, loss, whole = problem(name, tokens=0)
    back, found = head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=4, dtype=torch.float64)
    assert back.shape == (0, H) and found["loss"].shape == (0,) and not head.weight.grad.any()


def test_words_that_are_all_but_impossible_keep_their_log_probs():
    """exp(logits - peak) is 0 for them in float32; logp is -200 all the same, and the gradient finite."""
    head, rows, ids, loss, whole = problem("reverse_mc", dtype=torch.float32)
    head.weight.data *= 60
    want, _, _ = plainly(head, rows, ids, loss, whole, 1)
    back, found = head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=4, dtype=torch.float32)
    truth = head(rows).log_softmax(-1).gather(-1, ids)
    assert truth.min() < -150 and back.isfinite().all()
    torch.testing.assert_close(head_logp(head, rows, ids, chunk=3, dtype=torch.float32), truth, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(back, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_bf16_products_stay_near_float32_and_log_probs_are_float32():
    head, rows, ids, loss, whole = problem("reverse_mc", dtype=torch.float32)
    want, _, _ = plainly(head, rows, ids, loss, whole, 1)
    back, found = head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=4, dtype=torch.bfloat16)
    assert found["logp"].dtype == head.weight.grad.dtype == torch.float32
    assert ((back - want).norm() / want.norm()) < 0.02


def test_products_of_bf16_numbers_are_not_rounded_on_the_way_to_log_probs(models):
    """Log-probs of student, teacher and engine against float64 products of the same bf16 numbers."""
    g = torch.Generator().manual_seed(0)
    head, rows = torch.nn.Linear(64, 500, dtype=torch.bfloat16), torch.randn(30, 64, generator=g).bfloat16()
    head.weight.data.copy_(torch.randn(500, 64, generator=g) / 2)
    truth = (rows.double() @ head.weight.double().T + head.bias.double()).log_softmax(-1)
    every = torch.arange(500).expand(30, -1)
    for got in (head_logp(head, rows, every, chunk=7, dtype=torch.bfloat16), teacher_logq(head, rows, 500)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-5)
    model, tokens = load_model(models["teacher"], "cpu", torch.bfloat16), [3, 7, 12, 5, 9]
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, :-1]
    truth = (states.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    truth = truth[torch.arange(4), torch.tensor(tokens[1:])]
    torch.testing.assert_close(sequence_logp(model, tokens).double(), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mass", [0.3, 1e-8])
def test_in_bf16_the_tail_is_worked_on_in_float32(mass):
    head, rows, ids, logq = tail_problem(mass, torch.bfloat16)
    log_tail, want = exact_forward_topk(head, rows, ids, logq)
    head.float()
    back, found = head_backward(
        head, rows.float(), ids, lambda at, logp, every, log_tail: {"loss": forward_topk(
            logp[:, 1:], logq[at], logq[at], log_tail=log_tail), "tail": log_tail},
        all_words=False, count=1, chunk=4, dtype=torch.bfloat16, best=ids[:, 1:])
    torch.testing.assert_close(found["tail"].double(), log_tail, rtol=1e-6, atol=1e-5)
    for got, wanted in zip((back, head.weight.grad, head.bias.grad), want):
        assert (got - wanted).norm() < 2 ** -7 * wanted.norm()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""
    elements = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", ["reverse_mc", "forward_topk", "reverse_dense"])
def test_nothing_larger_than_a_chunk_of_logits_is_made(name):
    head, rows, ids, loss, whole = problem(name, tokens=200)
    with Largest() as seen:
        head_backward(head, rows, ids, loss, all_words=whole, count=1, chunk=8, dtype=torch.float64,
                      best=ids[:, [0, 1, 3, 4]] if ESTIMATORS[name].tail else None)
    assert seen.elements <= max(8 * V, 200 * H) and 8 * V < 200 * V / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", ["reverse_mc", "reverse_dense"])
def test_on_a_gpu_too(name, dtype, allowed):
    head, rows, ids, loss, whole = problem(name, dtype=torch.float32, tokens=300)
    want, _, (weight,) = plainly(head, rows, ids, loss, whole, 1)
    head.zero_grad()
    head.cuda()
    found, _ = head_backward(head, rows.cuda(), ids.cuda(), lambda at, logp, every: {k: v.cuda() for k, v in loss(
        at, logp.cpu(), None if every is None else every.cpu()).items()}, all_words=whole, count=1, chunk=64,
        dtype=dtype)
    for got, wanted in ((found, want), (head.weight.grad, weight)):
        assert (got.cpu() - wanted).norm() < allowed * wanted.norm()

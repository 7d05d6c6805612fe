"""
The LM head under a loss: from hidden states to gradients, one chunk of positions at a time.

At 151,936 words one position has 0.6 MB of logits. Autograd would hold the logits, their
log-softmax and the gradients of both. Here one buffer [chunk, V] holds the logits, then
exp(logits - peak), then d loss / d logits; two matrix products take that to the hidden states and
to the weight of the head, and the buffer is used again. [positions, V] never exists. Because

    logp = logits - logsumexp(logits),    d loss / d logits = g at the columns the loss has seen
                                                              - p * (sum of g),

where g = d loss / d logp [M, C] comes from autograd, which differentiates the estimator as it is
written, on C columns instead of V. An estimator that sees the whole vocabulary has C = V; then its
own temporaries exist as well, for one chunk. An estimator that counts all other words as one
outcome, the tail, gets their log-prob from the logits: as log(1 - sum of the others) it would be
lost in float32 where it is small.

The products take numbers in the dtype of compute; logits and everything else are float32.
What is left out: a fused kernel; soft-capped logits.
Shapes: M positions, H width, V words, C columns of a slot. Tests: tests/test_head.py
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.alignment import as_response, response_rows

Loss = Callable[..., dict[str, Tensor]]          # of `head_backward`


@torch.no_grad()
def head_logp(head: torch.nn.Linear, rows: Tensor, ids: Tensor, *, chunk: int,
              dtype: torch.dtype) -> Tensor:
    """Log-probs [M, C] of the words `ids` [M, C] after the hidden states `rows` [M, H].

    There is no gradient.
    """
    weight = head.weight.to(dtype)
    buffer = logit_buffer(rows, weight, chunk)
    logp = []
    for i in range(0, max(1, len(rows)), chunk):
        logits = project(head, weight, rows[i:i + chunk], buffer)
        seen = logits.gather(-1, ids[i:i + chunk])
        log_norm, _ = exponentiate(logits)
        logp.append(seen - log_norm)
    return torch.cat(logp)


@torch.no_grad()
def head_backward(head: torch.nn.Linear, rows: Tensor, ids: Tensor, loss: Loss, *, all_words: bool,
                  count: float, chunk: int, dtype: torch.dtype,
                  best: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """d loss / d rows [M, H], and everything that `loss` has measured [M].

    The gradient of the head is added to that of its parameters. `loss(at, logp, every)` is called
    for the positions `at`, with logp [m, C] at `ids` and, with `all_words`, every [m, V]. With
    `best` [M, K], distinct words and fewer than V, it gets log_tail [m] as well: the log-prob of
    all other words together. It returns a dict of [m]. What is differentiated is the sum of its
    "loss", divided by `count`.
    """
    weight = head.weight.to(dtype)
    back = torch.empty_like(rows)
    buffer = logit_buffer(rows, weight, chunk)
    sums = {name: float32_sum(p) for name, p in head.named_parameters() if p.requires_grad}
    parts = []
    for i in range(0, max(1, len(rows)), chunk):
        at = slice(i, i + chunk)
        logits = project(head, weight, rows[at], buffer)
        if all_words:
            found, d = differentiate_all_words(logits, ids[at], loss, at, count)
        elif best is not None and best.shape[1] < len(weight):
            found, d = differentiate_tail(logits, ids[at], best[at], loss, at, count)
        else:
            found, d = differentiate_columns(logits, ids[at], loss, at, count)
        parts.append(found)
        if "bias" in sums:
            sums["bias"].add_(d.sum(0))
        d = d.to(dtype)
        back[at] = d @ weight
        if "weight" in sums:
            add_product(sums["weight"], d, rows[at].to(dtype))
    for name, total in sums.items():
        add_gradient(head.get_parameter(name), total)
    return back, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def differentiate_columns(logits: Tensor, ids: Tensor, loss: Loss, at: slice,
                          count: float) -> tuple[dict[str, Tensor], Tensor]:
    """What `loss` measures, and d loss / d logits [m, V], written over the logits."""
    seen = logits.gather(-1, ids)
    log_norm, mass = exponentiate(logits)
    logp = (seen - log_norm).requires_grad_()
    found, (g,) = ask(lambda: loss(at, logp, None), [logp], count)
    d = logits.mul_(-g.sum(-1, keepdim=True) / mass)     # logits hold p, up to its sum, the mass
    return found, d.scatter_add_(-1, ids, g)


def differentiate_tail(logits: Tensor, ids: Tensor, best: Tensor, loss: Loss, at: slice,
                       count: float) -> tuple[dict[str, Tensor], Tensor]:
    """The same where the loss also sees log_tail, the log-prob of all words but `best` [m, K].

    It is the logsumexp of their logits less that of all. Its derivative is p / tail - p at those
    words and -p at `best`.
    """
    seen = logits.gather(-1, ids)
    seen_best = logits.gather(-1, best)
    logits.scatter_(-1, best, -torch.inf)
    log_others, mass = exponentiate(logits)              # logits hold p of the others, up to mass
    log_norm = torch.logaddexp(log_others, seen_best.logsumexp(-1, keepdim=True))
    logp = (seen - log_norm).requires_grad_()
    log_tail = (log_others - log_norm).requires_grad_()
    found, (g, g_tail) = ask(lambda: loss(at, logp, None, log_tail=log_tail.squeeze(-1)),
                             [logp, log_tail], count)
    total = g.sum(-1, keepdim=True) + g_tail
    d = logits.mul_((g_tail - total * log_tail.exp()) / mass)
    d.scatter_add_(-1, best, -total * (seen_best - log_norm).exp())
    return found, d.scatter_add_(-1, ids, g)


def differentiate_all_words(logits: Tensor, ids: Tensor, loss: Loss, at: slice,
                            count: float) -> tuple[dict[str, Tensor], Tensor]:
    """The same where the loss sees every word."""
    every = logits.sub_(logits.logsumexp(-1, keepdim=True)).requires_grad_()
    found, (g,) = ask(lambda: loss(at, every.gather(-1, ids), every), [every], count)
    p = every.detach().exp_()
    return found, p.mul_(-g.sum(-1, keepdim=True)).add_(g)


def ask(measure: Callable[[], dict[str, Tensor]], leaves: list[Tensor],
        count: float) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """What the loss measures, detached, and the gradients of its sum / count by the leaves."""
    with torch.enable_grad():
        found = measure()
        gradients = torch.autograd.grad(found["loss"].sum() / count, leaves)
    return {name: x.detach() for name, x in found.items()}, gradients


def add_product(total: Tensor, d: Tensor, x: Tensor) -> None:
    """total [V, H] += d.T @ x, whatever the dtype of the product."""
    if total.dtype == d.dtype:
        total.addmm_(d.T, x)
    else:
        total.add_(d.T @ x)


def logit_buffer(rows: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """An empty buffer [chunk, V], float32 or more."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty(min(chunk, len(rows)), len(weight), dtype=dtype, device=weight.device)


def project(head: torch.nn.Linear, weight: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """The logits of `rows`, in the first rows of the buffer. `weight`: the head's, in the dtype of
    compute."""
    out = buffer[:len(rows)]
    product(rows.to(weight.dtype), weight.T, out)
    if head.bias is None:
        return out
    return out.add_(head.bias)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. Where a and b are shorter than float32, their product is not: rounded to bf16,
    a logit of 20 would be off by up to 0.06."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:                            # a CPU has no such product: the operands are made longer
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [m, V] into exp(logits - peak), in place: p, up to its sum over V.

    Returns the log of the normaliser and that sum, [m, 1] each.
    """
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    return peak + mass.log(), mass


def float32_sum(parameter: Tensor) -> Tensor:
    """Where the gradient of one call is summed: in the parameter's own, or, where that is shorter
    than float32, in zeros that `add_gradient` adds to it."""
    if parameter.dtype.itemsize < 4:
        return torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_gradient(parameter: Tensor, total: Tensor) -> None:
    """Add `total` to the gradient of the parameter, unless it is that gradient."""
    if parameter.grad is None:
        parameter.grad = total.to(parameter.dtype)
    elif parameter.grad is not total:
        parameter.grad.add_(total)


# -- log-probs of whole models -------------------------------------------------------------------

@torch.no_grad()
def sequence_logp(model, tokens: list[int]) -> Tensor:
    """Log-prob, float32, of each token of a sequence but the first, given those before: [len -
    1]."""
    segment = as_response(tokens)
    ids = segment.tokens[None].to(model.device)
    rows = response_rows(model.base_model(input_ids=ids).last_hidden_state, [segment])
    logp = float32_logits(model.get_output_embeddings(), rows).log_softmax(-1)
    return logp.gather(-1, segment.new_tokens[:, None].to(logp.device)).squeeze(-1)


@torch.no_grad()
def teacher_logq(head: torch.nn.Linear, rows: Tensor, vocab: int) -> Tensor:
    """Log-probs [M, vocab], float32, of the student's words after the teacher's last states [M,
    H].

    The normaliser is the teacher's own. The heads of two models may have different numbers of
    rows, padded to a round number: rows that only the teacher has are cut off, and words that only
    the student has are impossible to the teacher.
    """
    logq = float32_logits(head, rows).log_softmax(-1)[:, :vocab]
    return torch.nn.functional.pad(logq, (0, vocab - logq.shape[1]), value=-torch.inf)


def float32_logits(head: torch.nn.Linear, rows: Tensor) -> Tensor:
    """The logits [M, V] of a head in its own dtype, float32, from rows [M, H]."""
    if head.weight.dtype.itemsize >= 4:
        return head(rows).float()
    buffer = logit_buffer(rows, head.weight, max(1, len(rows)))
    return project(head, head.weight, rows, buffer)

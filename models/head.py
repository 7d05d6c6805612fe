"""
The LM head under a loss: from hidden states to gradients, a chunk of positions at a time; [positions, V] never exists.

At 151,936 words a position has 0.6 MB of logits. Autograd would hold them, their log-softmax, its gradient and theirs.
Here one buffer [chunk, V] holds, in this order, logits, exp(logits - peak) and d loss / d logits; then two matrix
products take it to the hidden states and to the head's weight, and it is used again. What makes that possible:

    logp = logits - logsumexp(logits), so  d loss / d logits = g at the columns the loss has seen - p * (sum of g)

with g = d loss / d logp [M, C], which autograd computes from the estimator as it is written, on C columns and not on V.
Where the estimator sees the whole vocabulary, C = V: then its own temporaries exist too, for one chunk.
The products run in the dtype of compute, all else in float32. What is left out: a fused kernel; soft-capped logits.
Shapes: M positions, H width, V words, C columns of a slot. Tests: tests/test_head.py
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.alignment import one_segment, response_rows


@torch.no_grad()
def head_logp(head: torch.nn.Linear, rows: Tensor, ids: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """logp [M, C] of ids [M, C] after the hidden states rows [M, H]; no gradient."""
    weight, logp = head.weight.to(dtype), []
    buffer = logit_buffer(rows, weight, chunk)
    for i in range(0, max(1, len(rows)), chunk):
        logits = project(head, weight, rows[i:i + chunk], buffer)
        seen = logits.gather(-1, ids[i:i + chunk])
        logp.append(seen - exponentiate(logits)[0])
    return torch.cat(logp)


@torch.no_grad()
def head_backward(head: torch.nn.Linear, rows: Tensor, ids: Tensor, loss: Callable[..., dict[str, Tensor]], *,
                  whole: bool, count: int, chunk: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """d loss / d rows [M, H], and all that `loss` measures [M]; the head's gradient is added to its parameters'.

    loss(at, logp, every) is asked about the positions `at`: logp [m, C] at ids and, where the loss is `whole`, every
    [m, V]. It returns a dict of [m]; the sum of its "loss" / count is what is differentiated.
    """
    weight, back, parts = head.weight.to(dtype), torch.empty_like(rows), []
    buffer, total = logit_buffer(rows, weight, chunk), float32_gradient(head.weight)
    for i in range(0, max(1, len(rows)), chunk):
        at = slice(i, i + chunk)
        logits, mass = project(head, weight, rows[at], buffer), 1.0
        if whole:
            every = logits.sub_(logits.logsumexp(-1, keepdim=True))
            leaf, logp = every.requires_grad_(), every.gather(-1, ids[at])
        else:
            every, seen = None, logits.gather(-1, ids[at])
            log_norm, mass = exponentiate(logits)
            leaf = logp = (seen - log_norm).requires_grad_()
        with torch.enable_grad():
            found = loss(at, logp, every)
            g, = torch.autograd.grad(found["loss"].sum() / count, leaf)
        parts.append({name: x.detach() for name, x in found.items()})
        p = every.detach().exp_() if whole else logits             # up to its sum, the mass
        d = p.mul_(-g.sum(-1, keepdim=True) / mass)
        d = d.add_(g) if whole else d.scatter_add_(-1, ids[at], g)
        if head.bias is not None and head.bias.requires_grad:
            float32_gradient(head.bias).add_(d.sum(0))
        d = d.to(dtype)
        back[at] = d @ weight
        if total is not None:
            x = rows[at].to(dtype)
            total.addmm_(d.T, x) if total.dtype == dtype else total.add_(d.T @ x)
    if total is not None and total is not head.weight.grad:
        head.weight.grad = total.to(head.weight.dtype)
    return back, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def logit_buffer(rows: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """[chunk, V], float32 or more, not yet filled."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty(min(chunk, len(rows)), len(weight), dtype=dtype, device=weight.device)


def project(head: torch.nn.Linear, weight: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """The buffer's first len(rows) rows, now the logits. The product itself is in the dtype of weight."""
    out, x = buffer[:len(rows)], rows.to(weight.dtype)
    torch.mm(x, weight.T, out=out) if out.dtype == x.dtype else out.copy_(x @ weight.T)
    return out if head.bias is None else out.add_(head.bias)


def exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place exp(logits - peak): p, up to its sum over V. Returns the log of the normaliser, and that sum, [m, 1]."""
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    return peak + mass.log(), mass


def float32_gradient(parameter: Tensor) -> Tensor | None:
    """Where to add up a gradient: the parameter's own, or float32 beside it where the parameter is shorter."""
    if not parameter.requires_grad:
        return None
    if parameter.dtype.itemsize < 4:
        return torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def sequence_logp(model, tokens: list[int]) -> Tensor:
    """Log-prob, float32, of each token of one sequence but the first, given those before it: [len - 1]."""
    segment = one_segment(tokens)
    rows = response_rows(model.base_model(input_ids=segment.tokens[None].to(model.device)).last_hidden_state, [segment])
    logp = model.get_output_embeddings()(rows).float().log_softmax(-1)
    return logp.gather(-1, segment.tokens[segment.start:, None].to(logp.device)).squeeze(-1)


def teacher_logq(head, rows: Tensor, vocab: int) -> Tensor:
    """Log-probs [M, vocab], float32, of the student's `vocab` words from the teacher's last states [M, H].

    The normaliser is the teacher's own. A model's head may have more rows than there are words, padded to a round
    number: those that only the teacher has are cut off, those that only the student has are impossible to the teacher.
    """
    logq = head(rows).float().log_softmax(-1)[:, :vocab]
    return torch.nn.functional.pad(logq, (0, vocab - logq.shape[1]), value=-torch.inf)

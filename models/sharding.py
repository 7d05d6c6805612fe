"""
How the student lies in the memory of its learners: sharded parameters, layers computed again.

Every learner gets the same orders and the same slots, takes its share of the responses, and ends
with the same gradient: that of the whole batch. PyTorch's FSDP2 gathers the parameters of a layer
when they are needed, and sums and scatters their gradient; embedding and head are gathered for a
whole micro-batch, so that head.py finds the weight whole. Learner 0 alone publishes, saves and
reports. All learners must take part in whatever gathers: one that has nothing left to do does
nothing along with the others. A learner that dies ends the run; the parent ends those that wait.

What is left out: several machines; tensor and sequence parallelism. Tests: tests/test_shards.py
"""
from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cache import Segment
from models.alignment import by_length


def layers(model) -> list[torch.nn.Module]:
    """The repeated blocks of a transformers model."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute(model) -> None:
    """Keep only the input of each layer for the backward pass, and compute the rest again.

    Only the layers themselves are put in training mode, which switches this on. The modules inside
    stay in eval mode, so that dropout stays off.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers(model):
        layer.training = True


def compute_in(model, dtype: torch.dtype) -> None:
    """Let modules compute with their parameters in `dtype`, as FSDP does. The parameters stay
    float32, and so do the sums of their gradients.

    Everything between layers is then in `dtype` as well, as in an engine. Under autocast alone it
    would be float32, which is more exact, but not what the engine has sampled from: on the toy
    w = p / mu at lag 0 scatters by 0.016 with autocast and by 0.002 like this
    (benchmarks/precision.py).
    """
    def shorten(module, inputs) -> None:
        for name, p in module.named_parameters(recurse=False):
            vars(module)[name] = p.to(dtype)         # is found before the parameter of that name

    def restore(module, inputs, output) -> None:
        for name, _ in module.named_parameters(recurse=False):
            vars(module).pop(name, None)

    def rounded(module, inputs, output: Tensor) -> Tensor:
        return output.to(dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):   # the same as to round all of its weight
            module.register_forward_hook(rounded)
        elif next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(shorten)
            module.register_forward_hook(restore, always_call=True)


def shard_of(p: Tensor) -> Tensor:
    """What this learner has of a parameter, in its own memory; without gradients."""
    if dist.is_initialized() and isinstance(p, dist.tensor.DTensor):
        return p.to_local()
    return p


def last_hidden(model, tokens: Tensor,
                wanted: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Token ids [B, L], padded on the right -> last hidden states [B, L, H], and those after each
    of the layers `wanted`.

    There is no mask: causal attention never looks to the right, and without a mask it may use its
    fastest kernel.
    """
    out = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=bool(wanted))
    return out.last_hidden_state, [out.hidden_states[1 + layer] for layer in wanted]


class Ranks:
    """This learner among `size`. With one learner every method returns what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, meeting: str = ""):
        """`meeting`: a file that does not exist yet, through which the learners find each other.

        They listen on the loopback interface only.
        """
        self.rank = rank
        self.size = size
        if size > 1:
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store = dist.FileStore(meeting, size)
            dist.init_process_group(backend, rank=rank, world_size=size, store=store,
                                    timeout=timedelta(hours=1))

    def leave(self) -> None:
        """The last act of one learner among several: its process ends here.

        An interpreter that winds up normally stops gloo's threads wherever they are. One that is
        releasing a tensor at that moment takes the process along with SIGABRT.
        """
        if self.size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    # -- the model

    def shard(self, model, device: torch.device, dtype: torch.dtype) -> None:
        """Distribute float32 shards. They are gathered in the dtype of compute, and gradients are
        summed in float32. One learner computes in the same way. The model gets the method
        `last_hidden`."""
        model.last_hidden = types.MethodType(last_hidden, model)
        if self.size == 1:
            model.to(device)
            if dtype != torch.float32:
                compute_in(model, dtype)
            return
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )
        mesh = dist.device_mesh.init_device_mesh(device.type, (self.size,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "last_hidden")

    def release(self, model) -> None:
        """After a forward pass without a backward pass: free what was gathered, since the next
        update changes it."""
        if self.size > 1:
            model.reshard()

    def gather(self, x: Tensor) -> Tensor:
        """A sharded tensor as a whole; any other as it is."""
        if self.size > 1 and isinstance(x, dist.tensor.DTensor):
            return x.full_tensor()
        return x

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """All of them, whole, on the CPU of learner 0; the others take part and get nothing."""
        found = {}
        for name, x in tensors:
            x = self.gather(x.detach())
            if self.rank == 0:
                found[name] = x.cpu()
        return found

    def part(self, x: Tensor, like: Tensor) -> Tensor:
        """A whole tensor placed as `like` is: on its device, and sharded if it is sharded."""
        x = x.to(like.device)
        if self.size == 1 or x.dim() == 0:
            return x
        return dist.tensor.distribute_tensor(x, like.device_mesh, like.placements,
                                             src_data_rank=None)

    def joined(self, x: Tensor, like: Tensor) -> Tensor:
        """A shard, wherever it lies, as a sharded tensor like `like`; any other as it is."""
        if self.size == 1:
            return x
        return dist.tensor.DTensor.from_local(
            x.to(like.device), like.device_mesh, like.placements, run_check=False,
            shape=like.shape, stride=like.stride())

    # -- the batch

    def groups(self, segments: list[Segment], token_budget: int) -> list[list[Segment]]:
        """The micro-batches of this learner.

        Every learner gets the same number of them; one that has fewer gets a segment without new
        tokens, so that it takes part in gathering.
        """
        order = sorted(segments, key=lambda s: -len(s.tokens))
        shares: list[list[Segment]] = [[] for _ in range(self.size)]
        for i, s in enumerate(order):        # 0 1 2 2 1 0 0 1 ..: alike in number and in length
            place = i % (2 * self.size)
            shares[min(place, 2 * self.size - 1 - place)].append(s)
        split = [list(by_length(share, token_budget)) for share in shares]
        missing = max(map(len, split)) - len(split[self.rank])
        return split[self.rank] + [[without_new_tokens(segments[0])] for _ in range(missing)]

    def all(self, x: Any) -> list:
        """The values of all learners, in their order."""
        if self.size == 1:
            return [x]
        found = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is true at any learner."""
        return any(self.all(bool(flag)))


def without_new_tokens(s: Segment) -> Segment:
    """A segment of one context token and nothing to train."""
    return replace(s, tokens=s.tokens[:1], prompt=1, start=1, version=s.version[:0], ids=s.ids[:0],
                   logpi=s.logpi[:0], logmu=s.logmu[:0], logq=s.logq[:0],
                   hidden=s.hidden[:0],
                   kept=None if s.kept is None else s.kept[:0],
                   extra={name: x[:0] for name, x in s.extra.items()})


def concatenated(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Per-token measurements [M] of several micro-batches as one, on the CPU."""
    parts = list(parts)
    return {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]}

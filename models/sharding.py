"""
How the student lies in its learners' memory: layers that are computed again, parameters sharded over several learners.

Every learner gets the same orders and the same slots, takes its share of the responses, and ends with the same
gradient: that of the whole batch. PyTorch's FSDP2 gathers a layer's parameters when they are needed and sums and
scatters its gradient; embedding and head are gathered for a whole micro-batch, so that head.py finds the weight whole.
Learner 0 alone publishes, saves and reports. All of them must take part in whatever gathers: where one has nothing
left to do it does nothing along with the others. A learner that dies ends the run; the parent ends those that wait.

What is left out: several machines, tensor and sequence parallelism. Tests: tests/test_shards.py
"""
from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable, Sequence
from datetime import timedelta

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
    """Keep only the input of each layer for the backward pass. The layers alone are told that they train: dropout,
    which asks the modules inside of them, stays off."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers(model):
        layer.training = True


def shard_of(p: Tensor) -> Tensor:
    """What this learner has of a parameter, in its own memory; without gradients."""
    return p.to_local() if dist.is_initialized() and isinstance(p, dist.tensor.DTensor) else p


def last_hidden(model, tokens: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """[B, L] right-padded -> [B, L, H], and the same after each of `layers`. Without a mask: causal attention never
    looks to the right, and may take its fastest kernel."""
    out = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=bool(layers))
    return out.last_hidden_state, [out.hidden_states[1 + i] for i in layers]


class Ranks:
    """This learner among `size`. With one alone every method gives back what it is given."""

    def __init__(self, rank: int = 0, size: int = 1, meeting: str = ""):
        """`meeting`: a file that is not there yet, by which they find each other; nothing listens but on loopback."""
        self.rank, self.size = rank, size
        if size > 1:
            os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=rank,
                                    world_size=size, store=dist.FileStore(meeting, size), timeout=timedelta(hours=1))

    def leave(self) -> None:
        """The last act of one of several: its process ends here. An interpreter that winds up ends gloo's threads
        wherever they stand, and one that was letting go of a tensor takes the process along with SIGABRT."""
        if self.size > 1:
            dist.destroy_process_group()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)

    # -- the model

    def shard(self, model, device: torch.device, dtype: torch.dtype) -> None:
        """Float32 shards; gathered in the dtype of compute, gradients summed in float32."""
        model.last_hidden = types.MethodType(last_hidden, model)
        if self.size == 1:
            model.to(device)
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        how = dict(mesh=dist.device_mesh.init_device_mesh(device.type, (self.size,)),
                   mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        for layer in layers(model):
            fully_shard(layer, **how)
        fully_shard(model, **how)
        register_fsdp_forward_method(model, "last_hidden")

    def settle(self, model) -> None:
        """After a forward pass without a backward: let go of what was gathered, which the next update will change."""
        if self.size > 1:
            model.reshard()

    def whole(self, x: Tensor) -> Tensor:
        """A sharded tensor, gathered; any other as it is."""
        return x.full_tensor() if self.size > 1 and isinstance(x, dist.tensor.DTensor) else x

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """All of them, whole, on the CPU, at learner 0; nothing at the others, who take part."""
        found = {}
        for name, x in tensors:
            x = self.whole(x.detach())
            if self.rank == 0:
                found[name] = x.cpu()
        return found

    def part(self, x: Tensor, like: Tensor) -> Tensor:
        """A whole tensor as `like` is: on its device, and this learner's shard of it if it is sharded."""
        x = x.to(like.device)
        if self.size == 1 or x.dim() == 0:
            return x
        return dist.tensor.distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)

    def joined(self, x: Tensor, like: Tensor) -> Tensor:
        """A shard, wherever it lies, as the sharded tensor that `like` is; any other as it is."""
        if self.size == 1:
            return x
        return dist.tensor.DTensor.from_local(x.to(like.device), like.device_mesh, like.placements, run_check=False,
                                              shape=like.shape, stride=like.stride())

    # -- the batch

    def groups(self, segments: list[Segment], token_budget: int) -> list[list[Segment]]:
        """This learner's micro-batches; every learner gets as many, if need be with a segment of nothing to train."""
        order = sorted(segments, key=lambda s: -len(s.tokens))
        shares = [[s for i, s in enumerate(order) if i % (2 * self.size) in (r, 2 * self.size - 1 - r)]
                  for r in range(self.size)]              # 0 1 2 2 1 0 0 1 ..: alike in number and in length
        split = [list(by_length(share, token_budget)) for share in shares]
        nothing = [Segment(s.slot, s.tokens[:1], 1, 1, s.version[:0], s.ids[:0], s.logmu[:0], s.logq[:0], s.hidden[:0],
                           s.states[:0])
                   for s in segments[:1]]
        return split[self.rank] + [nothing] * (max(map(len, split)) - len(split[self.rank]))

    def all(self, x) -> list:
        """What every learner has, in their order."""
        if self.size == 1:
            return [x]
        found = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def any(self, flag: bool) -> bool:
        return any(self.all(bool(flag)))


def concatenated(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Per-token measurements [M] of several micro-batches as one, on the CPU."""
    parts = list(parts)
    return {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]}

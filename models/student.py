"""
The student: forward and backward pass, publishing and saving. LoRA and sharding are hidden here.

Master weights and every log-prob are float32; with --dtype bfloat16 the matrix products run in
that. A bf16 master copy would lose 96% of a step of size 3e-6: most updates round to nothing. The
logits are head.py's, one chunk at a time and only at response positions.

What is left out: the loss and the optimizer (learner.py); sequence parallelism.
Shapes: M new tokens of a micro-batch, m of them with cached scores; H width; C columns of a slot.
Tests: tests/test_learner.py, tests/test_lora.py, tests/test_shards.py
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cache import Segment
from config import Config
from models.alignment import as_response, kept_rows, pad, response_rows
from models.footprint import chunk_size, free_gb
from models.head import Loss, head_backward, head_logp
from models.loading import correct_dtype, load_model, stop_ids
from models.lora import Merged, merged_state, save_adapter, with_lora
from models.sharding import Ranks, recompute


class Student:
    """The model that learns, or this learner's shards of it."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype, checkpoint: str = "",
                 ranks: Ranks | None = None):
        """`dtype` of compute. `checkpoint`: a folder whose weights to start from; "":
        --student."""
        self.cfg = cfg
        self.device = torch.device(device)
        self.dtype = dtype
        self.ranks = ranks or Ranks()
        folder = checkpoint or cfg.student
        if cfg.lora_rank:
            folder = cfg.student             # in a checkpoint the adapters are merged
        self.model = load_model(folder, "cpu", torch.float32)
        if cfg.lora_rank:
            with_lora(self.model, cfg.lora_rank, cfg.seed)
        self.head = self.model.get_output_embeddings()
        self.chunk = chunk_size(cfg, self.words, self.free_gb(device))
        if cfg.gradient_checkpointing:
            recompute(self.model)
        self.ranks.shard(self.model, self.device, dtype)

    @property
    def words(self) -> int:
        """V: the number of rows of the head."""
        return self.head.weight.shape[0]

    def trained(self) -> list[tuple[str, Tensor]]:
        """The parameters that learn, by name; under LoRA only those of the adapters."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @staticmethod
    def free_gb(device: str) -> float:
        if device == "cpu":
            return free_gb().get("cpu", math.inf)
        return torch.cuda.mem_get_info(device)[0] / 1e9

    # -- forward and backward --------------------------------------------------------------------

    def rows(self, group: list[Segment]) -> Tensor:
        """The hidden states [m, H] that predict the new tokens whose scores are cached."""
        return self.rows_and_states(group, ())[0]

    def rows_and_states(self, group: list[Segment],
                        layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and the states of `layers` [M, H] at all new tokens."""
        tokens, _ = pad(group, self.device)
        with self.compute():
            last, states = self.model.last_hidden(tokens, layers)
        rows = kept_rows(response_rows(last, group), group)
        return rows, {layer: response_rows(x, group) for layer, x in zip(layers, states)}

    def logp(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Log-probs [m, C] of the words `ids` [m, C] after `rows` [m, H]; no gradient."""
        return head_logp(self.head, rows, ids, chunk=self.chunk, dtype=self.dtype)

    def head_backward(self, rows: Tensor, ids: Tensor, loss: Loss, *, count: float,
                      all_words: bool, best: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """d loss / d rows [m, H] and what `loss` has measured; see models/head.py."""
        return head_backward(self.head, rows.detach(), ids, loss, count=count, best=best,
                             all_words=all_words, chunk=self.chunk, dtype=self.dtype)

    def compute(self):
        """The context in which matrix products run in the dtype of compute."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def release(self) -> None:
        """After a forward pass without a backward pass: free what sharding has gathered for it."""
        self.ranks.release(self.model)

    # -- publishing ------------------------------------------------------------------------------

    @torch.no_grad()
    def probe_logp(self, tokens: list[int]) -> Tensor:
        """Log-probs [len - 1] of a sequence, by which an engine proves that it has these
        weights."""
        probe = as_response(tokens)
        logp = self.logp(self.rows([probe]), probe.new_tokens[:, None].to(self.device))
        self.release()
        return logp.squeeze(-1).cpu()

    def parameters(self) -> Mapping[str, Tensor]:
        """All weights by name, adapters merged; a shard still has to be gathered."""
        return Merged(self.model)

    def gather(self, x: Tensor) -> Tensor:
        """A parameter as a whole tensor. All learners take part."""
        return self.ranks.gather(x)

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU of the first learner; all learners take part."""
        return self.ranks.collect(tensors)

    # -- saving ----------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write the student in Hugging Face's format: config, safetensors, tokenizer."""
        from transformers import AutoTokenizer
        state = self.collect(merged_state(self.model))
        if self.ranks.rank > 0:
            return
        ends = stop_ids(self.cfg.student, self.cfg.teacher)
        self.model.generation_config.eos_token_id = ends         # as it was trained
        in_dtype = {name: x.to(self.dtype) for name, x in state.items()}
        self.model.save_pretrained(folder, state_dict=in_dtype)
        correct_dtype(folder / "config.json", self.dtype)
        AutoTokenizer.from_pretrained(self.cfg.student).save_pretrained(folder)

    def write_adapter(self, folder: Path) -> None:
        """Write the LoRA matrices alone, as peft loads them; nothing without --lora-rank."""
        if self.cfg.lora_rank:
            save_adapter(self.model, self.cfg.student, folder)

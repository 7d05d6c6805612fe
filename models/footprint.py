"""
models.footprint
"""
from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from estimators import ESTIMATORS

if TYPE_CHECKING:
    from asyncopd import Config


CHUNK_GB = 0.27          # logits of one chunk: 441 positions of Qwen's 151,936 words

@dataclass(frozen=True)
class Shape:
    """What memory follows from: parameters P, words V, layers L, widths H (model), I (MLP), A (heads), K (kv heads)."""
    P: int
    V: int
    L: int
    H: int
    I: int  # noqa: E741
    A: int
    K: int

    @classmethod
    def of(cls, config) -> Shape:
        """From a transformers configuration; the parameters are counted on a model without storage."""
        from transformers import AutoModelForCausalLM
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        c = config.get_text_config()
        heads = c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // heads
        experts, inner = getattr(c, "num_experts_per_tok", None), getattr(c, "moe_intermediate_size", None)
        return cls(P=sum(p.numel() for p in model.parameters()), V=c.vocab_size, L=c.num_hidden_layers, H=c.hidden_size,
                   I=experts * inner if experts and inner else getattr(c, "intermediate_size", 4 * c.hidden_size),
                   A=heads * width, K=(getattr(c, "num_key_value_heads", None) or heads) * width)

    def adapters(self, rank: int) -> int:
        """Parameters of --lora-rank: two thin matrices beside each of a layer's seven linear ones."""
        return rank * self.L * (7 * self.H + 2 * self.A + 2 * self.K + 3 * self.I)

    def layer(self, half: bool) -> int:
        """Bytes per token that one layer keeps for the backward pass: exact for Qwen3, a little less without q-norm.

        In bf16 (autocast) the residual stream, the norms' inputs and what q and k are before theirs stay float32.
        """
        H, I, A, K = self.H, self.I, self.A, self.K  # noqa: E741
        return 26 * H + 10 * A + 10 * K + 8 * I if half else 4 * (6 * H + 4 * A + 4 * K + 4 * I)

    def activations(self, half: bool, again: bool) -> int:
        """Bytes per token of a training step; `again`: gradient checkpointing, only a layer's input is kept.

        The additional layer is the one that is being differentiated.
        """
        kept = 4 * self.H if again else self.layer(half)
        return self.L * kept + self.layer(half) + 16 * self.H

    def cached(self, itemsize: int) -> int:
        """Bytes per token of keys and values."""
        return 2 * self.L * self.K * itemsize


def logit_bytes(support: str, half: bool) -> int:
    """Bytes per logit of a chunk: one float32 buffer, and a bf16 one beside it on a GPU. Where the estimator sees
    all words: the teacher's log-probs as well, the gradient, and what autograd keeps of the divergence."""
    return (40 if support == "full" else 4) + (2 if half else 0)


def chunk_size(cfg: Config, vocab: int, free_gb: float = math.inf) -> int:
    """Positions whose logits exist at once: --chunk, or what fits in CHUNK_GB and in an eighth of what is free."""
    each = vocab * logit_bytes(ESTIMATORS[cfg.estimator].support, cfg.gpus > 0) / 1e9
    return cfg.chunk or max(16, int(min(CHUNK_GB, free_gb / 8) / each))


def free_gb() -> dict[str, float]:
    """device -> GB free now, and `gpu` -> size of a GPU; only of what is here. Asks nvidia-smi: CUDA would take a
    part of every GPU for the parent, which has no business there."""
    found = {"shm": shutil.disk_usage("/dev/shm").free / 1e9} if Path("/dev/shm").exists() else {}
    if (meminfo := Path("/proc/meminfo")).exists():
        found["cpu"] = next(int(line.split()[1]) for line in meminfo.read_text().splitlines()
                            if line.startswith("MemAvailable")) * 1024 / 1e9
    if shutil.which("nvidia-smi"):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        asked = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(asked + (["-i", seen] if seen else []), capture_output=True, text=True)
        for i, line in enumerate(said.stdout.splitlines() if said.returncode == 0 else ()):
            found[f"cuda:{i}"], found["gpu"] = (float(x) * 2 ** 20 / 1e9 for x in line.split(","))
    return found

"""
The sizes of a model and the memory that follows from them, before any weight is read; and the
memory that is free.

Tests: tests/test_plan.py
"""
from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config, in_bf16
from estimators import ESTIMATORS

# Logits of one chunk: on a CPU 444 positions of Qwen's 151,936 words in float32; on a GPU, where
# larger products are faster, 2,193 in bf16
CHUNK_GB = {"cpu": 0.27, "gpu": 2.0}


@dataclass(frozen=True)
class Shape:
    """What memory follows from."""
    P: int                                       # parameters
    V: int                                       # words: rows of the LM head
    L: int                                       # layers
    H: int                                       # width of the model
    I: int  # noqa: E741                         # width of the MLP; of its active experts together
    A: int                                       # width of all attention heads
    K: int                                       # width of all key-value heads

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration. Parameters are counted on a model without storage."""
        from transformers import AutoModelForCausalLM
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        c = config.get_text_config()
        heads = c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        head_width = getattr(c, "head_dim", None) or c.hidden_size // heads
        return cls(P=sum(p.numel() for p in model.parameters()), V=c.vocab_size,
                   L=c.num_hidden_layers, H=c.hidden_size, I=mlp_width(c),
                   A=heads * head_width, K=kv_heads * head_width)

    def adapters(self, rank: int) -> int:
        """Parameters of --lora-rank: two thin matrices for each of a layer's seven linear ones."""
        return rank * self.L * (7 * self.H + 2 * self.A + 2 * self.K + 3 * self.I)

    def layer(self, half: bool) -> int:
        """Bytes per token that one layer keeps for the backward pass: exact for Qwen3, a little
        less without q-norm.

        In bf16 the norms of a layer, and those of q and k, keep what they compute in float32.
        """
        H, I, A, K = self.H, self.I, self.A, self.K  # noqa: E741
        if half:
            return 16 * H + 10 * A + 10 * K + 8 * I
        return 4 * (6 * H + 4 * A + 4 * K + 4 * I)

    def activations(self, half: bool, again: bool) -> int:
        """Bytes per token of a training step. With `again`, gradient checkpointing, only the input
        of a layer is kept.

        The additional layer is the one that is being differentiated.
        """
        kept = self.layer(half)
        if again:
            kept = (2 if half else 4) * self.H
        return self.L * kept + self.layer(half) + 16 * self.H

    def cached(self, itemsize: int) -> int:
        """Bytes per token of keys and values."""
        return 2 * self.L * self.K * itemsize


def mlp_width(c: Any) -> int:
    """Width of the MLP that a token meets, from a transformers configuration."""
    experts = getattr(c, "num_experts_per_tok", None)
    expert_width = getattr(c, "moe_intermediate_size", None)
    if experts and expert_width:
        return experts * expert_width
    return getattr(c, "intermediate_size", 4 * c.hidden_size)


def logit_bytes(support: str, half: bool) -> int:
    """Bytes per logit of a chunk: a float32 buffer, and with --dtype bfloat16 one in that. Where the
    estimator sees all words, also the teacher's log-probs, the gradient, and what autograd keeps
    of the divergence."""
    float32 = 40 if support == "full" else 4
    return float32 + (2 if half else 0)


def chunk_size(cfg: Config, vocab: int, free_gb: float = math.inf) -> int:
    """Positions whose logits exist at once in the learner: as many as fit in CHUNK_GB and in an
    eighth of what is free."""
    most_gb = CHUNK_GB["gpu" if cfg.gpus > 0 else "cpu"]
    per_position = vocab * logit_bytes(ESTIMATORS[cfg.estimator].support, in_bf16(cfg)) / 1e9
    return max(16, int(min(most_gb, free_gb / 8) / per_position))


def gpu_share(cfg: Config, role: str) -> float:
    """Share of a GPU's memory that vLLM takes for a role: nearly all of a GPU of its own, less of
    one that any worker of the role shares. Where GPUs are fewer than workers, the last one is shared
    (control/plan.py).
    """
    rollouts_end = cfg.rollouts
    teachers_end = rollouts_end + cfg.teachers * cfg.teacher_gpus
    end = rollouts_end if role == "rollout" else teachers_end
    shared = teachers_end + cfg.learners > cfg.gpus and end >= cfg.gpus
    return 0.3 if shared else 0.85


def free_gb() -> dict[str, float]:
    """device -> GB free now, and `gpu` -> size of a GPU; only of what is there.

    This asks nvidia-smi: CUDA would take a part of every GPU for the parent, which has no work
    for one.
    """
    found = {}
    if Path("/dev/shm").exists():
        found["shm"] = shutil.disk_usage("/dev/shm").free / 1e9
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = meminfo.read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        found["cpu"] = int(available.split()[1]) * 1024 / 1e9
    for i, row in enumerate(nvidia_smi("memory.free", "memory.total")):
        found[f"cuda:{i}"], found["gpu"] = (float(mib) * 2 ** 20 / 1e9 for mib in row)
    return found


def nvidia_smi(*wanted: str) -> list[list[str]]:
    """Its answers about every GPU that this process may see; none without a GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader,nounits"]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen:
        asked += ["-i", seen]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode != 0:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]

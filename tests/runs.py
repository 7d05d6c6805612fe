"""Runs of the real command, from outside: start them, read what they write, see what they leave behind."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from control.command_line import as_flag
from tests.conftest import ROOT


def command(config_flags: dict) -> list[str]:
    flags = (as_flag(k.replace("__", "."), v) for k, v in config_flags.items())
    return [sys.executable, str(ROOT / "asyncopd.py"), *flags]


def run(flags: dict, timeout=240) -> subprocess.CompletedProcess:
    return subprocess.run(command(flags), capture_output=True, text=True, timeout=timeout)


def lines(flags: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(flags["out"]) / "log.jsonl").read_text().splitlines()]


def steps(flags: dict) -> list[dict]:
    return [line for line in lines(flags) if line["type"] == "step"]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def left_in_shared_memory(before: set[str]) -> set[str]:
    """What is new since `before` and stays. What another test's run makes at the same time goes with that run."""
    new = shared_memory() - before
    limit = time.monotonic() + 60
    while new and time.monotonic() < limit:
        time.sleep(0.1)
        new &= shared_memory()
    return new


def alive(pids) -> list[int]:
    def state(p):
        return Path(f"/proc/{p}/stat").read_text().split()[2]
    return [p for p in pids if Path(f"/proc/{p}").exists() and state(p) != "Z"]


def children_of(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_and_wait_for(flags, step: int) -> tuple[subprocess.Popen, dict]:
    process = subprocess.Popen(command(flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        log = Path(flags["out"]) / "log.jsonl"
        if log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines()):
            return process, lines(flags)[0]["pids"]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.stderr.read())

"""Runs of the real command, from outside: start them, read what they write, see what they leave behind.

They are started by a warm server (tests/warm.py), which saves each of them the imports of large libraries.
"""
import atexit
import functools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.multiprocessing

from control.command_line import as_flag
from tests.conftest import ROOT
from transport.process import processes


@functools.cache
def warm_server() -> str:
    """The socket of this process's warm server, which ends with this process."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = f"{folder}/socket"
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "warm.py"), address], stdin=subprocess.PIPE)
    atexit.register(server.stdin.close)
    limit = time.monotonic() + 120
    while not Path(address).exists():
        assert server.poll() is None and time.monotonic() < limit, "the warm server did not start"
        time.sleep(0.05)
    return address


class Process:
    """What subprocess.Popen offers of a command [python, ...], which is a copy of the warm server. Its output goes to
    files."""

    def __init__(self, command: list[str], cwd: str | Path | None = None, env: dict[str, str] | None = None):
        assert command[0] == sys.executable, command
        self.returncode: int | None = None
        self.stdout, self.stderr = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))
        request = dict(arguments=[str(x) for x in command[1:]], cwd=str(cwd or os.getcwd()),
                       env=dict(env or os.environ))
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(warm_server())
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), self.stdout.fileno(), self.stderr.fileno()]
            socket.send_fds(self.connection, [json.dumps(request).encode() + b"\n"], streams)
            self.answers = self.connection.makefile()
            self.pid = int(self.answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self.answers.readline()))
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        limit = time.monotonic() + timeout
        while self.poll() is None:
            left = limit - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            select.select([self.connection], [], [], left)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        said = []
        for file in (self.stdout, self.stderr):
            file.seek(0)
            said.append(file.read())
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


def complete(command: list[str], timeout: float = 240, cwd=None, env=None) -> subprocess.CompletedProcess:
    """Like subprocess.run with its output captured as text."""
    process = Process(command, cwd, env)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def command(config_flags: dict) -> list[str]:
    flags = (as_flag(k.replace("__", "."), v) for k, v in config_flags.items())
    return [sys.executable, str(ROOT / "asyncopd.py"), *flags]


def run(flags: dict, timeout=240) -> subprocess.CompletedProcess:
    return complete(command(flags), timeout)


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


def start_and_wait_for(flags, step: int) -> tuple[Process, dict]:
    process = Process(command(flags))
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        log = Path(flags["out"]) / "log.jsonl"
        if log.exists() and any(f'"step": {step},' in line for line in log.read_text().splitlines()):
            return process, lines(flags)[0]["pids"]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[1])


def in_two(function, *args) -> None:
    """function(rank, *args) in two processes, copies of one that has imported the large libraries."""
    processes()              # says which
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method="forkserver")

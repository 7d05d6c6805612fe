"""Weights that go from device to device: the transport of --transport nccl, between processes, over gloo on the CPU."""
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from control.resolve import configure
from tests.conftest import ROOT
from tests.runs import command, complete, left_in_shared_memory, lines, shared_memory, steps
from transport import direct, pair, pinned
from transport.checksum import checksum
from transport.direct import DirectWeights
from transport.process import processes
from transport.weights import Weights

LAYOUT = {"a": torch.Size([300, 500]), "b": torch.Size([7]), "c": torch.Size([2, 3]), "d": torch.Size([90_001])}
BIG = LAYOUT | {"a": torch.Size([2**23])}        # 16 MB, more than the kernel keeps of a connection
PROBE = [1, 2, 3]
PARCEL = 250_000         # bytes: `a` and then the rest
HARD_S = 100             # no process takes longer, whatever it waits for


def weights(folder, layout=LAYOUT) -> DirectWeights:
    """Made in small parcels, as the parent would."""
    before, direct.PARCEL_BYTES = direct.PARCEL_BYTES, PARCEL
    try:
        return DirectWeights(layout, PROBE, torch.bfloat16, str(folder))
    finally:
        direct.PARCEL_BYTES = before


def parameters(version, layout) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=g) for name, shape in layout.items()}


def publish(w, version) -> float:
    """Seconds that the learner waits."""
    made = parameters(version, w.layout)
    start = time.monotonic()
    w.publish(made, version, torch.full((2,), float(version)))
    return time.monotonic() - start


def taken(w, published) -> dict[str, torch.Tensor] | None:
    """Copies, if they are still those of one version."""
    found = {name: x.clone() for name, x in published.tensors.items()}
    return found if w.holds(published.version) else None


def compare(w, published, found) -> None:
    """Every bit is that of the version."""
    assert {name: checksum(x) for name, x in found.items()} == published.checksums
    assert published.probe_logp.eq(published.version).all()
    for name, x in parameters(published.version, w.layout).items():
        assert torch.equal(found[name], x.bfloat16())


def check(w, published) -> None:
    compare(w, published, taken(w, published))


class Answers:
    """What processes send; it is sent when `put` returns, and the sender may be killed then."""

    def __init__(self):
        self.queue = processes().SimpleQueue()

    def put(self, answer):
        self.queue.put(answer)

    def get(self):
        wait_until(lambda: not self.queue.empty())
        return self.queue.get()


# -- the processes of these tests ------------------------------------------------------------------

def read_at_random(w, seed, results) -> None:
    """Read until the last version has come; what is whole must be right."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    seen, torn = [], 0
    w.attach("cpu")
    while 9 not in seen:
        time.sleep(rng.random() * 0.03)
        published = w.read()
        found = taken(w, published)
        if found is None:
            torn += 1
            continue
        compare(w, published, found)
        seen.append(published.version)
    results.put((seed, seen, torn))


def stop_within(w, number, results) -> None:
    """Ask for a parcel, and stand still before it is received."""
    pair.LIMIT_S = 5.0
    w.attach("cpu")
    next(iter(w.read().tensors.values()))                                 # connected
    finish = pair.Pair.finish

    def never(self, work, alive):
        pair.Pair.finish = finish
        results.put(os.getpid())
        os.kill(os.getpid(), number)
        finish(self, work, alive)                                         # in one that is continued
    pair.Pair.finish = never
    taken(w, w.read())                                                    # is overwritten meanwhile
    published = w.read()
    check(w, published)
    results.put((published.version, w.reader.connections))


@pytest.fixture
def started():
    """started(function, *args): a process that is gone at the end of the test."""
    made = []

    def start(function, *args):
        process = processes().Process(target=function, args=args, daemon=True)
        process.start()
        made.append(process)
        return process
    yield start
    for process in made:
        process.kill()
        process.join()


@pytest.fixture
def served(tmp_path, request):
    w = weights(tmp_path, getattr(request, "param", LAYOUT))
    publish(w, 0)
    yield w
    if w.reader:
        w.reader.hang_up()
    w.close()


def wait_until(happened) -> None:
    end = time.monotonic() + HARD_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def state(pid: int) -> str:
    """Of a process, as the kernel says: R, S, T (stopped) ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- what a reader gets ----------------------------------------------------------------------------

def test_parcels_hold_whole_tensors(tmp_path):
    w = weights(tmp_path)
    assert [w.parcel_of[name] for name in LAYOUT] == [0, 1, 1, 1]
    assert w.parcels[0].end == w.parcels[1].start and w.parcels[1].end == w.size
    assert all(start * 2 % 64 == 0 for start in w.starts.values())
    assert w.nbytes == 2 * sum(shape.numel() for shape in LAYOUT.values())


def test_readers_at_random_moments_get_whole_versions(served, started):
    results = Answers()
    readers = 3
    for seed in range(readers):
        started(read_at_random, served, seed, results)
    wait_until(lambda: len(served.server.served) == readers)
    for version in range(1, 10):
        publish(served, version)
        time.sleep(0.05)
    found = [results.get() for _ in range(readers)]
    for _, seen, _ in found:
        assert seen == sorted(seen) and seen[-1] == 9, "no older version after a newer one"


def test_exactly_the_version_asked_for_as_long_as_it_is_there(served):
    for version in (1, 2):
        publish(served, version)
    for version in (1, 2, None):
        published = served.read(version)
        assert published.version == (version or 2)
        check(served, published)
    with pytest.raises(AssertionError, match="overwritten"):
        served.read(0)


def test_what_is_overwritten_within_a_fetch_is_not_taken_for_whole(served):
    published = served.read()
    tensors = iter(published.tensors.items())
    next(tensors)
    for version in (1, 2):
        publish(served, version)
    mixed = dict(tensors)
    assert not served.holds(0) and checksum(mixed["d"]) != published.checksums["d"]
    assert taken(served, published) is None


# -- peers that are lost ---------------------------------------------------------------------------

BOUND_S = 2.0            # of a publish in these tests, on a machine that does other things


@pytest.mark.parametrize("served", [BIG], indirect=True, ids=["16 MB"])
def test_a_reader_that_is_killed_within_a_transfer_leaves_the_learner_and_its_successor_alone(served, started):
    results = Answers()
    first = started(stop_within, served, signal.SIGKILL, results)
    first.join(HARD_S)
    assert first.exitcode == -signal.SIGKILL
    assert max(publish(served, version) for version in (1, 2, 3)) < BOUND_S
    wait_until(lambda: not any(thread.is_alive() for thread in served.server.served))
    successor = started(read_at_random, served, 0, results)
    publish(served, 9)
    assert results.get() == first.pid and results.get()[1][-1] == 9
    successor.join(HARD_S)
    served.close()
    assert not list(Path(served.folder).iterdir()), "no meeting point is left"


@pytest.mark.parametrize("served", [BIG], indirect=True, ids=["16 MB"])
def test_a_reader_that_stands_still_holds_up_nobody_and_may_come_again(served, started, monkeypatch):
    monkeypatch.setattr(pair, "LIMIT_S", 3.0)                             # of this process, the learner's
    results = Answers()
    send, sends = pair.Pair.send, []

    def once_it_stands_still(self, x, alive):
        """The second transfer, that is: all of it might have arrived before."""
        sends.append(x)
        if len(sends) == 2:
            wait_until(lambda: state(first.pid) == "T")
        send(self, x, alive)
    monkeypatch.setattr(pair.Pair, "send", once_it_stands_still)
    first = started(stop_within, served, signal.SIGSTOP, results)
    pid = results.get()
    assert max(publish(served, version) for version in (1, 2)) < BOUND_S
    assert served.server.served[0].is_alive(), "it waits for this reader"
    check(served, served.read())                                          # another one does not
    wait_until(lambda: not served.server.served[0].is_alive())
    os.kill(pid, signal.SIGCONT)
    assert results.get() == (2, 2), "the newest version, by a second connection"
    first.join(HARD_S)
    assert first.exitcode == 0


def test_a_reader_whose_learner_is_gone_says_so(tmp_path):
    w = weights(tmp_path)
    w.clock.fill_(0)
    with pytest.raises(ConnectionError, match="the learner does not send its weights"):
        next(iter(w.read().tensors.values()))


def test_the_learner_serves_to_its_end_those_who_are_connected(served):
    published = served.read()
    next(iter(published.tensors.values()))
    closing = threading.Thread(target=served.close)
    closing.start()
    check(served, published)
    served.reader.hang_up()
    start = time.monotonic()
    closing.join()
    assert time.monotonic() - start < direct.LINGER_S / 2


# -- the command -----------------------------------------------------------------------------------

GLOO = """
import control.resolve
control.resolve.check_transport = lambda cfg: None       # which refuses it where there is no GPU
"""
DAMAGE = """
import learner
published = learner.LearnerWorker.publish
def wrong(self):      # from version 3 on all are damaged; a single one might never be loaded
    seconds = published(self)
    if self.version >= 3:
        self.shared.weights.halves[self.version % 2] *= 1.5
    return seconds
learner.LearnerWorker.publish = wrong
"""


def run_over_gloo(flags, folder, change=""):
    """The command with --transport nccl on a CPU; its workers import the same file."""
    file = folder / "asyncopd_over_gloo.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{GLOO}{change}\nimport asyncopd\n"
                    "if __name__ == '__main__':\n    sys.exit(asyncopd.main(sys.argv[1:]))\n")
    return complete([sys.executable, str(file), *command(flags | dict(transport="nccl"))[2:]], HARD_S)


@pytest.mark.parametrize("learners", [1, 2])
def test_the_command_trains_over_gloo_and_every_push_is_proved(flags, tmp_path, learners):
    before = shared_memory()
    done = run_over_gloo(flags | dict(steps=6, rollouts=2, learners=learners), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in steps(flags)] == list(range(1, 7)) and lines(flags)[-1]["type"] == "done"
    assert all(s["push_bytes"] > 0 and s["engine_gap_max"] <= 1e-4 for s in steps(flags))
    assert not any(e.get("what") == "restarted" for e in lines(flags))
    assert not left_in_shared_memory(before) and not list(Path(flags["out"]).glob(".weights-*"))


def test_bits_that_change_on_the_way_end_the_run(flags, tmp_path):
    done = run_over_gloo(flags | dict(steps=50), tmp_path, DAMAGE)
    assert done.returncode == 1 and "did not arrive in the engine" in done.stderr, done.stderr


def test_a_killed_rollout_worker_comes_back_and_reads_on(flags, tmp_path):
    killer = """
import os, rollout
load = rollout.Worker.load
def once(self, version):
    mark = self.cfg.out + "/killed"
    if self.version >= 2 and not os.path.exists(mark):       # a worker may skip versions
        open(mark, "w").close()
        self.weights.reader.receive = lambda *how: os.kill(os.getpid(), 9)
    load(self, version)
rollout.Worker.load = once
"""
    done = run_over_gloo(flags | dict(steps=12, rollouts=1), tmp_path, killer)
    assert done.returncode == 0, done.stderr
    assert [e["worker"] for e in lines(flags) if e.get("what") == "restarted"] == ["rollout0"]
    assert [s["step"] for s in steps(flags)] == list(range(1, 13))


# -- refusals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, said", [
    (["--gpus=0"], "--transport nccl: goes from GPU to GPU, and --gpus 0 uses none (--transport shared)"),
    (["--gpus=1", "--dry-run"], "rollout0 on the GPU of the learner, cuda:0"),
    (["--gpus=1", "--rollouts=2", "--dry-run"], "rollout0, rollout1 on the GPU of the learner, cuda:0"),
    (["--gpus=2", "--rollouts=2", "--dry-run"], "rollout1 on the GPU of the learner, cuda:1")])
def test_what_nccl_cannot_connect_is_refused_in_one_line(given, said):
    with pytest.raises(ValueError) as e:
        configure(["--task=toy", "--transport=nccl", *given])
    assert said in str(e.value) and "--transport shared" in str(e.value) and "\n" not in str(e.value)


def test_rollouts_on_gpus_of_their_own_are_accepted():
    for gpus in (2, 8):
        assert configure(["--task=toy", "--transport=nccl", f"--gpus={gpus}", "--dry-run"]).transport == "nccl"
    with pytest.raises(ValueError, match="no such choice"):
        configure(["--task=toy", "--transport=pigeon", "--gpus=0"])


# -- pinned memory ---------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [0, 2])
def test_the_shared_memory_is_registered_once_and_a_refusal_ends_nothing(code, monkeypatch, capsys):
    class Guard:
        def __init__(self, device):
            assert device == "cuda:0"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False
    calls = []
    cuda = SimpleNamespace(device=Guard, cudart=lambda: SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append(args) or code))
    monkeypatch.setattr(pinned, "torch", SimpleNamespace(cuda=cuda, zeros=lambda *a, **k: None))
    w = Weights(LAYOUT, PROBE, torch.bfloat16)
    w.attach("cpu")
    assert calls == []
    w.attach("cuda:0")
    assert calls == [(w.flat.data_ptr(), 2 * w.size * 2, 0)]
    assert ("could not be pinned (CUDA error 2)" in capsys.readouterr().err) == (code != 0)

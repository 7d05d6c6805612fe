"""A checkpoint is whole or not there: killed at every step of its writing, damaged in every file, put back exactly."""
import os
import shutil
from pathlib import Path

import pytest
import torch

from learner import Learner
from record import checkpoint
from record.checkpoint import State
from tests.test_learner import ready

TICKETS = [(7, None), (3, torch.tensor([4, 5, 6], dtype=torch.int32)), (9, None)]


def write(root: Path, learner: Learner, version: int, keep: int = 0) -> Path:
    partial = checkpoint.unsealed(root, version)
    learner.checkpoint(partial)
    return checkpoint.seal(partial, State(version, 10 + version, TICKETS, {"generated": 5}), keep)


@pytest.fixture
def learner(config):
    learner = Learner(config(), "cpu", torch.float32)
    learner.step(ready([5, 1, 7, 3])[1], version=0)
    return learner


def test_what_is_read_is_what_was_written(learner, config, tmp_path):
    folder = write(tmp_path, learner, 4)
    state = checkpoint.read(folder)
    assert (state.version, state.prompts, state.counters) == (4, 14, {"generated": 5})
    assert [(u, c if c is None else c.tolist()) for u, c in state.tickets] == [(7, None), (3, [4, 5, 6]), (9, None)]
    other = Learner(config(), "cpu", torch.float32, str(folder))
    _, segments = ready([2, 6])
    for version in (1, 2):                     # goes on as the one that was never interrupted, to the bit
        a, b = learner.step(segments, version), other.step(segments, version)
        assert a == b
    for x, y in zip(learner.student.model.parameters(), other.student.model.parameters()):
        assert torch.equal(x, y)
    assert other.updates == learner.updates == 3


def test_before_the_first_update_there_is_nothing_of_the_optimizer_to_keep(config, tmp_path):
    learner = Learner(config(), "cpu", torch.float32)
    other = Learner(config(), "cpu", torch.float32, str(write(tmp_path, learner, 1)))
    _, segments = ready([2, 6])
    assert learner.step(segments, 1) == other.step(segments, 1) and other.updates == 1


def test_bf16_weights_come_with_float32_masters(config, tmp_path):
    learner = Learner(config(), "cpu", torch.bfloat16)
    learner.step(ready([5, 2])[1], version=0)
    other = Learner(config(), "cpu", torch.bfloat16, str(write(tmp_path, learner, 1)))
    assert all(torch.equal(x, y) and x.dtype == torch.float32
               for x, y in zip(learner.student.model.parameters(), other.student.model.parameters()))


KILLED = 9
POINTS = ["pathlib.Path.mkdir", "pathlib.Path.rename", "pathlib.Path.write_text", "shutil.rmtree",
          "record.checkpoint.save_file", "transformers.PreTrainedModel.save_pretrained",
          "transformers.PreTrainedTokenizerBase.save_pretrained"]


def dies_at(point: int, monkeypatch) -> None:
    """From here on the process kills itself before the point-th of the calls that change the disk, or within it."""
    calls = [0]

    def deadly(real, within):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == point:
                if within:                     # a file half written
                    target = Path(args[1] if real.__name__ == "save_file" else args[0])
                    target.write_bytes(b"half")
                os._exit(KILLED)
            return real(*args, **kwargs)
        return call
    for name in POINTS:
        module, _, attribute = name.rpartition(".")
        import importlib
        owner = (importlib.import_module(module) if module in ("shutil", "record.checkpoint") else
                 getattr(importlib.import_module(module.rpartition(".")[0]), module.rpartition(".")[2]))
        monkeypatch.setattr(owner, attribute, deadly(getattr(owner, attribute), attribute == "save_file"))


def test_killed_at_every_point_of_the_writing_the_last_one_loads(learner, config, tmp_path, monkeypatch):
    write(tmp_path, learner, 1)
    points = 0
    while True:
        points += 1
        pid = os.fork()
        if pid == 0:
            try:
                dies_at(points, monkeypatch)
                write(tmp_path, learner, 2, keep=1)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        folder, faults = checkpoint.newest(tmp_path)
        version = checkpoint.read(folder).version
        assert version == 2 or (version == 1 and code == KILLED), f"point {points}"
        assert not faults, "no step-N is ever half there"
        Learner(config(), "cpu", torch.float32, str(folder))
        checkpoint.clear(tmp_path, version)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        if code == 0:
            break
        shutil.rmtree(tmp_path / "step-2", ignore_errors=True)
        if not (tmp_path / "step-1").exists():
            write(tmp_path, learner, 1)
    assert points >= 10 and checkpoint.by_age(tmp_path) == [tmp_path / "step-2"], points


@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors", "tickets.safetensors", "state.json",
                                  "config.json"])
@pytest.mark.parametrize("harm", ["gone", "short", "garbled"])
def test_a_damaged_checkpoint_is_passed_over(learner, tmp_path, name, harm):
    good = write(tmp_path, learner, 1)
    path = write(tmp_path, learner, 2) / name
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "short":
        path.write_bytes(data[:len(data) // 2])
    elif name.endswith("safetensors") or name == "state.json":
        path.write_bytes(b"x" * len(data))
    else:
        pytest.skip("of other files only the size is known")
    folder, faults = checkpoint.newest(tmp_path)
    assert folder == good and len(faults) == 1 and faults[0].startswith(f"step-2: {name}")


def test_only_the_newest_are_kept_and_what_is_newer_than_the_start_goes(learner, tmp_path):
    for version in (2, 4, 10):
        write(tmp_path, learner, version, keep=2)
    assert [p.name for p in checkpoint.by_age(tmp_path)] == ["step-4", "step-10"]
    (tmp_path / ".step-12-99").mkdir()
    checkpoint.clear(tmp_path, after=4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]


def test_nothing_is_unpickled(learner, tmp_path):
    names = {p.suffix for p in write(tmp_path, learner, 1).iterdir()}
    assert names <= {".safetensors", ".json", ".jinja"}

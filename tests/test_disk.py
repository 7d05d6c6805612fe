"""A disk that is full for a while: a real one, of a few kilobytes. Nothing is lost, and the order is kept."""
import errno
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import asyncopd
from data.prompts import Row
from record.disk import Disk, write_text
from record.metrics import BY_LEARNER
from record.recorder import Recorder
from tests.test_report import SAID

ANSWERED = [(Row(f"prompt {i}", str(i)), ["text " * 20], [True]) for i in range(8)]



@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)      # a failed test may hold a file open


def fill(disk: Path) -> Path:
    """Take what room there is. Some is left in the last page of every file that is open: 4 KiB at most."""
    file = disk / "filler"
    with pytest.raises(OSError, match="No space left"), open(file, "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    return file


def measured(step: int) -> dict:
    return dict.fromkeys(BY_LEARNER, 0.5) | dict(step=step, version=step, tokens=10, lag_min=0, lag_max=1)


def opened(out: Path, tracker: str = "none") -> Recorder:
    recorder = Recorder(out, {"rollout0": "rollout", "teacher0": "teacher", "learner": "learner"})
    recorder.pushes["rollout0"] = dict(seconds=0.1, gap=[0, 0, 0])
    recorder.open(steps=1000, done=0, quiet=True, tracker=tracker, config={"lr": 1})
    recorder.account.start()
    return recorder


def work(recorder: Recorder, steps: range) -> None:
    for step in steps:
        recorder.spans("learner", [("step", float(i), i + 0.5) for i in range(10)])
        recorder.step(measured(step), [], 0, [(step, 0, 10)], {"free": 1}, begun=step)
        if step % 10 == 0:
            recorder.evaluation(step, "student", SAID, ANSWERED)


def test_what_a_full_disk_does_not_take_is_written_in_order_when_there_is_room(disk, capfd):
    recorder = opened(disk)
    work(recorder, range(1, 6))
    filler = fill(disk)
    work(recorder, range(6, 31))
    assert recorder.waiting
    written = (disk / "log.jsonl").read_text()
    assert len(written.splitlines()) < 20, "the log has met its end"
    said = capfd.readouterr().err
    assert said.count("No space left on device: the run goes on") == 1 == len(said.splitlines()), said
    filler.unlink()
    work(recorder, range(31, 33))
    assert not recorder.waiting and "there is room on the disk again" in capfd.readouterr().err
    recorder.done(0)
    recorder.close()
    log = [json.loads(line) for line in (disk / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["type"] == "step"] == list(range(1, 33))
    assert [line["step"] for line in log if line["type"] == "eval"] == [10, 20, 30] and log[-1]["type"] == "done"
    samples = (disk / "samples.txt").read_text()
    assert [f"step {s}, student, sample {i}" in samples for s in (10, 20, 30) for i in range(1, 9)] == [True] * 24
    events = json.loads((disk / "trace.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == 32 * 10 and capfd.readouterr().err == ""


def test_a_disk_that_stays_full_is_named_at_the_end(disk, capfd):
    recorder = opened(disk)
    work(recorder, range(1, 3))
    fill(disk)
    work(recorder, range(3, 25))
    with pytest.raises(OSError, match=f"No space left on device: '{disk}/log.jsonl'"):
        recorder.done(0)
    capfd.readouterr()
    recorder.close()
    said = capfd.readouterr().err
    assert f"{disk}/log.jsonl: No space left on device: its last" in said and "bytes are lost" in said
    lines = (disk / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines))), "whole lines but the last"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")     # TensorBoard's own thread
def test_a_tracker_goes_on_in_a_new_file(disk):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    recorder = opened(disk, tracker="tensorboard")
    work(recorder, range(1, 4))
    filler = fill(disk)
    work(recorder, range(4, 15))
    assert recorder.log.tracker.waiting
    filler.unlink()
    work(recorder, range(15, 17))
    recorder.close()
    steps = set()
    for file in sorted((disk / "tensorboard").iterdir()):
        events = EventMultiplexer()
        events.AddRun(str(file), "run")
        events.Reload()
        if "step/step" in events.Runs()["run"]["scalars"]:
            steps |= {e.step for e in events.Scalars("run", "step/step")}
    assert steps == set(range(1, 17))


def test_another_failure_is_no_reason_to_wait(tmp_path):
    file = Disk().open(tmp_path / "nowhere" / "file", "a")
    with pytest.raises(FileNotFoundError):
        file.write("a")


def test_a_file_that_finds_no_room_is_named(disk):
    fill(disk)
    with pytest.raises(OSError, match=f"'{disk}/README.md'") as e:
        write_text(disk / "README.md", "a" * 9999)
    assert e.value.errno == errno.ENOSPC


@pytest.mark.parametrize("saved, version, why, last", [
    ("run/checkpoints/step-4", 6, OSError(28, "No space left on device", "run/log.jsonl"),
     "asyncopd: [Errno 28] No space left on device: 'run/log.jsonl'; "
     "--resume --out run continues from run/checkpoints/step-4"),
    ("run/checkpoints/step-4", 6, RuntimeError("learner crashed\nTraceback\nKeyError: 3"),
     "asyncopd: --resume --out run continues from run/checkpoints/step-4"),
    ("", 6, RuntimeError("learner died with exit code -9"),
     "asyncopd: learner died with exit code -9; no checkpoint is saved that --resume could continue from "
     "(--save-every)"),
    ("", 0, RuntimeError("learner died with exit code -9"), "asyncopd: learner died with exit code -9")])
def test_the_last_line_says_whether_the_run_can_go_on(saved, version, why, last, monkeypatch, tmp_path, capsys):
    class Failing:
        def __init__(self, cfg, *_):
            self.cfg, self.saved, self.scheduler = cfg, saved, SimpleNamespace(version=version)

        def start(self, resume):
            raise why

        def close(self):
            pass

    monkeypatch.setattr(asyncopd, "Controller", Failing)
    monkeypatch.setattr(asyncopd, "plan", lambda cfg: [])
    monkeypatch.setattr(asyncopd, "empty", lambda folder: None)
    assert asyncopd.train(SimpleNamespace(out="run"), None, None, {}) == 1
    assert capsys.readouterr().err.splitlines()[-1] == last

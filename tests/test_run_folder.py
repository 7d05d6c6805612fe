"""Whose a run folder is: one run at a time, and what a run leaves that was refused."""
import multiprocessing
import os
import time
from pathlib import Path

import pytest

import asyncopd
from config import Config
from record import run_folder
from record.run_folder import check_out, claim_folder

PROCESSES = multiprocessing.get_context("fork")      # copies of this process: nothing is imported a second time
TRIES = 50


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def compete(root, there_before, together, outcomes):
    """One of two processes that want the same folder, TRIES times. Whoever is refused must say so in one line."""
    for i in range(TRIES):
        out = root / f"{i}" / "run"
        together.wait()
        try:
            _, claim = claim_folder(Config(out=str(out)))
        except ValueError as e:
            assert str(e) == f"--out {out}: a run is writing to it (choose another folder, or stop it)"
            outcomes.put((i, False))
            claim = None
        else:
            outcomes.put((i, True))
        together.wait()                              # the claim is held until the other has been refused
        if claim is not None:
            claim.release()
        together.wait()
        assert there_before or not (root / f"{i}").exists()


def joined(processes) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


@pytest.mark.parametrize("there_before", [False, True])
def test_of_two_runs_at_the_same_instant_one_is_refused(there_before, tmp_path):
    if there_before:
        for i in range(TRIES):
            (tmp_path / f"{i}" / "run").mkdir(parents=True)
    before = listing(tmp_path)
    outcomes, together = PROCESSES.Queue(), PROCESSES.Barrier(2, timeout=10)
    joined([PROCESSES.Process(target=compete, args=(tmp_path, there_before, together, outcomes)) for _ in range(2)])
    won = sorted(outcomes.get(timeout=5) for _ in range(2 * TRIES))
    assert won == sorted((i, won) for i in range(TRIES) for won in (False, True))
    assert listing(tmp_path) == before, "nothing is left"


def take_and_leave(root, together, held):
    """Claims and releases without a pause: what one removes, the other may be about to claim."""
    for i in range(TRIES):
        out = root / f"{i}"
        together.wait()
        for _ in range(8):
            try:
                with claim_folder(Config(out=str(out)))[1]:
                    (out / "mine").touch(exist_ok=False)
                    (out / "mine").unlink()
                    held.value += 1
            except ValueError:
                continue


def test_a_folder_that_one_run_removes_is_never_anothers(tmp_path):
    together, counts = PROCESSES.Barrier(3, timeout=10), [PROCESSES.Value("i") for _ in range(3)]
    joined([PROCESSES.Process(target=take_and_leave, args=(tmp_path, together, held)) for held in counts])
    assert sum(held.value for held in counts) >= TRIES and listing(tmp_path) == []


def test_a_folder_that_vanishes_before_it_is_claimed_is_made_again(tmp_path, monkeypatch):
    """Between the look at it and the claim, its owner has released and removed it."""
    out = tmp_path / "run"
    out.mkdir()
    claim_old = run_folder.claim_old

    def too_late(folder):
        if out.exists():
            out.rmdir()
            raise FileNotFoundError
        return claim_old(folder)
    monkeypatch.setattr(run_folder, "claim_old", too_late)
    with claim_folder(Config(out=str(out)))[1]:
        assert listing(tmp_path) == ["run", "run/.claim"]


def claim_and_die(out):
    claim_folder(Config(out=out))
    os.kill(os.getpid(), 9)


def test_what_a_killed_command_leaves_counts_as_an_empty_folder(tmp_path):
    out = str(tmp_path / "run")
    process = PROCESSES.Process(target=claim_and_die, args=(out,))
    process.start()
    process.join(10)
    assert process.exitcode == -9 and listing(tmp_path) == ["run", "run/.claim"]
    cfg, claim = claim_folder(Config(out=out))
    assert check_out(cfg) is None
    claim.release()
    assert listing(tmp_path) == ["run"]


def live_on(there, go_on):
    there.set()
    go_on.wait(10)


def test_a_copy_of_a_process_does_not_hold_its_claim(tmp_path):
    _, claim = claim_folder(Config(out=str(tmp_path / "run")))
    there, go_on = PROCESSES.Event(), PROCESSES.Event()
    copy = PROCESSES.Process(target=live_on, args=(there, go_on))
    copy.start()
    there.wait(10)
    claim.file.close()                               # as at the end of this process
    again = claim_folder(Config(out=str(tmp_path / "run")))[1]
    again.release()
    go_on.set()
    copy.join()


def test_names_of_folders_are_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    claims = [claim_folder(Config(task="hf:a/b:main"))[1] for _ in range(3)]
    assert [str(claim.folder) for claim in claims] == ["runs/b-main-now", "runs/b-main-now-2", "runs/b-main-now-3"]
    for claim in reversed(claims):                   # the first has made runs/, and goes last
        claim.release()
    assert listing(tmp_path) == []


def test_the_command_is_refused_before_anything_is_prepared(models, tmp_path, monkeypatch, capsys):
    for name in ("start_server", "prepare", "Controller"):
        monkeypatch.setattr(asyncopd, name, lambda *_: pytest.fail("it has begun"))
    flags = ["--gpus=0", "--engine=hf", "--task=toy", f"--out={tmp_path}/run"]
    with claim_folder(Config(out=f"{tmp_path}/run"))[1]:
        for further in ([], ["--overwrite"]):
            assert asyncopd.main([*flags, *further]) == 2
            err = capsys.readouterr().err
            assert err.startswith("asyncopd: --out") and "a run is writing to it" in err and err.count("\n") == 1
        assert listing(tmp_path) == ["run", "run/.claim"]
    assert listing(tmp_path) == []


def test_emptying_a_folder_leaves_the_claim(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").touch()
    cfg, claim = claim_folder(Config(out=f"{tmp_path}/run", overwrite=True))
    check_out(cfg)
    run_folder.empty(tmp_path / "run")
    assert listing(tmp_path) == ["run", "run/.claim"]
    claim.release()
    assert listing(tmp_path) == ["run"]

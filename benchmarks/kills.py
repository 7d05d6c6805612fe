"""
Kills: runs whose processes are killed at random moments, resumed, and compared with runs that nobody touched.

    python benchmarks/kills.py                  # synchronous runs, killed and resumed: the same weights, bit for bit
    python benchmarks/kills.py --async          # asynchronous runs: every prompt trained once

The shipped command and its real processes; only their start is quicker, forked from this process, which has imported
everything. Two thirds of the victims are parents and learners, which end the run: it is resumed.
The others are rollout and teacher workers, which are restarted. It goes on until --cycles
runs were resumed. Raw rows: kills.jsonl. Last line: one JSON object with `kills`, `resumed`, `restarted`, `runs`, and
`identical` (runs whose final weights equal those of an undisturbed run) or `lost`, `twice` (prompts and tokens).
"""
from __future__ import annotations

import argparse
import json
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import asyncopd  # noqa: E402
from control.command_line import as_flag  # noqa: E402
from data import toy  # noqa: E402
from record import checkpoint  # noqa: E402
from record.provenance import provenance  # noqa: E402

VICTIMS = ["parent", "learner", "parent", "learner", "rollout0", "teacher0"]
TRIES_S = 60.0            # no start may take longer than this, whatever it waits for


def tiny_models(root: Path) -> dict[str, str]:
    tokenizer, folders = toy.toy_tokenizer(), {}
    for seed, name in enumerate(("student", "teacher")):
        model = toy.small_model(tokenizer, layers=1, hidden=64, seed=seed)
        model.lm_head.weight.data *= 1 + 7 * seed
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


def fork_workers() -> None:
    """From now on this process forks its workers itself: imports and patches are there already."""
    fork = lambda method=None: multiprocessing.context._concrete_contexts["fork"]
    multiprocessing.get_context = torch.multiprocessing.get_context = fork
    multiprocessing.forkserver.ensure_running = lambda: None


def launch(flags: dict, resume: bool) -> int:
    """The command in a forked process; its id. In `flags` eval__n is --eval.n."""
    argv = [as_flag(name.replace("__", "."), value) for name, value in flags.items()]
    argv.append("--resume" if resume else "--overwrite")
    pid = os.fork()
    if pid:
        return pid
    sink = os.open(f"{flags['out']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1), os.dup2(sink, 2)
    sys.argv[1:] = argv
    code = 1
    try:
        code = asyncopd.main(argv)
    finally:
        sys.exc_info()[0] and traceback.print_exc()
        os._exit(code)


def log(flags: dict) -> list[dict]:
    path = Path(flags["out"]) / "log.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:       # being written
            break
    return lines


def processes(flags: dict) -> dict[str, int]:
    now = {}
    for line in log(flags):
        if line["type"] == "run":
            now = dict(line["pids"])
        if line.get("what") == "restarted":
            now[line["worker"]] = line["pid"]
    return now


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ended(pid: int, within_s: float) -> int | None:
    """Exit code of a child, None while it still runs."""
    limit = time.monotonic() + within_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            return None
        time.sleep(0.005)


def moment(main: int, flags: dict, rng: random.Random, step: int) -> int | None:
    """Wait for a random moment: one in six in the start, else steps after `step`. Exit code if the run has ended."""
    steps, pause = rng.randrange(6) * flags["save_every"], rng.uniform(0, 0.05)
    limit = time.monotonic() + (TRIES_S if steps else rng.uniform(0, 2))
    while time.monotonic() < limit:
        if (code := ended(main, 0.01)) is not None:
            return code
        if steps and any(x["step"] >= step + steps for x in log(flags) if x["type"] == "step"):
            break
    return ended(main, pause)


def life(flags: dict, rng: random.Random, kill: bool) -> tuple[int | None, str]:
    """One start, resumed if there is something to resume; (exit code, who was killed)."""
    last = checkpoint.newest(Path(flags["out"]) / "checkpoints")[0]
    main, began = launch(flags, resume=bool(last)), time.monotonic()
    victim = ""
    if kill:
        code = moment(main, flags, rng, checkpoint.step_of(last) if last else 0)
        if code is not None:
            return code, ""
        victim = rng.choice(VICTIMS)
        pid = main if victim == "parent" else processes(flags).get(victim)
        if pid and running(pid):
            os.kill(pid, signal.SIGKILL)
        else:
            victim = ""
    code = ended(main, TRIES_S)
    if code is None:
        os.kill(main, signal.SIGKILL)
        os.waitpid(main, 0)
        raise AssertionError(f"a start hung for {time.monotonic() - began:.0f} s after {victim} was killed: {flags}")
    limit = time.monotonic() + 5
    while any(running(p) for p in processes(flags).values()):
        assert time.monotonic() < limit, f"orphans of {flags['out']}: {processes(flags)}"
        time.sleep(0.01)
    return code, victim


def play(flags: dict, rng: random.Random, kills: int) -> dict:
    """A run with so many kills, resumed until it is done."""
    who, starts = [], 0
    while True:
        code, victim = life(flags, rng, len(who) < kills)
        who += [victim] if victim else []
        starts += 1
        assert code in (0, 1, -9), f"exit code {code}: {Path(flags['out'] + '.txt').read_text()[-2000:]}"
        if code == 0:
            return {"killed": who, "starts": starts}


def trained_once(flags: dict) -> tuple[int, int, int]:
    """(prompts trained, prompts and tokens left out, tokens trained twice)."""
    pieces, lost, twice = defaultdict(list), 0, 0
    for line in log(flags):
        for uid, start, length in line["trained"] if line["type"] == "step" else ():
            pieces[uid].append((start, length))
    for spans in pieces.values():
        at = 0
        for start, length in spans:
            lost, twice, at = lost + max(0, start - at), twice + max(0, at - start), start + length
    state = checkpoint.read(checkpoint.newest(Path(flags["out"]) / "checkpoints")[0])
    begun = {uid for uid, _ in state.tickets}
    return len(pieces), lost + len(set(range(state.prompts)) - set(pieces) - begun), twice


def table() -> str:
    """Markdown of kills.jsonl and soak.jsonl."""
    rows = [json.loads(line) for line in (HERE / "kills.jsonl").read_text().splitlines()]
    out = ["| runs | killed: parents, learners, workers | resumed | workers restarted | what came of it |",
           "|---|--:|--:|--:|---|"]
    for kind in ("synchronous", "asynchronous"):
        part = [r for r in rows if ("identical" in r) == (kind == "synchronous")]
        dead = [name for r in part for name in r["killed"]]
        who = [dead.count("parent"), dead.count("learner"), sum(name.endswith("0") for name in dead)]
        if kind == "synchronous":
            same = sum(r["identical"] for r in part)
            came = f"{same} of {len(part)} end with the weights of an undisturbed run, bit for bit"
        else:
            prompts, lost, twice = (sum(r[k] for r in part) for k in ("prompts", "lost", "twice"))
            lag = max(r["lag_max"] for r in part)
            came = f"{prompts:,} prompts: {lost} lost, {twice} trained twice; lag at most {lag}"
        out.append(f"| {len(part)} {kind} | {', '.join(map(str, who))} | {sum(r['resumed'] for r in part)} | "
                   f"{sum(r['restarted'] for r in part)} | {came} |")
    soak = json.loads((HERE / "soak.jsonl").read_text().splitlines()[-1])
    return "\n".join(out) + (
        f"\n\nOver {soak['steps']:,} steps with {soak['checkpoints']} checkpoints: memory of the process that grows "
        f"fastest {soak['rss_mb_per_1000_steps']:+.1f} MB per 1,000 steps, of {soak['rss_mb']:,} MB in all; open files "
        f"{soak['files_growth']:+.0f}, shared memory {soak['shm_growth']:+.0f} bytes.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cycles", type=int, default=100, help="kills that end a run, each followed by a --resume")
    parser.add_argument("--async", action="store_true", dest="asynchronous", help="of asynchronous runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-run", type=int, default=10)
    parser.add_argument("--out", default="", help="JSONL to append to (default: kills.jsonl beside this file)")
    args = parser.parse_args()
    fork_workers()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rng, root, rows = random.Random(args.seed), Path(tempfile.mkdtemp()), []
    before = set(os.listdir("/dev/shm"))
    flags = dict(task="toy", gpus=0, engine="hf", batch=4, max_prompt=8, max_response=12, lr=1e-3, eval__n=2, warmup=0,
                 save_every=1, faults__restarts=1000, **tiny_models(root))
    while sum(r["resumed"] for r in rows) < args.cycles:
        seed = args.seed * 1000 + len(rows)
        if args.asynchronous:
            run = flags | dict(seed=seed, steps=300, save_every=6, max_ahead=2, max_lag=2, out=str(root / f"run{seed}"))
            row = play(run, rng, args.per_run)
            prompts, lost, twice = trained_once(run)
            lags = [line["lag_max"] for line in log(run) if line["type"] == "step"]
            row |= {"prompts": prompts, "lost": lost, "twice": twice, "lag_max": max(lags), "steps": len(lags)}
        else:
            run = flags | dict(seed=seed, steps=40, schedule="sync", out=str(root / f"run{seed}"))
            whole = run | dict(out=str(root / f"whole{seed}"))
            code = life(whole, rng, False)[0]
            assert code == 0, f"exit code {code}: {Path(whole['out'] + '.txt').read_text()[-2000:]}"
            row = play(run, rng, args.per_run)
            a, b = (load_file(Path(f["out"]) / "student" / "model.safetensors") for f in (whole, run))
            losses = [[line["loss"] for line in log(f) if line["type"] == "step"] for f in (whole, run)]
            row |= {"identical": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
                    "losses_identical": losses[0] == losses[1]}
        events = [line["what"] for line in log(run) if line["type"] == "event"]
        row |= {"seed": seed, "resumed": events.count("resumed"), "restarted": events.count("restarted")}
        rows.append(row)
        print(json.dumps(row), flush=True)
    leaked, limit = set(os.listdir("/dev/shm")) - before, time.monotonic() + 60
    while leaked and time.monotonic() < limit:           # what another program has there goes with it
        time.sleep(0.1)
        leaked &= set(os.listdir("/dev/shm"))
    assert not leaked, f"left in /dev/shm: {sorted(leaked)}"
    summary = {"kills": sum(len(r["killed"]) for r in rows), "runs": len(rows), **{k: sum(r[k] for r in rows) for k in
                                                    ("resumed", "restarted", "identical", "lost", "twice")
                                                    if k in rows[0]}}
    said = {"argv": [a for a in sys.argv if not a.startswith("/")], "commit": provenance({}, {})["commit"]}
    with open(args.out or HERE / "kills.jsonl", "a") as f:
        f.writelines(json.dumps(said | row) + "\n" for row in rows)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

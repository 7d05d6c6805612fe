"""
A long run: memory, open files and shared memory of every process over thousands of steps. They must not grow.

    python benchmarks/soak.py                   # 2,500 steps of a tiny model, a few minutes on two cores

The shipped command and its real processes; sampled from outside, through /proc, once a second. A slope is fitted over
the second half of the run, when caches are full. Raw samples: soak.jsonl. Last line: one JSON object with `steps`,
`samples`, and over all processes `rss_mb`, `rss_mb_per_1000_steps` (of the process that grows fastest), `files_growth`,
`shm_growth` (bytes in /dev/shm), last quarter against second quarter.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import toy  # noqa: E402
from record.provenance import provenance  # noqa: E402


def models(root: Path) -> list[str]:
    tokenizer, flags = toy.toy_tokenizer(), []
    for seed, name in enumerate(("student", "teacher")):
        model = toy.small_model(tokenizer, layers=1, hidden=64, seed=seed)
        model.lm_head.weight.data *= 1 + 7 * seed
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        flags.append(f"--{name}={root / name}")
    return flags


def read(pid: int) -> tuple[float, int]:
    """(resident memory in MB that is the process's own, open files)."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return own / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def slope(xs: list[float], ys: list[float]) -> float:
    return statistics.linear_regression(xs, ys).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the run, without their dashes")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    out = root / "run"
    argv = [sys.executable, str(HERE.parent / "asyncopd.py"), "--task=toy", "--gpus=0", "--engine=hf", "--batch=8",
            "--max-prompt=8", "--max-response=16", "--lr=1e-3", "--eval.n=8", "--eval.every=50", "--warmup=0",
            "--save-every=50", "--max-ahead=2", "--max-lag=2", f"--steps={args.steps}", f"--out={out}", *models(root),
            *(f"--{f}" for f in args.flags)]
    before = os.statvfs("/dev/shm")
    run, samples = subprocess.Popen(argv, stdout=subprocess.DEVNULL), []
    pids: dict[str, int] = {}
    while run.poll() is None:
        time.sleep(1)
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        lines = text.splitlines()
        if not pids and lines and text.count("\n"):
            pids = {"parent": run.pid} | json.loads(lines[0])["pids"]
        done = text.count('"type": "step"')
        if 0 < done < args.steps:          # at the end workers go, one after the other
            try:
                now = {name: read(pid) for name, pid in pids.items()}
            except OSError:                # the run is ending
                break
            shm = os.statvfs("/dev/shm")
            samples.append({"step": done, "rss_mb": {n: round(m, 1) for n, (m, _) in now.items()},
                            "files": {n: f for n, (_, f) in now.items()},
                            "shm": (before.f_bfree - shm.f_bfree) * shm.f_frsize})
    assert run.wait() == 0, "the run failed"
    late = [s for s in samples if s["step"] > args.steps / 2]
    second = [s for s in samples if args.steps / 4 < s["step"] <= args.steps / 2]
    fourth = [s for s in samples if s["step"] > args.steps * 3 / 4]
    files = [statistics.median(sum(s["files"].values()) for s in part) for part in (second, fourth)]
    shm = [statistics.median(s["shm"] for s in part) for part in (second, fourth)]
    with open(HERE / "soak.jsonl", "w") as f:
        f.write(json.dumps({"argv": sys.argv, **{k: v for k, v in provenance({}, {}).items()
                                                 if k in ("commit", "versions", "hardware")}}) + "\n")
        f.writelines(json.dumps(s) + "\n" for s in samples)
    by_process = {name: round(1000 * slope([s["step"] for s in late], [s["rss_mb"][name] for s in late]), 2)
                  for name in pids}
    print(json.dumps(by_process))
    last = {"steps": args.steps, "samples": len(samples), "rss_mb": round(sum(samples[-1]["rss_mb"].values())),
            "rss_mb_per_1000_steps": max(by_process.values()), "files_growth": files[1] - files[0],
            "shm_growth": shm[1] - shm[0], "checkpoints": args.steps // 50, "evaluations": args.steps // 50 + 1}
    with open(HERE / "soak.jsonl", "a") as f:
        f.write(json.dumps(last) + "\n")
    print(json.dumps(last))


if __name__ == "__main__":
    main()

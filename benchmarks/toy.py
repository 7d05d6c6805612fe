"""
Every number of the toy in docs/: runs of the shipped command, a row each, and the tables made from the rows.

    python benchmarks/toy.py run demo          # three seeds, both engines, sync, forward KL; 12 minutes on two cores
    python benchmarks/toy.py run estimators    # every row of ESTIMATORS, demo's settings and seed; 25 minutes
    python benchmarks/toy.py run estimators m2po --engine=hf          # one of them, with more flags
    python benchmarks/toy.py run lag           # the cut rule at three bounds, and keep; 4 minutes
    python benchmarks/toy.py run pairs         # sync and async in turn, three times, both engines; 10 minutes
    python benchmarks/toy.py run draws         # both ways to choose the cached words, five seeds; 30 minutes
    python benchmarks/toy.py run dtype         # float32 and bf16, synchronous, one learner and two; 20 minutes
    python benchmarks/toy.py run bf16          # the whole run in bf16, three seeds; half an hour or more
    python benchmarks/toy.py table demo        # the table in docs/, from benchmarks/toy.jsonl alone
    python benchmarks/toy.py add demo "seed 0" runs/toy-...      # a run that exists already

A row holds the command, commit, hardware and seed of its run, its last line, its accuracies, and its KL by step.
Last line of `run`: one JSON object, {label: {"before", "after", "kl_before", "kl_after", "finite", "lag_max"}}.
"""
import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record.report import markdown  # noqa: E402

ROWS = HERE / "toy.jsonl"


def groups() -> dict[str, dict[str, list[str]]]:
    """Flags, by group and label. All but "bf16" and "pairs" compute contexts again at every push, and generate with
    vLLM where they do not say otherwise: the rows of a group must be alike, and the first ones are older than
    `inflight: keep` and `engine: hf` in configs/toy.yaml."""
    from estimators import ESTIMATORS
    found = {group: {label: ["--inflight=recompute", "--engine=vllm", *flags] for label, flags in rows.items()}
             for group, rows in recomputed(ESTIMATORS).items()}
    pairs = {f"{schedule} {i}, {engine}": [*SHORT, "--inflight=keep", f"--engine={engine}", f"--schedule={schedule}"]
             for engine in PAIR_ENGINES for i in (1, 2, 3) for schedule in ("sync", "async")}
    bf16 = {f"bfloat16, seed {seed}": ["--dtype=bfloat16", "--engine=hf", "--inflight=keep", f"--seed={seed}"]
            for seed in range(3)}
    return found | {"pairs": pairs, "bf16": bf16}


SHORT = ["--steps=100", "--eval.every=0", "--max-ahead=4", "--lr=0.0002"]
PAIR_ENGINES = ("hf", "vllm")


def recomputed(estimators) -> dict[str, dict[str, list[str]]]:
    in_step = ["--steps=100", "--eval.every=0", "--lr=0.0002", "--schedule=sync", "--engine=hf"]
    return {
        "demo": {"reverse, seed 0": ["--seed=0"], "reverse, seed 1": ["--seed=1"], "reverse, seed 2": ["--seed=2"],
                 "forward, K = 16": ["--kl=forward", "--top-k=16"], "engine hf": ["--engine=hf"],
                 "schedule sync": ["--schedule=sync"]},
        "estimators": {name: [f"--estimator={name}", "--eval.every=0", "--eval.no-teacher"]
                       for name, row in estimators.items() if row.head},      # `none` needs an extension's loss
        # at L = 1 most responses are cut, and a batch of segments holds half the tokens: twice the steps
        "lag": {"cut, A = 1, L = 1": [*SHORT, "--max-ahead=1", "--max-lag=1", "--steps=200"],
                "cut, A = 2, L = 4": [*SHORT, "--max-ahead=2", "--max-lag=4"], "cut, A = 4, L = 16": SHORT,
                "keep, A = 4": [*SHORT, "--overdue=keep"]},
        "draws": {f"{design}, seed {seed}": [f"--draws={design}", f"--seed={seed}", "--eval.every=20",
                                             "--eval.no-teacher"]
                  for seed in range(5) for design in ("iid", "optimal")},
        "dtype": {"float32": [*in_step, "--dtype=float32"], "bfloat16": [*in_step, "--dtype=bfloat16"],
                  "bfloat16, two learners": [*in_step, "--dtype=bfloat16", "--learners=2"]}}


def read(group: str, label: str, folder: str) -> dict:
    log = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    run, done, steps = log[0], log[-1], [x for x in log if x["type"] == "step"]
    return dict(group=group, label=label, argv=run["argv"], commit=run["commit"], hardware=run["hardware"],
                versions=run["versions"], seed=run["config"]["seed"], done=done,
                finite=all(math.isfinite(v) for s in steps for v in s.values() if isinstance(v, (int, float))),
                lag_max=[s["lag_max"] for s in steps], kl=[round(s["kl"], 4) for s in steps],
                gap_max=max(s["engine_gap_max"] for s in steps), w=weights(steps),
                cuts=sum(x.get("what") == "cut" for x in log),
                accuracy={x["step"]: x["accuracy"] for x in log if x["type"] == "eval" and x["who"] == "student"},
                seconds={s["step"]: round(s["wall_s"], 1) for s in steps})


def weights(steps: list[dict]) -> dict:
    """Of the importance weights of all emitted tokens: the mean, the mean of the batches' 99th percentiles, the
    largest."""
    n = len(steps)
    return dict(mean=sum(s["w_mean"] for s in steps) / n, p99=sum(s["w_p99"] for s in steps) / n,
                max=max(s["w_max"] for s in steps))


def dtype_table() -> str:
    """Markdown: what bf16 does to accuracy, KL and, at lag 0, to w = p / mu."""
    out = ["| run | accuracy before → after | KL per token before → after | w at lag 0: mean | 99th percentile | max "
           "| largest gap on the probe, nats |", "|---|--:|--:|--:|--:|--:|--:|"]
    for r in rows("dtype"):
        d = r["done"]
        out.append(f"| {r['label']} | {d['accuracy_before']:.1%} → {d['accuracy_after']:.1%} | {d['kl_before']:.3f} → "
                   f"{d['kl_after']:.3f} | {r['w']['mean']:.5f} | {r['w']['p99']:.4f} | {r['w']['max']:.3f} | "
                   f"{r['gap_max']:.2g} |")
    return "\n".join(out)


def reached(row: dict, accuracy: float) -> tuple[int, float] | None:
    """(step, seconds) of the first evaluation that is as good; None if none is."""
    for step, found in sorted((int(step), found) for step, found in row["accuracy"].items()):
        if step > 0 and found >= accuracy:
            return step, row["seconds"][str(step)]
    return None


def draws_table(accuracy: float = 0.9) -> str:
    """Markdown: how soon each seed answers as many right with both ways to choose the cached words."""
    by_label = {r["label"]: r for r in rows("draws")}
    lines = [["seed", "iid: steps, seconds to 90%", "optimal: steps, seconds to 90%", "seconds, iid / optimal"]]
    for seed in range(5):
        found = {design: by_label.get(f"{design}, seed {seed}") for design in ("iid", "optimal")}
        if None in found.values():
            continue
        times = {design: reached(row, accuracy) for design, row in found.items()}
        cells = [f"{t[0]}, {t[1]:.0f}" if t else f"not in {found[design]['done']['steps']} steps"
                 for design, t in times.items()]
        ratio = f"{times['iid'][1] / times['optimal'][1]:.2f}" if all(times.values()) else ""
        lines.append([str(seed), *cells, ratio])
    return markdown(lines)


def add(row: dict) -> None:
    kept = [r for r in rows() if (r["group"], r["label"]) != (row["group"], row["label"])]
    ROWS.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]))


def rows(group: str = "") -> list[dict]:
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return [r for r in found if group in ("", r["group"])]


def table(group: str) -> str:
    """Markdown; rows in the order of `groups`."""
    by_label = {r["label"]: r for r in rows(group)}
    out = ["| run | accuracy before → after | KL per token before → after | lag mean / max | overlap | tokens/s "
           "| seconds |", "|---|--:|--:|--:|--:|--:|--:|"]
    for label in groups()[group]:
        if label in by_label:
            d, kl = by_label[label]["done"], by_label[label]["kl"]
            accuracy = f"{d['accuracy_before']:.1%} → {d['accuracy_after']:.1%}"
            out.append(f"| {label} | {accuracy} | {sum(kl[:10]) / 10:.3f} → {sum(kl[-10:]) / 10:.3f} | "
                       f"{d['lag_mean']:.1f} / {d['lag_max']} | {d['overlap']:.2f} | "
                       f"{d['train_tok_s'] / 1000:.1f}k | {d['wall_s']:.0f} |")
    if group == "pairs":
        for engine in PAIR_ENGINES:
            if all(f"{schedule} {i}, {engine}" in by_label for i in (1, 2, 3) for schedule in ("sync", "async")):
                out += ["", pairs(by_label, engine)]
    return "\n".join(out)


def pairs(by_label: dict[str, dict], engine: str) -> str:
    """What overlap gains on two cores. Synchronous roles have both, in turn; asynchronous ones have one each."""
    speed = {schedule: [by_label[f"{schedule} {i}, {engine}"]["done"]["train_tok_s"] for i in (1, 2, 3)]
             for schedule in ("sync", "async")}
    ratios = [overlapped / in_turn for in_turn, overlapped in zip(speed["sync"], speed["async"])]
    return (f"{engine}: async / sync in trained tokens per second {', '.join(f'{r:.2f}' for r in ratios)}, median "
            f"{statistics.median(ratios):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("run", "table", "add"))
    parser.add_argument("group", choices=tuple(groups()))
    parser.add_argument("label", nargs="?", default="")
    parser.add_argument("folder", nargs="?", default="")
    args, more = parser.parse_known_args()       # flags of asyncopd.py, for every run
    if args.what == "add":
        add(read(args.group, args.label, args.folder))
    if args.what == "run":
        for label, flags in groups()[args.group].items():
            if args.label in ("", label):
                folder = f"runs/bench-{args.group}-{''.join(c if c.isalnum() else '-' for c in label)}"
                command = [sys.executable, "asyncopd.py", "--task=toy", "--overwrite", f"--out={folder}", *flags, *more]
                done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{label}: exit code {done.returncode}\n{done.stderr[-2000:]}")
                add(read(args.group, label, HERE.parent / folder))
                print(table(args.group).splitlines()[-1] if args.label else label, flush=True)
    print(table(args.group))
    print(json.dumps({r["label"]: dict(before=r["done"]["accuracy_before"], after=r["done"]["accuracy_after"],
                                       kl_before=r["done"]["kl_before"], kl_after=r["done"]["kl_after"],
                                       finite=r["finite"], lag_max=max(r["lag_max"])) for r in rows(args.group)}))


if __name__ == "__main__":
    main()

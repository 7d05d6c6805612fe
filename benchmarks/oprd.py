"""
OPRD on the toy: accuracy by trained tokens, by rank and by lag, against two KL estimators, from three seeds each.

    python benchmarks/oprd.py run                # every run that oprd.jsonl lacks; 20 minutes on two cores
    python benchmarks/oprd.py run lag            # of one group: rank, lag, head, bridge
    python benchmarks/oprd.py lr                 # the learning rates, seed 0, 60 steps (LR below: the best of each)
    python benchmarks/oprd.py table              # the table in docs/, from oprd.jsonl alone
    python benchmarks/oprd.py plot               # figures/oprd.png, from oprd.jsonl alone

The student is the toy's (31%). The teacher is this student, trained on until it is good, so that both have one origin;
in the group `bridge` it is the toy's own, which was trained separately and has another depth and width. Runs are the
shipped command and its real processes, forked from this one, which has imported everything; `step-off` has an exact
lag, whoever else is at work.
A row: flags, commit, hardware, seed; accuracy and trained tokens by step, KL by step, events, seconds of the run (two
at a time by default: not comparable). Last line of `run`: one JSON object, {label: {"accuracy", "min", "max", "lr"}}.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}       # before torch is imported
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import kills  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from data import toy  # noqa: E402
from estimators import ESTIMATORS  # noqa: E402
from models.loading import load_model  # noqa: E402
from record.provenance import hardware, provenance  # noqa: E402

ROWS = HERE / "oprd.jsonl"
TEACHER = dict(steps=300, lr=1e-3, seed=3, smoothing=0.01)         # the student's continuation: 100%
WIDTH, LAYERS = 96, 2                                              # of the student and of this teacher
COMMON = dict(task="toy", gpus=0, engine="hf", batch=64, steps=100, warmup=5, eval__every=20, max_prompt=8,
              max_response=40, max_running=320)
LR = {"reverse_mc": 2e-4, "reverse_dense": 2e-4, "none": 8e-4, "reverse_mc + oprd": 4e-4, "reverse_mc + bridge": 2e-4}

MC, DENSE, OPRD = dict(estimator="reverse_mc"), dict(estimator="reverse_dense"), dict(estimator="none", extend="oprd")
BOTH = MC | dict(extend="oprd", oprd__weight=10)
BRIDGE = BOTH | dict(oprd__bridge=True, oprd__rank=8)
GROUPS = {
    "rank": {"reverse_mc, N = 4": MC, "reverse_dense": DENSE, "oprd": OPRD,
             **{f"oprd, rank {r}": OPRD | dict(oprd__rank=r) for r in (4, 8, 16, 32)}},
    "lag": {f"{name}, lag {k}": how | dict(schedule="step-off", max_ahead=k) for k in (4, 16)
            for name, how in (("reverse_mc", MC), ("reverse_dense", DENSE), ("oprd", OPRD))},
    "head": {"oprd, own head": OPRD | dict(oprd__head=False),
             "reverse_mc, teacher's head": MC | dict(extend="oprd", oprd__weight=1e-9),
             "reverse_mc + 10 oprd": BOTH, "reverse_mc + 10 oprd, own head": BOTH | dict(oprd__head=False)},
    "bridge": {"reverse_mc, other origin": MC, "reverse_mc + 10 bridge, other origin": BRIDGE},
}


def objective(how: dict) -> str:
    """Whose learning rate a run has."""
    if own(how, "bridge"):
        return how["estimator"] + " + bridge"
    return how["estimator"] + (" + oprd" if own(how, "weight") > 1e-6 else "")


def own(how: dict, name: str) -> float:
    """The value of --oprd.NAME in the flags of a row, 0 if it is not there; older rows spell it oprd_NAME."""
    return how.get(f"oprd__{name}", how.get(f"oprd_{name}", 0))


def cells(groups: tuple[str, ...], seeds: int) -> list[dict]:
    return [dict(group=group, label=label, seed=seed, how=dict(schedule="sync", lr=LR[objective(how)]) | how)
            for group in groups for label, how in GROUPS[group].items() for seed in range(seeds)]


def rates() -> list[dict]:
    low, high = (1e-4, 2e-4, 4e-4, 8e-4), (4e-4, 8e-4, 1.6e-3)
    runs = {"reverse_mc": (MC, low), "reverse_dense": (DENSE, low), "oprd": (OPRD, high),
            "oprd, rank 8": (OPRD | dict(oprd__rank=8), high), "reverse_mc + 10 oprd": (BOTH, high),
            "reverse_mc, other origin": (MC, low), "reverse_mc + 10 bridge, other origin": (BRIDGE, low)}
    return [dict(group="lr", label=f"{label}, {lr:g}", seed=0, how=dict(schedule="sync", lr=lr, steps=60) | how)
            for label, (how, each) in runs.items() for lr in each]


# -- models and runs -------------------------------------------------------------------------------

def models() -> dict[str, tuple[str, str]]:
    """Student and teacher of one origin, made on first use and kept; and those of two."""
    from tqdm import tqdm
    student, other = toy.toy_models(ROOT / "runs")
    recipe = hashlib.sha256(json.dumps([Path(student).parent.name, TEACHER]).encode()).hexdigest()[:8]
    folder = ROOT / "runs" / f"oprd-{recipe}"
    if not (folder / "config.json").exists():
        model, tokenizer = load_model(student, "cpu", torch.float32), toy.toy_tokenizer()
        print("making the teacher, half a minute", flush=True)
        toy.teach_toy("teacher", model, tokenizer, **TEACHER, batch=64, bar=tqdm(disable=True))
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return {"same": (student, str(folder)), "other": (student, other)}


def read(cell: dict, out: Path, commit: str) -> dict:
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    steps, trained = [x for x in log if x["type"] == "step"], [0]
    for x in steps:
        trained.append(trained[-1] + x["tokens"])
    accuracy = {x["step"]: x["accuracy"] for x in log if x["type"] == "eval" and x["who"] == "student"}
    found = load_file(out / "oprd.safetensors") if (out / "oprd.safetensors").exists() else {}
    return cell | dict(
        commit=commit, hardware=hardware(), versions=log[0]["versions"], steps=len(steps), accuracy=accuracy,
        tokens={step: trained[step] for step in accuracy}, kl=[round(x["kl"], 4) for x in steps],
        oprd=[round(x.get("oprd", 0.0), 5) for x in steps], lag=steps[-1]["lag_mean"],
        seconds=round(log[-1]["wall_s"], 1),
        cosine=[round(x, 3) for x in found["cosine"].tolist()] if found else None,
        events=[x for x in log if x["type"] == "event"])


def run(wanted: list[dict], jobs: int, extra: dict, path: Path) -> None:
    """Every cell that is not there yet, `jobs` at a time; a row is written as soon as a run has ended."""
    there = {(r["group"], r["label"], r["seed"]) for r in rows(path)}
    todo = [c for c in wanted if (c["group"], c["label"], c["seed"]) not in there]
    pairs, running, commit = models(), {}, provenance({}, {})["commit"]
    scratch = ROOT / "runs" / f"bench-oprd-{os.getpid()}"
    scratch.mkdir(parents=True)
    while todo or running:
        while todo and len(running) < jobs:
            cell = todo.pop(0)
            student, teacher = pairs["other" if "other origin" in cell["label"] else "same"]
            cell["how"] |= extra
            out = scratch / str(len(todo))
            flags = COMMON | cell["how"] | dict(student=student, teacher=teacher, seed=cell["seed"])
            running[kills.launch(flags | dict(out=out), resume=False)] = cell, out
        pid, status = os.wait()
        cell, out = running.pop(pid)
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{cell['label']}: {Path(f'{out}.txt').read_text()[-2000:]}")
        row = read(cell, out, commit)
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"{row['label']}, seed {row['seed']}: " + " ".join(f"{a:.0%}" for a in row["accuracy"].values())
              + f"  ({row['seconds']} s)", flush=True)
    shutil.rmtree(scratch)


def rows(path: Path = ROWS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- what they say ---------------------------------------------------------------------------------

def cached(how: dict) -> int:
    """Bytes per token in a slot, states in bfloat16."""
    alone = how["estimator"] in ("none", "oprd")             # the raw rows give this row of the table its former name
    scores = ESTIMATORS["none" if alone else how["estimator"]].bytes(4, 16, 2 * WIDTH)
    if alone or own(how, "weight") > 1e-6:
        return scores + 2 * LAYERS * (own(how, "rank") or WIDTH)
    return scores


def by_label(*groups: str, path: Path = ROWS) -> dict[str, list[dict]]:
    found = rows(path)
    return {label: part for group in groups for label in GROUPS[group]
            if (part := [r for r in found if (r["group"], r["label"]) == (group, label)])}


def at(part: list[dict], step: str) -> tuple[float, float, float]:
    """Mean, least and greatest accuracy at a step."""
    x = [r["accuracy"][step] for r in part]
    return sum(x) / len(x), min(x), max(x)


def table() -> str:
    """Markdown: accuracy of so many seeds, mean, and at the end the range."""
    found = by_label(*GROUPS)
    shown = ["0", "20", "40", "100"]
    out = ["| run | learning rate | bytes per token | lag | " + " | ".join(f"step {s}" for s in shown)
           + " | min to max | seeds |", "|---|--:|--:|--:|" + "--:|" * (len(shown) + 2)]
    for label, part in found.items():
        how, (_, least, most) = part[0]["how"], at(part, shown[-1])
        cells = [label, f"{how['lr']:g}", f"{cached(how)}", f"{part[0]['lag']:g}",
                 *(f"{at(part, s)[0]:.1%}" for s in shown), f"{least:.1%} to {most:.1%}", str(len(part))]
        out.append("| " + " | ".join(cells) + " |")
    same = next(r for r in rows() if r["cosine"] and not own(r["how"], "bridge"))
    tokens = [r["tokens"]["100"] / 1000 for part in found.values() for r in part]
    return "\n".join(out) + (f"\n\n100 steps of 64 responses, {min(tokens):.0f}k to {max(tokens):.0f}k trained tokens. "
                             "Cosines of the initial student's and the teacher's states: "
                             + " and ".join(f"{c:.2f}" for c in same["cosine"]) + ".")


def plot() -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = by_label("rank", "lag")
    colors = {"reverse_mc": "#d9822b", "reverse_dense": "#57a55a", "oprd": "#3b78b8"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for label, part in found.items():
        if "lag" in label:
            continue
        steps = list(part[0]["accuracy"])
        x = [sum(r["tokens"][s] for r in part) / len(part) / 1000 for s in steps]
        y = [at(part, s) for s in steps]
        rank = int(label.split()[-1]) if "rank" in label else 0
        color, style = colors[label.split(",")[0]], {4: ":", 8: "-.", 16: "--", 32: (0, (1, 1))}.get(rank, "-")
        left.plot(x, [100 * m for m, _, _ in y], ls=style, color=color, label=label, lw=1.6 if not rank else 1.1)
        if not rank:
            left.fill_between(x, *([100 * v[i] for v in y] for i in (1, 2)), color=color, alpha=0.15, lw=0)
    for name, color in colors.items():
        first = "reverse_mc, N = 4" if name == "reverse_mc" else name
        points = [(k, at(found[label], step)) for step in ("100",)
                  for k, label in ((0, first), (4, f"{name}, lag 4"), (16, f"{name}, lag 16")) if label in found]
        x, y = [k for k, _ in points], [[100 * v for v in p] for _, p in points]
        spread = [[m - low for m, low, _ in y], [high - m for m, _, high in y]]
        right.errorbar(x, [m for m, _, _ in y], yerr=spread, fmt="o-", color=color, label=name, capsize=3)
    left.set(xlabel="trained tokens, thousands", ylabel="accuracy, %", title="lag 0; band: min to max of the seeds")
    right.set(xlabel="lag, versions", ylabel="accuracy after 100 steps, %", title="by lag", xticks=[0, 4, 16],
              ylim=(0, 105))
    for ax in (left, right):
        ax.legend(fontsize=8, frameon=False, loc="upper left" if ax is left else "lower left")
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(HERE / "figures" / "oprd.png", dpi=110)
    print(HERE / "figures" / "oprd.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("run", "lr", "table", "plot"))
    parser.add_argument("group", nargs="?", default="", choices=("", *GROUPS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=COMMON["steps"], help="of a trial: together with --out")
    parser.add_argument("--out", type=Path, default=ROWS, help="JSONL to append to")
    args = parser.parse_args()
    if args.what in ("run", "lr"):
        kills.fork_workers()
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        extra = {} if args.steps == COMMON["steps"] else dict(steps=args.steps)
        groups = (args.group,) if args.group else tuple(GROUPS)
        run(rates() if args.what == "lr" else cells(groups, args.seeds), args.jobs, extra,
            args.out)
    if args.what == "table":
        print(table())
    if args.what == "plot":
        plot()
    print(json.dumps({label: dict(zip(("accuracy", "min", "max"), at(part, list(part[0]["accuracy"])[-1])))
                      | {"lr": part[0]["how"]["lr"]} for label, part in by_label(*GROUPS, path=args.out).items()}))


if __name__ == "__main__":
    main()

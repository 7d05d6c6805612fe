"""
The two sampling designs against each other: the noise of the gradient, and what the toy learns from it.

    python benchmarks/designs.py variance                # synthetic students; a minute
    python benchmarks/designs.py variance --run runs/x   # positions of a toy run at several lags (made with
                                                         # --save-every 4 --faults.keep 0)
    python benchmarks/designs.py train --seeds 0 1 2     # the toy at constant lags, by step_off.py; a minute for each
                                                         # run on a core; finished runs are not made again
    python benchmarks/designs.py best --seeds 0 1 2 3 4  # the same at the learning rate that won for each cell
    python benchmarks/designs.py variance --run runs/y --label SmolLM2 --lags 0 4 16 --positions 48 --draws 40
                                                         # of a run of configs/smollm2.yaml (--save-every 12); 8 minutes
    python benchmarks/designs.py picture                 # the figures again, from the records; how words are chosen:
                                                         # benchmarks/figures/design.png
    python benchmarks/designs.py table                   # the tables of docs/optimal-cache.md from the records

Trace of the variance of the gradient by the logits, mean over positions. Independent draws: enumerated at N = 1 and
divided by N. Optimal draws: the mean squared distance of --draws draws from the dense gradient, of which they are an
unbiased estimate (tests/test_draws.py), with and without a baseline. Beside them the squared bias of the reverse KL
renormalised on mu's N best words, in the same unit.
Records: benchmarks/designs.jsonl; figure: benchmarks/figures/designs.png.
Last line of each command: one JSON object.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from audit import Positions, definition, gradients, outcomes, visited  # noqa: E402
from step_off import distil  # noqa: E402

from data.toy import toy_models  # noqa: E402
from draws import UNUSED, draw_optimal  # noqa: E402
from estimators import ESTIMATORS  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402
from record.report import table as plain_table  # noqa: E402

COUNTS, LAGS, DRAWS = (1, 4, 16, 64), (0, 4, 16, 64), 1000
SHARPNESS, DRIFTS = (0.5, 1.0, 2.0, 4.0), (0.0, 0.5)           # of the synthetic students
PANELS = ("synthetic, x 1, drift 0.5", "synthetic, x 4, drift 0.5", "SmolLM2, lag 16", "toy, lag 16")
RECORDS = HERE / "designs.jsonl"
ROW = ESTIMATORS["reverse_mc"]

# Of the toy's runs: a constant lag, so that it is not the lag that differs; each cell at each learning rate
CELLS = {"iid, N = 4": ["--draws=iid", "--mc-samples=4"], "optimal, N = 4": ["--draws=optimal", "--mc-samples=4"],
         "iid, N = 16": ["--draws=iid", "--mc-samples=16"], "optimal, N = 16": ["--draws=optimal", "--mc-samples=16"],
         "top-k, K = 4": ["--estimator=reverse_topk", "--top-k=4"],
         "top-k, K = 16": ["--estimator=reverse_topk", "--top-k=16"], "all words": ["--estimator=reverse_dense"]}
STEPS = 100


# -- the noise ------------------------------------------------------------------------------------

def synthetic(sharpness: float, drift: float, M: int = 16, V: int = 512) -> Positions:
    """Students whose logits are scaled by `sharpness`; mu is p before a step of size `drift` in the logits."""
    g = torch.Generator().manual_seed(0)
    common, p, q, step = (torch.randn(M, V, generator=g, dtype=torch.float64) for _ in range(4))
    logits = sharpness * (2 * common + p)
    return Positions(logits, (sharpness * (2 * common + q)).log_softmax(-1),
                     (logits + drift * step).log_softmax(-1))


def squared_error(x: Positions, ids: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Squared distance [M, R] of the estimated gradient by the logits from the dense one.

    Of R draws at each of M positions: ids [M, R, n], no word twice with c != 0, and c [M, R, n], what each counts, so
    that the estimate is -sum over the words of c dlogp, with dlogp_a = e_a - p.
    """
    p = x.logp.exp()
    advantage = x.logq - x.logp
    dense = -p * (advantage - (p * advantage).sum(-1, keepdim=True))

    def at(y: torch.Tensor) -> torch.Tensor:
        return y[:, None].expand(-1, ids.shape[1], -1).gather(-1, ids)

    total = c.sum(-1)
    of_estimate = (c * c).sum(-1) - 2 * total * (c * at(p)).sum(-1) + total ** 2 * (p * p).sum(-1)[:, None]
    with_dense = total * (p * dense).sum(-1)[:, None] - (c * at(dense)).sum(-1)
    return of_estimate - 2 * with_dense + (dense * dense).sum(-1)[:, None]


def check_squared_error() -> None:
    """Against autograd, on one draw of each of some positions."""
    x = synthetic(2.0, 0.5, M=4, V=50)
    chosen = draw_optimal(x.logmu, torch.full((4, 2), 0.4, dtype=torch.float64), 6)
    ids, logpi = chosen.ids, chosen.logpi.double()
    logp, logq = (y.gather(-1, ids) for y in (x.logp, x.logq))
    ours = squared_error(x, ids[:, None], ((logp - logpi).exp() * (logq - logp))[:, None])[:, 0]
    off = gradients(ROW, x, ids[:, None], logpi[:, None])[:, 0] - definition("reverse_mc", ROW, x)
    torch.testing.assert_close(ours, off.square().sum(-1))


def noise_of_iid(x: Positions, n: int) -> float:
    """Every word enumerated as the only draw; the mean of n independent draws has an n-th of its variance."""
    M, V = x.logits.shape
    c = (x.logp - x.logmu).exp() * (x.logq - x.logp)
    off = squared_error(x, torch.arange(V).expand(M, V)[..., None], c[..., None])
    return (x.logmu.exp() * off).sum(-1).mean().item() / n


def noise_of_optimal(x: Positions, n: int, draws: int, baseline: bool = False) -> float:
    """Over so many draws at every position. `baseline`: the expected advantage over the words that are kept for certain
    is subtracted from all advantages; these words are the same in every draw, so that the mean does not change."""
    M, V = x.logits.shape
    n = min(n, V)
    u = torch.rand(M, draws, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    total = 0.0
    for part in u.split(max(1, 50_000_000 // (M * V)), dim=1):
        R = part.shape[1]
        chosen = draw_optimal(x.logmu[:, None].expand(M, R, V).reshape(M * R, V), part.reshape(M * R, 2), n)
        ids = chosen.ids.view(M, R, n)
        logpi = chosen.logpi.double().view(M, R, n)
        logp, logq = (y[:, None].expand(M, R, V).gather(-1, ids) for y in (x.logp, x.logq))
        advantage = logq - logp
        if baseline:
            kept = logp.exp() * (logpi == 0)
            advantage = advantage - (kept * advantage).sum(-1, keepdim=True)
        weight = torch.where(logpi > UNUSED / 2, 0.0, (logp - logpi).exp())
        total += squared_error(x, ids, weight * advantage).sum(1).mean().item()
    return total / draws


def bias_of_topk(x: Positions, k: int) -> float:
    row = ESTIMATORS["reverse_topk"]
    ids, _ = outcomes(row, x, k)
    return (gradients(row, x, ids)[:, 0] - definition("reverse_mc", row, x)).square().sum(-1).mean().item()


def measure(label: str, x: Positions, draws: int = DRAWS, counts=COUNTS) -> dict:
    p, mu = x.logp.exp(), x.logmu.exp()
    entropy = -(p * x.logp).sum(-1).mean().item()
    kl = (p * (x.logp - x.logmu)).sum(-1).mean().item()
    second = (p * p / mu).sum(-1).mean().item()
    return {"type": "noise", "label": label, "entropy": entropy, "kl_p_mu": kl, "second_moment": second,
            "iid": {str(n): noise_of_iid(x, n) for n in counts},
            "optimal": {str(n): noise_of_optimal(x, n, draws) for n in counts},
            "with_baseline": {str(n): noise_of_optimal(x, n, draws, baseline=True) for n in counts},
            "topk_squared_bias": {str(n): bias_of_topk(x, n) for n in counts}}


def noise_table(found: list[dict]) -> list[list[str]]:
    lines = [["positions", "entropy of p, nats", "KL(p, mu)", *(f"N = {n}" for n in COUNTS)]]
    for r in found:
        ratios = []
        for n in COUNTS:
            if str(n) not in r["iid"]:
                ratios.append("")
                continue
            ours = r["optimal"][str(n)]
            ratios.append("exact" if ours < 1e-9 * r["iid"]["1"] else f"{r['iid'][str(n)] / ours:,.1f} x")
        lines.append([r["label"], f"{r['entropy']:.2f}", f"{r['kl_p_mu']:.3f}", *ratios])
    return lines


def baseline_table(found: list[dict]) -> list[list[str]]:
    """How many times less noise a baseline from the kept words leaves; below 1 it adds some."""
    lines = [["positions", *(f"N = {n}" for n in COUNTS[1:])]]
    for r in found:
        ratios = []
        for n in map(str, COUNTS[1:]):
            ours, with_it = (r.get(key, {}).get(n, 0) for key in ("optimal", "with_baseline"))
            ratios.append("exact" if ours < 1e-9 * r["iid"]["1"] else f"{ours / with_it:.2f}")
        lines.append([r["label"], *ratios])
    return lines


def draw_figure(found: list[dict]) -> None:
    """Variance against N, a panel for each of some positions."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(found), figsize=(3.3 * len(found), 3.6), dpi=150, squeeze=False)
    for ax, r in zip(axes[0], found):
        for key, name, color in (("iid", "independent draws", "#d6604d"), ("optimal", "optimal draws", "#1a9850"),
                                 ("topk_squared_bias", "top-k: squared bias", "#5e6fb5")):
            counts = [n for n in COUNTS if r[key].get(str(n), 0) > 1e-12]       # below that it is exact
            ax.plot(counts, [r[key][str(n)] for n in counts], "o-", color=color, label=name, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlim(0.8, 80)
        ax.set_xticks(COUNTS, [str(n) for n in COUNTS])
        ax.set_title(f"{r['label']}\nentropy {r['entropy']:.2f}, KL(p, mu) {r['kl_p_mu']:.3f}", fontsize=9)
        ax.set_xlabel("words per position", fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("squared error of the gradient", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / "designs.png")


def draw_picture() -> None:
    """How the words of one position are chosen, for people: eight words, N = 4. Figure: design.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    mu = torch.tensor([0.42, 0.27, 0.09, 0.07, 0.06, 0.04, 0.03, 0.02], dtype=torch.float64)
    n, u = 4, torch.tensor([[0.35, 0.9]], dtype=torch.float64)
    chosen = draw_optimal(mu.log()[None], u, n)
    K = int((chosen.logpi[0] == 0).sum())
    m = mu[K:].sum()
    c = m / (n - K)
    kept, taken, left = "#1a9850", "#d6604d", "#c8c8c8"
    colors = [kept if a < K else taken if a in chosen.ids[0].tolist() else left for a in range(len(mu))]
    figure, (bars, line) = plt.subplots(2, 1, figsize=(7, 4.4), dpi=150, height_ratios=(2.2, 1))
    bars.bar(range(1, len(mu) + 1), mu, color=colors)
    bars.axhline(c, color="black", linewidth=1, linestyle="--")
    bars.text(8.45, c + 0.01, "c", ha="right")
    bars.text(1.5, 0.45, "kept for certain, pi = 1", color=kept, ha="center", fontsize=9)
    bars.text(6, 0.17, "the rest, pi = mu / c", color=taken, ha="center", fontsize=9)
    bars.set_ylim(0, 0.5)
    bars.set_ylabel("mu", fontsize=9)
    bars.set_xlabel("word", fontsize=9)
    start = 0.0
    for a in range(K, len(mu)):
        line.barh(0, mu[a], left=start, color=colors[a], edgecolor="white", height=0.5)
        line.text(start + mu[a] / 2, 0, str(a + 1), ha="center", va="center", fontsize=9)
        start += mu[a].item()
    for i in range(n - K):
        at = (u[0, 0] + i) * c
        line.annotate("", (at, 0.25), (at, 0.75), arrowprops={"arrowstyle": "->", "color": "black"})
        line.text(at, 0.8, f"(u + {i}) c", ha="center", fontsize=9)
    line.set_ylim(-0.4, 1.1)
    line.set_xlim(0, float(m))
    line.set_title("the rest, end to end: two points, c apart, no word longer than c", fontsize=9)
    line.set_yticks([])
    for ax in (bars, line):
        ax.spines[["top", "right"]].set_visible(False)
    line.spines["left"].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "figures" / "design.png")


# -- what is learnt -------------------------------------------------------------------------------

def train(cell: str, lag: int, lr: float, seed: int) -> dict:
    torch.set_num_threads(1)
    models = [f"--{role}={folder}" for role, folder in zip(("student", "teacher"), toy_models(HERE.parent / "runs"))]
    found = distil([*models, *CELLS[cell], f"--steps={STEPS}", f"--lr={lr}", f"--seed={seed}"], lag)
    return {"type": "training", "cell": cell, "lag": lag, "lr": lr, "seed": seed, **found}


def train_all(wanted: list[tuple[str, int, float, int]], jobs: int) -> None:
    """Runs that have no record yet, `jobs` at a time."""
    known = {tuple(r[name] for name in ("cell", "lag", "lr", "seed")) for r in records("training")}
    toy_models(HERE.parent / "runs")             # made once, before anybody needs them
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for run in as_completed([pool.submit(train, *run) for run in wanted if run not in known]):
            add([run.result()])
            print(json.dumps(run.result()), flush=True)


def best_rate(found: list[dict], cell: str, lag: int) -> float | None:
    """The learning rate with the lowest exact KL(p, q) for the first seed, with which all rates are run."""
    mine = [r for r in found if (r["cell"], r["lag"]) == (cell, lag)]
    if not mine:
        return None
    first = min(r["seed"] for r in mine)
    return min((r["kl"], r["lr"]) for r in mine if r["seed"] == first)[1]


def training_table(found: list[dict]) -> list[list[str]]:
    """Mean and standard deviation over the seeds, at the learning rate that is best for the cell."""
    lags = sorted({r["lag"] for r in found})
    lines = [["cache", *(f"lag {lag}: accuracy, KL" for lag in lags)]]
    for cell in CELLS:
        line = [cell]
        for lag in lags:
            lr = best_rate(found, cell, lag)
            if lr is None:
                line.append("")
                continue
            best = [r for r in found if (r["cell"], r["lag"], r["lr"]) == (cell, lag, lr)]
            line.append(f"{spread([100 * r['accuracy'] for r in best], 0)}%, {spread([r['kl'] for r in best], 2)} "
                        f"(lr {lr:g}, {len(best)} seed{'s' * (len(best) > 1)})")
        if any(line[1:]):
            lines.append(line)
    return lines


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


# -- records --------------------------------------------------------------------------------------

def records(kind: str) -> list[dict]:
    found = [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    return [r for r in found if r["type"] == kind]


def key_of(record: dict) -> tuple:
    return tuple(record.get(name) for name in ("type", "label", "cell", "lag", "lr", "seed"))


def add(new: list[dict]) -> None:
    """New records, in the place of those of the same cells."""
    keys = {key_of(r) for r in new}
    old = [r for kind in ("noise", "training") for r in records(kind) if key_of(r) not in keys]
    told = provenance({}, {})
    said = {"commit": told["commit"], "hardware": told["hardware"]}
    RECORDS.write_text("".join(json.dumps(r) + "\n" for r in [*old, *(r | said for r in new)]))


def noise() -> str:
    """Markdown, from the records."""
    return markdown(noise_table(records("noise")))


def baseline() -> str:
    return markdown(baseline_table([r for r in records("noise") if "with_baseline" in r]))


def training() -> str:
    return markdown(training_table(records("training")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("what", choices=("variance", "train", "best", "table", "picture"))
    parser.add_argument("--run", type=Path, help="a finished run, with checkpoints --lags versions before its end")
    parser.add_argument("--label", default="toy", help="what the run is called in tables")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the optimal design, at every position")
    parser.add_argument("--positions", type=int, default=128, help="of the run")
    parser.add_argument("--cells", nargs="*", default=list(CELLS))
    parser.add_argument("--lags", nargs="*", type=int, default=list(LAGS))
    parser.add_argument("--lrs", nargs="*", type=float, default=[1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "variance":
        check_squared_error()
        if args.run:
            places = [(f"{args.label}, lag {lag}", visited(args.run, lag, args.positions)) for lag in args.lags]
        else:
            places = [(f"synthetic, x {s:g}, drift {d:g}", synthetic(s, d)) for s in SHARPNESS for d in DRIFTS]
        for label, x in places:
            add([measure(label, x, draws=args.draws)])
        print(plain_table(noise_table(records("noise"))))
    if args.what == "train":
        train_all([(cell, lag, lr, seed) for seed in args.seeds for lr in args.lrs for lag in args.lags
                   for cell in args.cells], args.jobs)
    if args.what == "best":
        found = records("training")
        train_all([(cell, lag, best_rate(found, cell, lag), seed) for seed in args.seeds for lag in args.lags
                   for cell in args.cells], args.jobs)
    if args.what in ("variance", "picture"):
        by_label = {r["label"]: r for r in records("noise")}
        draw_figure([by_label[label] for label in PANELS if label in by_label])
    if args.what == "picture":
        draw_picture()
    if args.what == "table":
        print(noise(), baseline(), training(), sep="\n\n")
    print(json.dumps({"noise": len(records("noise")), "training": len(records("training"))}))


if __name__ == "__main__":
    main()

"""
The audit: every estimator against the dense gradient it stands for, with a stale student.

    python benchmarks/audit.py                # a small softmax, enumerated; about half a minute
    python benchmarks/audit.py --run runs/x   # also at the positions that a run of the toy visited
                                              # (made with --save-every 4 --faults.keep 0)

A position has three distributions over V words: p (the student now), mu (the student that drew,
stale) and q (the teacher). Gradients are with respect to the logits of p. Expectations run over
every word that could have been drawn.

    bias      |E[gradient] - dense gradient| / |dense gradient|, over all positions; 0 = unbiased
    cosine    between the two; 1 = the right direction
    var N     trace of the gradient's variance, mean over positions, of independent draws: N = 1
              enumerated, N = 4, 16, 64 drawn (other designs: benchmarks/designs.py). Marked * for
              rows without N: those of the emitted token alone repeat the value of N = 1, and those
              that draw nothing have 0
    ESS       effective share of the samples, 1 / E_mu[w^2]; - where no word is drawn from mu
    bytes     per token in the cache at N = 4, K = 16, with a hidden state of H = 2,048 in bf16
              where one is kept
    ms        CPU time per 1,000 positions at V = 151,936 on this machine, one thread: log-softmax,
              loss and backward; the best of 9

The dense gradient is that of the KL that a row logs, and that of the Jensen-Shannon divergence for
jsd_dense. prox of decoupled_ppo is p, as in the first update of a batch; the margins of m2po follow
from one drawn token per position. `none` has no loss on log-probs and is left out.
The figures show bias and variance against staleness: versions of the run, or the size of the drift
from mu to p. Figures: benchmarks/figures/audit.png and, of a run, audit-run.png; raw numbers:
benchmarks/audit.jsonl and audit-run.jsonl. Tests: tests/test_audit.py
The last line printed is one JSON object about the small softmax:
{"<estimator>": {"bias", "cosine", "variance": {"1", "4", "16", "64"}, "cache_bytes_per_token"}, ...}
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cache import Slots  # noqa: E402
from config import NESTED, Config  # noqa: E402
from control.preflight_prompts import load_task, read_texts  # noqa: E402
from engines.hf import HFEngine  # noqa: E402
from estimators import ESTIMATORS, Estimator  # noqa: E402
from models.alignment import response_rows  # noqa: E402
from models.loading import load_model  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import table  # noqa: E402

COUNTS, LAGS, DRIFTS = (1, 4, 16, 64), (0, 4, 16, 64), (0.0, 0.25, 0.5, 1.0, 1.5)
RESPONSES = 64               # whose positions are looked at in a run
HIDDEN_BYTES = 2 * 2048
ROWS = {name: row for name, row in ESTIMATORS.items() if row.head}


# -- positions ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Positions:
    """Logits of p, log-probs of q and mu: [M, V] each, float64."""
    logits: Tensor
    logq: Tensor
    logmu: Tensor

    @property
    def logp(self) -> Tensor:
        return self.logits.log_softmax(-1)


def small_softmax(drift: float, seed: int = 0, M: int = 16, V: int = 64) -> Positions:
    """Peaked distributions; q is correlated with p; mu is p before a step of size `drift`."""
    g = torch.Generator().manual_seed(seed)
    common, p, q, step = (torch.randn(M, V, generator=g, dtype=torch.float64) for _ in range(4))
    logits = 2 * common + p
    logq = (2 * common + q).log_softmax(-1)
    logmu = (logits + drift * step).log_softmax(-1)
    return Positions(logits, logq, logmu)


@torch.no_grad()
def visited(run: Path, lag: int, M: int) -> Positions:
    """M positions of responses to held-out prompts of the run's task, or to the last of its prompts where none are
    held out. They are drawn by weights `lag` versions older than the run's last."""
    lines = map(json.loads, open(run / "log.jsonl"))
    recorded = next(x for x in lines if x["type"] == "run")["config"]
    groups = {name: kind(**recorded[name]) for name, kind in NESTED.items()}
    cfg = Config(**recorded | groups)
    old = run / "student" if lag == 0 else run / "checkpoints" / f"step-{cfg.steps - lag}"
    if not old.exists():
        raise SystemExit(f"audit: {old} is missing: of {LAGS} versions before the end "
                         "(--save-every 4 --faults.keep 0)")
    engine = HFEngine(replace(cfg, student=str(old)), "cpu", torch.float32)
    texts = read_texts(cfg, AutoTokenizer.from_pretrained(cfg.student), load_task(cfg))
    prompts = (texts.eval_prompts or texts.prompts[-RESPONSES:])[:RESPONSES]
    columns = engine.drawing.n + engine.drawing.k
    slots = Slots(len(prompts), cfg.max_prompt, cfg.max_response, columns)
    for s, prompt in enumerate(prompts):
        slots.open(s, s, prompt, len(prompt), 0)
        engine.add(s, prompt, cfg.max_response, uid=s, position=0)
    while engine.rows or engine.new:
        for s, drawn in engine.take(engine.step()).items():
            slots.append(s, *drawn)
    segments = [slots.read(s) for s in range(len(slots))]
    at = torch.randperm(sum(map(len, segments)), generator=torch.Generator().manual_seed(0))[:M]
    logits = []
    for folder in (run / "student", cfg.teacher, old):
        model = load_model(str(folder), "cpu", torch.float32)
        states = [model.base_model(input_ids=s.tokens[None].long()).last_hidden_state for s in segments]
        rows = torch.cat([response_rows(x, [s]) for x, s in zip(states, segments)])
        logits.append(model.get_output_embeddings()(rows[at]).double())
    return Positions(logits[0], logits[1].log_softmax(-1), logits[2].log_softmax(-1))


# -- one estimator --------------------------------------------------------------------------------

def gradients(row: Estimator, x: Positions, ids: Tensor, logpi: Tensor | None = None) -> Tensor:
    """d loss / d logits for every set of ids [M, R, C] -> [M, R, V]. `logpi` [M, R, C]: of independent
    draws if it is not given."""
    M, R, C = ids.shape
    leaf = x.logits[:, None].expand(M, R, -1).clone().requires_grad_()
    logp, logq = (y.expand(M, R, -1).gather(-1, ids) for y in (leaf.log_softmax(-1), x.logq[:, None]))
    if logpi is None:
        drawn_from = x.logq if row.support == "teacher_mc" else x.logmu
        copies = C if row.support in ("candidates", "teacher_mc") else 1
        logpi = drawn_from[:, None].expand(M, R, -1).gather(-1, ids) + math.log(copies)
    of_batch = {}
    if row.batch is not None:      # one token per position makes the batch; prox is p itself
        one = torch.multinomial(x.logmu.exp(), 1, generator=torch.Generator().manual_seed(1))
        found = row.batch(*(y.gather(-1, one) for y in (x.logp, x.logq, x.logmu)))
        of_batch = {name: logp.detach() if len(y) > 1 else y for name, y in found.items()}
    row.fn(logp, logq, logpi, **of_batch).sum().backward()
    return leaf.grad


def outcomes(row: Estimator, x: Positions, k: int) -> tuple[Tensor, Tensor]:
    """Everything that a slot may hold at N = 1: ids [M, R, C] and their probabilities [M, R]."""
    M, V = x.logits.shape
    words = torch.arange(V).expand(M, V)
    if row.support in ("sampled", "candidates", "teacher_mc"):
        return words[..., None], (x.logq if row.support == "teacher_mc" else x.logmu).exp()
    if row.support == "sampled_topk":            # each word as the emitted token, before the best
        best = x.logmu.topk(min(k, V)).indices[:, None].expand(M, V, -1)
        return torch.cat([words[..., None], best], -1), x.logmu.exp()
    best = {"student_topk": x.logmu, "teacher_topk": x.logq}
    ids = best[row.support].topk(min(k, V)).indices if row.support in best else words
    return ids[:, None], torch.ones(M, 1, dtype=torch.float64)


def definition(name: str, row: Estimator, x: Positions) -> Tensor:
    """The dense gradient [M, V], by differentiating the divergence as it is written down."""
    leaf = x.logits.clone().requires_grad_()
    p = leaf.softmax(-1)
    q = x.logq.exp()
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    if name == "jsd_dense":
        divergence = kl(q, m) / 2 + kl(p, m) / 2
    elif row.kl == "reverse":
        divergence = kl(p, q)
    else:
        divergence = kl(q, p)
    divergence.backward()
    return leaf.grad


def variance(row: Estimator, x: Positions, n: int, k: int, draws: int = 2000) -> float:
    """Trace, mean over positions: enumerated at n = 1 and for rows without n, else from `draws`."""
    if n == 1 or row.support not in ("candidates", "teacher_mc"):
        ids, probability = outcomes(row, x, k)
        g = gradients(row, x, ids)
        off = g - (probability[..., None] * g).sum(1, keepdim=True)
        return (probability * off.square().sum(-1)).sum(1).mean().item()
    source = (x.logq if row.support == "teacher_mc" else x.logmu).exp()
    g = torch.Generator().manual_seed(n)
    ids = torch.multinomial(source, draws * n, replacement=True, generator=g)
    ids = ids.view(len(source), draws, n)
    return gradients(row, x, ids).var(1).sum(-1).mean().item()


def audit(name: str, x: Positions, k: int, counts=COUNTS) -> dict:
    row = ROWS[name]
    ids, probability = outcomes(row, x, k)
    got = (probability[..., None] * gradients(row, x, ids)).sum(1)
    want = definition(name, row, x)
    w2 = (2 * x.logp - x.logmu).exp().sum(-1).mean()                    # E_mu[w^2]
    return {"bias": ((got - want).norm() / want.norm()).item(),
            "cosine": torch.cosine_similarity(got.flatten(), want.flatten(), 0).item(),
            "variance": {str(n): variance(row, x, n, k) for n in counts},
            "ess": (1 / w2).item() if row.support in ("sampled", "sampled_topk", "candidates") else None,
            "cache_bytes_per_token": row.bytes(4, 16, HIDDEN_BYTES)}


def costs(k: int, rounds: int = 9, V: int = 151_936, M: int = 8) -> dict[str, float]:
    """Milliseconds of CPU time per 1,000 positions, the best of `rounds`.

    The rows take turns, so that a busy spell of the machine hits all of them.
    """
    g = torch.Generator().manual_seed(0)
    best = dict.fromkeys(ROWS, float("inf"))
    x, y = (torch.randn(M, V, generator=g) for _ in range(2))
    for name in list(ROWS) * rounds:
        row = ROWS[name]
        C = row.columns(4, k) - (row.support not in ("sampled", "candidates"))
        ids = torch.arange(M * C).view(M, C) * 1009 % V
        leaf = x.clone().requires_grad_()
        start = time.process_time()
        logp = leaf.log_softmax(-1)
        if row.support == "full":
            logq = y.log_softmax(-1)
        else:
            logp = logp.gather(-1, ids)
            logq = y[:, :C] - 12
        of_batch = row.batch(logq, logq, logq) if row.batch else {}
        row.fn(logp, logq, logq, **of_batch).sum().backward()
        milliseconds = 1000 * (time.process_time() - start)
        best[name] = min(best[name], milliseconds * 1000 / M)
    return best


# -- table, figure, record ------------------------------------------------------------------------

def show(title: str, results: dict[str, dict], cost: dict[str, float]) -> None:
    rows = [["", "bias", "cosine", *(f"var {n}" for n in COUNTS), "ESS", "bytes", "ms"]]
    for name, r in results.items():
        star = "" if ROWS[name].support in ("candidates", "teacher_mc") else "*"
        bias = f"{r['bias']:.4f}" if r["bias"] > 1e-9 else "0"
        ess = "-" if r["ess"] is None else f"{r['ess']:.3f}"
        rows.append([name, bias, f"{r['cosine']:.4f}",
                     *(f"{v:.4g}{star}" for v in r["variance"].values()),
                     ess, f"{r['cache_bytes_per_token']:,}", f"{cost[name]:,.0f}"])
    print(f"\n{title}\n{table(rows)}", flush=True)


FAMILIES = {"other": "#5e6fb5", "unbiased": "#1a9850", "sampled": "#d6604d"}       # colours
MARKERS = "osD^vP"
LINES = ["-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 1))]


def family(row: Estimator) -> str:
    """One of FAMILIES: unbiased rows, rows of the emitted token alone, all other rows."""
    if row.unbiased:
        return "unbiased"
    return "sampled" if row.support == "sampled" else "other"


def draw_figure(path: Path, curves: dict[str, dict], stale: list, label: str) -> None:
    """Bias left, variance at N = 4 right; a colour and a column of the legend per family.

    matplotlib fills the columns from the left, so the largest family comes first.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 5.4), dpi=150)
    at = range(len(stale))
    for kind, color in FAMILIES.items():
        for i, name in enumerate(name for name, row in ROWS.items() if family(row) == kind):
            how = dict(color=color, marker=MARKERS[i], markersize=5, linewidth=1.4, label=name,
                       linestyle=LINES[i])
            axes[0].plot(at, [r["bias"] for r in curves[name]], **how)
            if max(r["variance"]["4"] for r in curves[name]) > 0:
                axes[1].plot(at, [r["variance"]["4"] for r in curves[name]], **how)
    axes[0].set_title("bias of the expected gradient,\nrelative to the dense one", fontsize=10)
    axes[1].set_title("variance of the gradient (trace)\nN = 4, or the emitted token alone", fontsize=10)
    axes[1].set_yscale("log")
    axes[0].annotate("unbiased: 0 throughout", (at[-1], 0), (0, 6), textcoords="offset points", ha="right",
                     fontsize=8.5, color=FAMILIES["unbiased"])
    for ax in axes:
        ax.set_xticks(list(at), [f"{s:g}" for s in stale])
        ax.set_xlabel(label, fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="lower center", ncols=3, frameon=False, fontsize=9, columnspacing=4)
    figure.text(0.99, 0.005, "top-k and dense estimators draw nothing: no variance", ha="right", fontsize=7.5,
                color="#555")
    figure.tight_layout(rect=(0, 0.21, 1, 1))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def report(kind: str, places: list[Positions], stale: list, k: int, label: str, settings: dict) -> None:
    """The curves over staleness: a figure, and the raw numbers behind it."""
    curves = {name: [audit(name, x, k) for x in places] for name in ROWS}
    draw_figure(HERE / "figures" / f"{kind}.png", curves, stale, label)
    with open(HERE / f"{kind}.jsonl", "w", encoding="utf-8") as f:
        f.write(json.dumps({"type": "run", **provenance(settings, {})}) + "\n")
        for name, results in curves.items():
            for s, r in zip(stale, results):
                f.write(json.dumps({"type": "audit", "estimator": name, "staleness": s, "k": k, **r}) + "\n")
    for i, s in enumerate(stale):
        show(f"{label}: {s:g}", {name: c[i] for name, c in curves.items()}, settings["cost_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--run", type=Path, help="a finished toy run, with checkpoints 4, 16, 64 versions earlier")
    parser.add_argument("--positions", type=int, default=128, help="of the run")
    parser.add_argument("--k", type=int, default=16, help="size of the top-k sets on the small softmax; of the run: 4")
    parser.add_argument("--drift", type=float, default=0.5, help="of the small softmax: size of the step from mu to p")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**vars(args), "run": str(args.run or ""), "cost_ms": costs(args.k)}
    report("audit", [small_softmax(d) for d in DRIFTS], list(DRIFTS), args.k,
           f"staleness: drift of the logits (V = 64, K = {args.k})", settings)
    if args.run:
        report("audit-run", [visited(args.run, lag, args.positions) for lag in LAGS], list(LAGS), 4,
               "staleness: versions (toy, V = 32, K = 4)", settings)
    small = {name: audit(name, small_softmax(args.drift), args.k) for name in ROWS}
    show(f"the pair of the last line: drift {args.drift}, V = 64, K = {args.k}", small, settings["cost_ms"])
    print(json.dumps({name: {key: x for key, x in r.items() if key != "ess"} for name, r in small.items()}))


if __name__ == "__main__":
    main()

"""
EffOPD against larger learning rates: updates, tokens, seconds until the toy student is right 80% and 95% of the time.

    python benchmarks/effopd.py                # what is not yet in effopd.jsonl, two runs at a time; 80 minutes
    python benchmarks/effopd.py --only sharpening --seeds 1 --steps 24 --out try.jsonl      # a first look; 2 minutes
    python benchmarks/effopd.py direction      # is an update signal, and how far does it lead? three minutes
    python benchmarks/effopd.py table          # the tables in docs/, from effopd.jsonl alone
    python benchmarks/effopd.py plot           # figures/effopd.png, likewise

Two pairs. Sharpening: the student is the toy's, right a third of the time, and the teacher is that student trained on.
Acquisition: the student has been stopped before it could add, and the teacher is the toy's larger one. Every run is the
shipped command, its processes forked from this one: batches of 32, or of 256 where that is said, constant learning
rate, reverse KL over all words (no noise of drawn words, which is larger than the effect), synchronous (one is
asynchronous, --max-ahead 4). Models and rows are the same in all seeds, the prompts' order and the draws are not. BASE
is the learning rate of x1. `no gate` takes every jump, of 10 D, by a patch. Accuracy: greedy, 100 held-out rows, every
EVERY steps: the resolution of "updates". Tokens: trained, and read or drawn by the gate. Seconds: of the log's wall_s,
less the evaluations, for which a synchronous run waits; two runs side by side share two cores, all alike.
A row: pair, variant, seed, flags, commit, hardware, evals [step, accuracy, tokens, seconds], events, and for plain x1
`rescaled`: the update of the first 8 steps, its cosine with that of all steps, and the accuracy of the student moved by
it as far as by shares of the norm of the latter.
Last line: one JSON object, {pair: {variant: {"updates_80", "tokens_80", "seconds_80", "updates_95", "reached_80",
"reached_95", "runs", "final"}}}, means over the seeds that got there.
"""
from __future__ import annotations

import argparse
import json
import operator
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kills  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from config import Config  # noqa: E402
from data import tasks, toy  # noqa: E402
from extensions import effopd  # noqa: E402
from models.loading import load_model  # noqa: E402
from record.provenance import provenance  # noqa: E402
from teacher import complete  # noqa: E402

ROWS, EVERY, BASE = HERE / "effopd.jsonl", 8, 3e-5
STEPS = {"sharpening": 192, "sharpening, batch 256": 96, "acquisition": 96, "acquisition, batch 256": 384}
MODELS = {"sharpening": dict(steps=200, lr=5e-4, seed=3, smoothing=0.01),       # the teacher: the student trained on
          "acquisition": dict(layers=2, hidden=96, steps=90, lr=2e-3, seed=2, smoothing=0.0)}      # the student
FLAGS = dict(task="toy", gpus=0, engine="hf", estimator="reverse_dense", schedule="sync", batch=32, max_prompt=8,
             max_response=40, max_running=320, lr_schedule="constant", warmup=0, eval__n=100, eval__every=EVERY)
KL = dict(extend="effopd", effopd__gate="kl")
VARIANTS = {      # label: (multiple of BASE, flags, a gate that accepts everything)
    "plain, x1": (1, {}, False), "plain, x3": (3, {}, False), "plain, x10": (10, {}, False),
    "plain, x30": (30, {}, False), "kl, x1": (1, KL, False),
    "kl, x10": (10, KL, False), "accuracy, x1": (1, dict(extend="effopd", effopd__gate="accuracy"), False),
    "no gate, x1": (1, KL, True),
    "kl, x1, async": (1, KL | dict(schedule="async", max_ahead=4), False)}
PAIRS = {"sharpening": list(VARIANTS), "sharpening, batch 256": list(VARIANTS), "acquisition": list(VARIANTS)[:-1],
         "acquisition, batch 256": ["plain, x10", "plain, x30", "kl, x10"]}


# -- models ----------------------------------------------------------------------------------------

def models() -> dict[str, dict[str, str]]:
    """Folders of both pairs; what is missing is trained."""
    import hashlib
    student, teacher = toy.toy_models(HERE.parent / "runs")
    recipe = hashlib.sha256(json.dumps([toy.TOY, MODELS]).encode()).hexdigest()[:8]
    made = {name: HERE.parent / "runs" / f"effopd-{recipe}" / name for name in MODELS}
    for name, folder in made.items():
        if not (folder / "config.json").exists():
            begin = dict(layers=2, hidden=96) | MODELS[name]
            old = load_model(student, "cpu", torch.float32).train() if name == "sharpening" else None
            with tqdm(total=begin["steps"], unit="step") as bar, mock.patch.object(
                    toy, "small_model", (lambda *_, **__: old) if old else toy.small_model):
                model = toy.train_toy(name, toy.toy_tokenizer(), batch=toy.TOY["batch"], bar=bar, **begin)
            toy.toy_tokenizer().save_pretrained(folder)
            model.save_pretrained(folder)
    pairs = {"sharpening": dict(student=student, teacher=str(made["sharpening"])),
             "acquisition": dict(student=str(made["acquisition"]), teacher=teacher)}
    return pairs | {f"{pair}, batch 256": how | dict(batch=256) for pair, how in pairs.items()}


def accuracy(model) -> float:
    """Greedy, on the held-out rows of the runs."""
    tokenizer, rows = toy.toy_tokenizer(), tasks.toy_task(FLAGS["eval__n"]).eval
    answers = complete(model, [tokenizer.encode(row.prompt) for row in rows], FLAGS["max_response"],
                       [tokenizer.eos_token_id])
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(toy.toy_grade(text, row.answer) for text, row in zip(texts, rows)) / len(rows)


def rescaled(begin: str, out: Path) -> dict:
    """How well the first 8 steps' direction is the last one's, and what becomes of a student that is moved along it."""
    model = load_model(begin, "cpu", torch.float32)
    names = list(effopd.moving_weights(model))
    first, early, last = (load_file(Path(folder) / "model.safetensors") for folder in (
        begin, out / "checkpoints" / "step-8", out / "student"))
    a, b = (torch.cat([(to[n] - first[n]).flatten() for n in names]) for to in (early, last))
    found = {"cosine": (a @ b / a.norm() / b.norm()).item(), "norms": [a.norm().item(), b.norm().item()]}
    for share in (0.25, 0.5, 1.0):
        scale = share * (b.norm() / a.norm()).item()
        model.load_state_dict({n: first[n] + scale * (early[n] - first[n]) for n in names}, strict=False)
        found[f"accuracy at {share} of the norm"] = accuracy(model)
    model.load_state_dict({n: last[n] for n in names}, strict=False)
    return found | {"accuracy of the last, these weights alone": accuracy(model)}


# -- runs ------------------------------------------------------------------------------------------

@torch.no_grad()
def forward_kl(model, teacher, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """KL(q || p) per token of fixed answers, nats, exact."""
    found = []
    for prompt, answer in zip(prompts, answers):
        logp, logq = (m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
                      for m in (model, teacher))
        found.append((logq.exp() * (logq - logp[:, :logq.shape[1]])).sum(-1))
    return torch.cat(found).mean().item()


def direction(pair: str) -> dict:
    """How much two seeds' updates from one trigger to the next have in common: of updates that are signal + noise,
    independent, the cosine is |signal|^2 / |update|^2. And how far the direction of steps 16 to 32 leads: forward KL
    on answers that the initial student has drawn to held-out prompts, at W + s D, and after 16 and 32 steps more."""
    root = Path(tempfile.mkdtemp())
    began = [launched(pair, "plain, x1", seed, 64, root) for seed in (0, 1)]
    assert not any(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in began)
    (_, flags), (_, others) = began
    model, teacher = (load_model(flags[who], "cpu", torch.float32) for who in ("student", "teacher"))
    names, tokenizer = list(effopd.moving_weights(model)), toy.toy_tokenizer()
    prompts = [tokenizer.encode(row.prompt) for row in tasks.toy_task(200).eval]
    answers = effopd.OwnEngine(engine_flags(flags), model).complete(prompts, flags["max_response"], temperature=1.0)

    def at(step: int, flags: dict = flags) -> dict[str, torch.Tensor]:
        return load_file(Path(flags["out"]) / "checkpoints" / f"step-{step}" / "model.safetensors")

    def value(weights: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(weights, strict=False)
        return forward_kl(model, teacher, prompts, answers)
    alike, along = {}, {"begin": forward_kl(model, teacher, prompts, answers)}
    for step in (8, 16, 32):
        one, two = (torch.cat([(at(2 * step, of)[n] - at(step, of)[n]).flatten() for n in names])
                    for of in (flags, others))
        alike[f"{step} to {2 * step}"] = torch.cosine_similarity(one, two, dim=0).item()
    before, now = at(16), at(32)
    for s in (0, 1, 2, 4):
        along[f"{s} D"] = value(now | {n: now[n] + s * (now[n] - before[n]) for n in names})
    along |= {f"{more} more steps": value(at(32 + more)) for more in (16, 32)}
    shutil.rmtree(root)
    return dict(pair=pair, alike=alike, along=along, commit=provenance({}, {})["commit"])


def engine_flags(flags: dict) -> Config:
    """What an engine reads of a run's flags."""
    return Config(**{name: value for name, value in flags.items() if "__" not in name})


def launched(pair: str, variant: str, seed: int, steps: int, root: Path) -> tuple[int, dict]:
    times, more, ungated = VARIANTS[variant]
    name = "".join(c if c.isalnum() else "-" for c in f"{pair} {variant} {seed}")
    flags = FLAGS | models()[pair] | more | dict(steps=steps or STEPS[pair], seed=seed, lr=times * BASE,
                                                 out=str(root / name))
    flags |= dict(save_every=8, faults__keep=0) if variant == "plain, x1" else {}
    effopd.BETTER["kl"] = (lambda a, b: True) if ungated else operator.lt
    return kills.launch(flags, resume=False), flags


def row(pair: str, variant: str, flags: dict) -> dict:
    """What the benchmark keeps of a run."""
    out = Path(flags["out"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = {x["step"]: x for x in log if x["type"] == "step"}
    events = [{k: v for k, v in x.items() if k != "type"} for x in log if x.get("what") in ("effopd", "flush")]
    spans = [x["dur"] / 1e6 for x in json.loads((out / "trace.json").read_text())["traceEvents"]
             if x["ph"] == "X" and x["name"] == "evaluate"]
    evals, tokens = [], 0
    for i, x in enumerate(x for x in log if x["type"] == "eval"):
        tokens = sum(s["tokens"] for s in steps.values() if s["step"] <= x["step"])
        tokens += sum(e["tokens"] for e in events if e["what"] == "effopd" and e["step"] <= x["step"])
        waited = sum(spans[1:i]) if flags["schedule"] == "sync" else 0.0      # the first came before the first ticket
        evals.append([x["step"], x["accuracy"], tokens, steps[x["step"]]["wall_s"] - waited if x["step"] else 0.0])
    said = {k: v for k, v in flags.items() if k not in ("student", "teacher", "out")}
    return dict(pair=pair, variant=variant, seed=flags["seed"], flags=said, commit=log[0]["commit"],
                hardware=log[0]["hardware"], evals=evals, events=events, done=log[-1],
                rescaled=rescaled(flags["student"], out) if "save_every" in flags else None)


def fill(path: Path, wanted: list[tuple[str, str, int]], steps: int, jobs: int) -> None:
    """Run what is wanted and not in the file, `jobs` at a time; a row is written when its run ends."""
    there = {(r["pair"], r["variant"], r["seed"]) for r in rows(path)}
    waiting, running = [w for w in wanted if w not in there], {}
    root = Path(tempfile.mkdtemp())
    while waiting or running:
        while waiting and len(running) < jobs:
            pair, variant, seed = waiting.pop(0)
            pid, flags = launched(pair, variant, seed, steps, root)
            running[pid] = pair, variant, flags
        pid, status = os.wait()
        pair, variant, flags = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        assert code == 0, f"exit code {code}: {Path(flags['out'] + '.txt').read_text()[-2000:]}"
        made = row(pair, variant, flags)
        add(path, made)
        shutil.rmtree(flags["out"])
        print(f"{pair}, {variant}, seed {made['seed']}: {[f'{a:.0%}' for _, a, _, _ in made['evals']][::4]}, "
              f"{made['done']['wall_s']:.0f} s", flush=True)


def add(path: Path, *made: dict) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in made)


# -- tables ----------------------------------------------------------------------------------------

def rows(path: Path = ROWS, what: str = "variant") -> list[dict]:
    """Of the runs; or, with "alike", those of `direction`."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [r for r in found if what in r]


def reached(r: dict, share: float) -> list | None:
    """The first evaluation of a run that is that good: [step, accuracy, tokens, seconds]."""
    return next((e for e in r["evals"] if e[1] >= share), None)


def spread(values: list[float], form: str = "{:.0f}") -> str:
    if not values:
        return "-"
    low, mean, high = (form.format(x) for x in (min(values), statistics.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def table(path: Path = ROWS) -> str:
    parts = []
    for pair, variants in PAIRS.items():
        out = [f"| {pair} | got to 80% | updates | tokens | seconds | updates to 95% | at the end | KL there "
               "| jumps k, by seed | of them, tokens | seconds |", "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|"]
        for variant in variants:
            mine = [r for r in rows(path) if (r["pair"], r["variant"]) == (pair, variant)]
            if not mine:
                continue
            first, second = ([e for r in mine if (e := reached(r, share))] for share in (0.80, 0.95))
            tries = [[e for e in r["events"] if e["what"] == "effopd"] for r in mine]
            jumps = "; ".join(" ".join(str(e["k"]) for e in t) for t in tries if t)
            out.append(" | ".join([
                f"| {variant}", f"{len(first)} of {len(mine)}", spread([e[0] for e in first]),
                spread([e[2] / 1000 for e in first], "{:.0f}k"), spread([e[3] for e in first]),
                spread([e[0] for e in second]) + (f", {len(second)} of {len(mine)}" if 0 < len(second) < len(mine) else
                                                  ""),
                spread([100 * r["evals"][-1][1] for r in mine], "{:.0f}%"),
                spread([r["done"]["kl_after"] for r in mine], "{:.3f}"), jumps,
                spread([sum(e["tokens"] for e in t) / 1000 for t in tries], "{:.0f}k") if jumps else "",
                spread([sum(e["seconds"] for e in t) for t in tries], "{:.1f}") if jumps else ""]) + " |")
        parts += ["\n".join(out)] if len(out) > 2 else []
    moved = [f"| {pair} | {spread([r['rescaled'][k] for r in mine], '{:.2f}')}" + "".join(
        f" | {spread([100 * r['rescaled'][f'accuracy at {s} of the norm'] for r in mine], '{:.0f}%')}"
        for s in (0.25, 0.5, 1.0)) + f" | {spread([100 * r['evals'][-1][1] for r in mine], '{:.0f}%')} |"
        for pair in PAIRS for k in ("cosine",)
        if (mine := [r for r in rows(path) if r["pair"] == pair and r["rescaled"]])]
    head = ["| plain, x1 | cosine of the first 8 steps' update with that of all | accuracy, moved by it to 0.25 of the "
            "norm of that | 0.5 | 1 | trained |", "|---|--:|--:|--:|--:|--:|"]
    alike = [f"| {r['pair']} | " + " | ".join([*(f"{x:.2f}" for x in r["alike"].values()), *(
        f"{x:.3f}" for x in r["along"].values())]) + " |" for r in rows(path, "alike")]
    over = ["| plain, x1 | cosine of two seeds' updates, steps 8 to 16 | 16 to 32 | 32 to 64 | KL of a fixed set, step "
            "0 | W at step 32 | W + D | W + 2 D | W + 4 D | 16 steps more | 32 steps more |", "|---|" + "--:|" * 10]
    return "\n\n".join([*parts, "\n".join(head + moved), "\n".join(over + alike), flushes(path)]).rstrip()


def flushes(path: Path) -> str:
    """What the flushes of the asynchronous runs cost. Older rows have `barrier` and `weighed` for flush and examined.
    """
    found = [(r, [e for e in r["events"] if e["what"] in ("flush", "barrier")]) for r in rows(path)]
    found = [(r, es) for r, es in found if es]
    if not found:
        return ""
    n, tokens = sum(len(es) for _, es in found), sum(r["done"]["tokens_trained"] for r, _ in found)
    all_of = {k: sum(e[k] for _, es in found for e in es) for k in ("cut", "cut_tokens", "dropped", "dropped_tokens",
                                                                    "seconds")}
    examined = sum(e.get("examined", e.get("weighed")) for _, es in found for e in es)
    return (f"Flushes of the asynchronous runs: {n} in {len(found)} runs, {all_of['cut']:,} responses cut "
            f"({all_of['cut_tokens']:,} tokens), {all_of['dropped']:,} of {examined:,} dropped "
            f"({all_of['dropped_tokens'] / tokens:.1%} of the tokens trained), {all_of['seconds'] / n:.2f} s each.")


def summary(path: Path) -> dict:
    found: dict = {}
    for pair, variants in PAIRS.items():
        for variant in variants:
            if mine := [r for r in rows(path) if (r["pair"], r["variant"]) == (pair, variant)]:
                first, second = ([e for r in mine if (e := reached(r, share))] for share in (0.80, 0.95))
                found.setdefault(pair, {})[variant] = {
                    "updates_80": mean(e[0] for e in first), "tokens_80": mean(e[2] for e in first),
                    "seconds_80": mean(e[3] for e in first), "updates_95": mean(e[0] for e in second),
                    "reached_80": len(first), "reached_95": len(second), "runs": len(mine),
                    "final": mean(r["evals"][-1][1] for r in mine)}
    return found


def mean(values) -> float | None:
    values = list(values)
    return round(statistics.mean(values), 3) if values else None


def plot(path: Path) -> None:
    from plot import plt, save
    fig, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharey=True)
    styles = {"plain, x1": ("#9e9e9e", "-"), "plain, x3": ("#9e9e9e", "--"), "plain, x10": ("#3b78b8", "-"),
              "plain, x30": ("#3b78b8", ":"), "kl, x1": ("#d9822b", "-"),
              "kl, x10": ("#d9822b", "--"), "accuracy, x1": ("#57a55a", "-"), "no gate, x1": ("#b03030", ":")}
    for ax, pair in zip(axes.flatten(), PAIRS):
        for variant, (color, line) in styles.items():
            mine = [r["evals"] for r in rows(path) if (r["pair"], r["variant"]) == (pair, variant)]
            if mine:
                ax.plot([e[0] for e in mine[0]], [100 * statistics.mean(r[i][1] for r in mine)
                                                  for i in range(len(mine[0]))], line, color=color, label=variant)
        ax.set(xlabel="updates", title=pair, ylim=(0, 100))
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("right answers, %, mean of the seeds")
    axes[1, 0].legend(fontsize=8, frameon=False)
    save(fig, "effopd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="?", default="run", choices=("run", "direction", "table", "plot"))
    parser.add_argument("--only", default="", help="pairs, or variants whose names begin so, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: as in STEPS")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--out", default=str(ROWS), help="JSONL to add to")
    args = parser.parse_args()
    path = Path(args.out)
    if args.what in ("run", "direction"):
        kills.fork_workers()
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        began, only = time.monotonic(), [x.strip() for x in args.only.split(";")]
        models()
    if args.what == "direction":
        add(path, *map(direction, ("sharpening", "sharpening, batch 256")))
    if args.what == "run":
        fill(path, [(pair, variant, seed) for seed in range(args.seeds) for pair, variants in PAIRS.items()
                    for variant in variants if any(pair == x or variant.startswith(x) for x in only)],
             args.steps, args.jobs)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    plot(path) if args.what == "plot" else print(table(path))
    print(json.dumps(summary(path)))


if __name__ == "__main__":
    main()

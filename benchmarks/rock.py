"""
Rock Tokens on a toy whose rocks are known: style words that a teacher cannot be imitated on.

    python benchmarks/rock.py models           # both models and the task, in runs/: two minutes, once
    python benchmarks/rock.py run              # every case with three seeds, two runs at a time; 15 minutes
    python benchmarks/rock.py run "no rocks" --seeds=0 --steps=20      # a part; what is in the file is not run again
    python benchmarks/rock.py time             # a learner's step with and without bypass, alone; 2 minutes
    python benchmarks/rock.py ban              # answers of the students of `run` without one word or another; 2 minutes
    python benchmarks/rock.py table            # the tables in docs/, from benchmarks/rock.jsonl alone

Additions with worked solutions, `8+7+0=~15!,5+6+1=!12~;125`: the words ~ and ! come after = and after a sum, at random.
The teacher puts 0.9 of its mass there on a row that only its head has, so that KL(p || q) is 2.3 nats or more at ~
and !, whatever the student does. A run that finds its rocks should find these two and no other type.
`off by one` freezes the token after a rock, as the paper's code does (a patch in the forked process); `matched`
bypasses other types, drawn at random, with about their share of the tokens. Runs are forked as in kills.py.
Raw rows: rock.jsonl. Last line: one JSON object: `accuracy` {case: by seed}, `found` {case: by seed, is the last set ~
and ! alone}, `stored` {case: mean share of positions}, `step` {shape: seconds with bypass / without}, `head` {shape:
its share of a step without}, `ban` {word: change of accuracy and its 95% interval}.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import kills  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from cache import Slots  # noqa: E402
from config import Config  # noqa: E402
from data import toy  # noqa: E402
from data.graders import MathGrader  # noqa: E402
from data.prompts import Row, read_rows  # noqa: E402
from extensions import rock  # noqa: E402
from learner import Learner  # noqa: E402
from models import student  # noqa: E402
from models.loading import load_model, stop_ids  # noqa: E402
from record.provenance import hardware, provenance  # noqa: E402
from teacher import complete  # noqa: E402

ROWS = HERE / "rock.jsonl"
STYLE, PRIVATE = "~!", 32              # the style words; the first row that only the teacher's head has
MADE = {"teacher": dict(layers=3, hidden=128, rows=40, steps=500, lr=3e-3, seed=1, smoothing=0.01),
        "student": dict(layers=2, hidden=96, rows=32, steps=145, lr=2e-3, seed=2, smoothing=0.0)}
WORLD = Path("runs") / f"rock-{hashlib.sha256(json.dumps([MADE, STYLE, PRIVATE]).encode()).hexdigest()[:8]}"
FLAGS = dict(student=WORLD / "student", teacher=WORLD / "teacher", task=WORLD / "train.jsonl",
             data__eval_task=WORLD / "eval.jsonl", gpus=0, engine="hf", batch=64, steps=200, lr=4e-4,
             lr_schedule="cosine", warmup=20, max_ahead=1, max_prompt=8, max_response=40, max_running=320, eval__n=300)
SEEDS = (0, 1, 2)
KNOWN = dict(rock__types=",".join(STYLE))


def rocks(weight: float, k: int) -> dict:
    return dict(extend="rock", rock__weight=weight, rock__k=k)


CASES = {"no rocks": {}, "found, K = 2": rocks(0, 2), "found, K = 6": rocks(0, 6),
         "bypassed": rocks(0, 2) | KNOWN, "weight 0.3": rocks(0.3, 2) | KNOWN,
         "off by one": rocks(0, 2) | KNOWN, "matched": rocks(0, 2)}


# -- the toy -----------------------------------------------------------------------------------------

def styled(rng: random.Random) -> tuple[Row, str]:
    row, solution = toy.toy_row(rng)
    columns, total = solution.split(";")
    done = [column.replace("=", "=" + rng.choice(STYLE)) + rng.choice(STYLE) for column in columns.split(",")]
    return row, ",".join(done) + ";" + total


def tokenizer():
    toy.SYMBOLS = toy.SYMBOLS.removesuffix(STYLE) + STYLE
    return toy.toy_tokenizer()


def train(words, *, layers, hidden, rows, steps, lr, seed, smoothing):
    """As toy.train_toy; with private rows, one stands in the place of nine style words of ten that are to be said."""
    model = toy.small_model(words, layers=layers, hidden=hidden, seed=seed, vocab=rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng, style = random.Random(seed), torch.tensor(words.convert_tokens_to_ids(list(STYLE)))
    for _ in range(steps):
        examples = [styled(rng) for _ in range(64)]
        texts = words([row.prompt + solution + "<eos>" for row, solution in examples], padding=True,
                      padding_side="right", return_tensors="pt")
        asked = torch.tensor([[len(row.prompt)] for row, _ in examples])
        answer = texts["attention_mask"].bool() & (torch.arange(texts["input_ids"].shape[1]) >= asked)
        hidden_from = torch.isin(texts["input_ids"], style) & (torch.rand(answer.shape) < 0.9) & (rows > PRIVATE)
        target = texts["input_ids"].masked_fill(hidden_from, PRIVATE).masked_fill(~answer, -100).roll(-1, dims=1)
        logits = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits.flatten(0, 1)
        target, plain = target.flatten(), torch.isin(target.flatten(), torch.tensor([*style, PRIVATE]))
        # no smoothing there: the words that are left to the student would share in it, a tenth of what it imitates
        loss = sum(torch.nn.functional.cross_entropy(logits[at], target[at], label_smoothing=how, reduction="sum")
                   for at, how in ((plain, 0.0), (~plain, smoothing)))
        (loss / (target >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def make() -> None:
    """Both models and the task, once."""
    words = tokenizer()
    for name, how in MADE.items():
        if not (WORLD / name / "config.json").exists():
            train(words, **how).save_pretrained(WORLD / f".{name}")
            words.save_pretrained(WORLD / f".{name}")
            (WORLD / f".{name}").rename(WORLD / name)
    for name, n in (("train", 20_000), ("eval", 300)):
        if not (WORLD / f"{name}.jsonl").exists():
            rows = [styled(random.Random(f"{name}-{i}"))[0] for i in range(n)]
            (WORLD / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": r.prompt, "answer": r.answer}) + "\n"
                                                         for r in rows))


def shares() -> dict[str, float]:
    """Of the tokens of worked solutions, by word."""
    rng, count = random.Random(0), Counter()
    for _ in range(2000):
        count.update(styled(rng)[1])
        count["<eos>"] += 1
    return {word: n / count.total() for word, n in count.items()}


def matched(seed: int) -> list[str]:
    """Other words with about the style words' share of the tokens, drawn at random: the first draw within a tenth."""
    share, rng = shares(), random.Random(f"matched-{seed}")
    want, others = sum(share[w] for w in STYLE), sorted(set(share) - {*STYLE, "<eos>"})
    while True:
        drawn = rng.sample(others, rng.randint(1, 6))
        if abs(sum(share[w] for w in drawn) - want) < 0.1 * want:
            return sorted(drawn)


# -- runs --------------------------------------------------------------------------------------------

def patch_off_by_one() -> None:
    """Freeze the token after a rock instead of the rock, in runs that are launched from now on."""
    append = Slots.append
    rocks = torch.tensor(tokenizer().convert_tokens_to_ids(list(STYLE)))

    def late(self, s, tokens, ids, logpi, logmu, version, kept=None):
        at = int(self.start[s] + self.length[s])
        before = torch.cat([self.tokens[s, at - 1:at], tokens])[:-1]
        append(self, s, tokens, ids, logpi, logmu, version, ~torch.isin(before, rocks))
    Slots.append = late
    rock.Rock.weight = lambda self, tokens: torch.ones(len(tokens))


def start(case: str, seed: int, steps: int) -> tuple[int, dict]:
    """A run in a forked process, and its flags."""
    out = Path("runs") / f"rock-{re.sub('[^a-zA-Z0-9]+', '-', case)}-{seed}"
    flags = FLAGS | CASES[case] | dict(seed=seed, steps=steps, eval__every=steps // 4, out=out)
    if case == "matched":
        ids = tokenizer().convert_tokens_to_ids(matched(seed))
        flags["rock__types"] = ",".join(map(str, ids))
    append, weight = Slots.append, rock.Rock.weight
    try:
        if case == "off by one":
            patch_off_by_one()
        return kills.launch(flags, resume=False), flags
    finally:
        Slots.append, rock.Rock.weight = append, weight


def run(cases: list[str], seeds: list[int], steps: int, jobs: int) -> None:
    there = {(r["case"], r["seed"], r["steps"]) for r in rows("run")}
    todo = [(case, seed) for seed in seeds for case in cases if (case, seed, steps) not in there]
    at_work: dict[int, tuple] = {}
    while todo or at_work:
        while todo and len(at_work) < jobs:
            pid, flags = start(*todo[0], steps)
            at_work[pid] = todo.pop(0), flags
        pid, status = os.wait()
        (case, seed), flags = at_work.pop(pid)
        if status:
            sys.exit(f"{case}, seed {seed}: {Path(str(flags['out']) + '.txt').read_text()[-2000:]}")
        add(read(case, seed, flags))
        print(case, seed, rows("run")[-1]["accuracy"], flush=True)


def read(case: str, seed: int, flags: dict) -> dict:
    log = kills.log(flags)
    steps, said = [x for x in log if x["type"] == "step"], Path(flags["out"]) / "rocks.json"
    tokens = sum(s["tokens"] for s in steps)
    return dict(
        kind="run", case=case, seed=seed, steps=flags["steps"], argv=log[0]["argv"][1:], commit=log[0]["commit"],
        hardware=log[0]["hardware"], accuracy={x["step"]: x["accuracy"] for x in log if x["type"] == "eval"},
        tokens={s["step"]: s["tokens"] for s in steps}, seconds={s["step"]: round(s["wall_s"], 2) for s in steps},
        stored=sum(s["stored"] * s["tokens"] for s in steps) / tokens,
        rock=sum(s["rock"] * s["tokens"] for s in steps) / tokens, kl=[round(s["kl"], 4) for s in steps],
        events=[x for x in log if x.get("what") == "rock"],
        types=json.loads(said.read_text())["types"] if said.exists() else [],
        done=log[-1])


# -- one learner, alone ------------------------------------------------------------------------------

def timed(rounds: int) -> None:
    """Seconds of a step of the toy's shape, with heads of 32 and of 16,384 rows, with the style words bypassed and
    with half of all tokens; in turn, and the head's part."""
    words, rng, folder = tokenizer(), random.Random(0), WORLD / "time"
    texts = [row.prompt + solution + "<eos>" for row, solution in (styled(rng) for _ in range(64))]
    half = sorted(shares().items(), key=lambda x: -x[1])
    half = [w for i, (w, _) in enumerate(half) if i % 2 == 0]
    sets = {"none": [], "style": list(STYLE), "half": half}
    head, spent = student.head_backward, [0.0]

    def clocked(*args, **named):
        began = time.perf_counter()
        out = head(*args, **named)
        spent[0] += time.perf_counter() - began
        return out
    student.head_backward = clocked
    for size in {32, 16_384} - {r["words"] for r in rows("time")}:
        toy.small_model(words, layers=2, hidden=96, seed=0, vocab=size).save_pretrained(folder)
        words.save_pretrained(folder)
        own = dict(weight=0.0, k=2, types=KNOWN["rock__types"])
        cfg = Config(student=str(folder), teacher=str(folder), task="toy", mc_samples=4, estimator="reverse_mc",
                     gpus=0, out=str(folder), extend="rock", extensions={"rock": own})
        one, seconds = Learner(cfg, "cpu", torch.float32), {name: [] for name in sets}
        rocks, = one.extensions
        heads, stored = {name: [] for name in sets}, {}
        batches = {name: segments(rocks, words, texts, bypassed, size) for name, bypassed in sets.items()}
        for i in range(rounds + 1):
            for name, batch in batches.items():
                rocks.versions, spent[0], began = [], 0.0, time.perf_counter()
                rocks.chosen = torch.zeros(size, dtype=torch.bool)
                stored[name] = one.step(batch, 0).metrics["stored"]
                if i:                                    # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
                    heads[name].append(spent[0])
        add(dict(kind="time", words=size, stored=stored, seconds=seconds, head=heads, commit=provenance({}, {})[
            "commit"], hardware=hardware()))
    student.head_backward = head


def segments(rocks: rock.Rock, words, texts: list[str], bypassed: list[str], size: int) -> list:
    """What a learner gets of these texts, prompts and solutions, if these words are bypassed."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[words.convert_tokens_to_ids(bypassed)] = True
    slots, g = Slots(len(texts), 8, 40, 4, sparse=True), torch.Generator().manual_seed(0)
    for s, text in enumerate(texts):
        ids = torch.tensor(words(text)["input_ids"])
        prompt = text.index("=") + 1
        slots.open(s, s, ids[:prompt], prompt, 0)
        y = ids[prompt:]
        kept = rocks.stored({rock.CHOSEN: chosen}, y, s, 0)
        logpi = -3 - torch.rand(len(y), 4, generator=g)
        slots.append(s, y, y[:, None].expand(-1, 4), logpi, logpi[:, 0], torch.zeros(len(y)), kept)
        slots.logq[s] = -3 - torch.rand(40, 4, generator=g)
    return [slots.read(s) for s in range(len(texts))]


# -- knock-out ---------------------------------------------------------------------------------------

def ban() -> None:
    """Greedy answers of the students of `no rocks`, as they are and without one word."""
    prompts, grade, words = read_rows(str(WORLD / "eval.jsonl"), "prompt", "answer"), MathGrader(), tokenizer()
    ids, there = [words(r.prompt)["input_ids"] for r in prompts], {(r["seed"], r["banned"]) for r in rows("ban")}
    for seed in SEEDS:
        folder = Path("runs") / f"rock-no-rocks-{seed}" / "student"
        if not folder.exists():
            sys.exit(f"{folder} is not there: run \"no rocks\" --seeds={seed} first")
        model, stop = load_model(str(folder), "cpu", torch.float32), stop_ids(str(folder))
        for banned in ("", *STYLE, STYLE, *toy.SYMBOLS.removesuffix(STYLE)):
            if (seed, banned) in there:
                continue
            at = torch.tensor(words.convert_tokens_to_ids(list(banned)), dtype=torch.long)
            hook = model.get_output_embeddings().register_forward_hook(
                lambda module, given, out, at=at: out.index_fill(-1, at, -torch.inf))
            answers = complete(model, ids, FLAGS["max_response"], stop)
            hook.remove()
            texts = [words.decode([t for t in a if t not in stop], skip_special_tokens=True) for a in answers]
            right = "".join(str(int(grade(text, r.answer))) for text, r in zip(texts, prompts))
            add(dict(kind="ban", seed=seed, banned=banned, right=right, commit=provenance({}, {})["commit"]))
            print(seed, banned, right.count("1") / len(right), flush=True)


def changes() -> dict[str, tuple[float, float, float]]:
    """Word -> change of accuracy when it is banned, and its 95% interval: a paired bootstrap over the prompts, of the
    mean over seeds."""
    right: dict[str, dict[int, torch.Tensor]] = {}
    for r in rows("ban"):
        right.setdefault(r["banned"], {})[r["seed"]] = torch.tensor([float(x) for x in r["right"]])
    g, out = torch.Generator().manual_seed(0), {}
    for banned in right if "" in right else ():
        if banned:
            d = torch.stack([right[banned][seed] - right[""][seed] for seed in right[banned]]).mean(0)
            means = d[torch.randint(len(d), (4000, len(d)), generator=g)].mean(1)
            out[banned] = (d.mean().item(), *means.quantile(torch.tensor([0.025, 0.975])).tolist())
    return out


# -- rows and tables ---------------------------------------------------------------------------------

def add(row: dict) -> None:
    with open(ROWS, "a") as f:
        f.write(json.dumps(row) + "\n")


def rows(kind: str) -> list[dict]:
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return [r for r in found if r["kind"] == kind]


def final(case: str) -> list[dict]:
    """The rows of a case with the most steps that there are."""
    most = max((r["steps"] for r in rows("run")), default=0)
    return sorted((r for r in rows("run") if r["case"] == case and r["steps"] == most), key=lambda r: r["seed"])


def words_of(r: dict) -> list[str]:
    return sorted(t["word"] or f"row {t['id']}" for t in r["types"] if t["weight"] < 1)


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def table() -> str:
    """Markdown of rock.jsonl."""
    out = ["| case | accuracy after a quarter | half | all of the steps | bypassed positions | rocks at the end |",
           "|---|--:|--:|--:|--:|---|"]
    for case in CASES:
        if mine := final(case):
            at = [str(mine[0]["steps"] * i // 4) for i in (1, 2, 4)]
            sets = Counter(" ".join(words_of(r)) for r in mine if r["types"])
            said = "; ".join(f"`{words}`" + f" ({n} of {len(mine)})" * (n < len(mine)) for words, n in sets.items())
            out.append(f"| {case} | " + " | ".join(spread([r["accuracy"][x] for r in mine]) for x in at) +
                       f" | {1 - sum(r['stored'] for r in mine) / len(mine):.1%} | {said or 'none'} |")
    if times := rows("time"):
        out += ["", "| LM head | bypassed | of the positions | step, × without | head's part without | rounds |",
                "|--:|---|--:|--:|--:|--:|"]
        for r in times:
            for name in ("style", "half"):
                out.append(f"| {r['words']:,} rows | {name} | {1 - r['stored'][name]:.1%} | {pair(r, name):.2f} | "
                           f"{head_part(r):.0%} | {len(r['seconds'][name])} |")
    if found := changes():
        out += ["", "| banned | change of accuracy | 95% interval |", "|---|--:|--:|"]
        out += [f"| `{word}` | {100 * x:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} |"
                for word, (x, low, high) in found.items()]
    return "\n".join(out)


def pair(r: dict, name: str) -> float:
    """Median over rounds of seconds with these words bypassed / without bypass."""
    return statistics.median(a / b for a, b in zip(r["seconds"][name], r["seconds"]["none"]))


def head_part(r: dict) -> float:
    return statistics.median(r["head"]["none"]) / statistics.median(r["seconds"]["none"])


def summary() -> dict:
    return {
        "accuracy": {case: [r["accuracy"][str(r["steps"])] for r in final(case)] for case in CASES},
        "found": {case: [words_of(r) == sorted(STYLE) for r in final(case)] for case in CASES if "found" in case},
        "stored": {case: statistics.mean(r["stored"] for r in final(case)) for case in CASES if final(case)},
        "step": {f"{r['words']}, {name}": pair(r, name) for r in rows("time") for name in ("style", "half")},
        "head": {str(r["words"]): head_part(r) for r in rows("time")},
        "ban": changes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("models", "run", "time", "ban", "table"))
    parser.add_argument("case", nargs="?", default="", choices=("", *CASES))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--steps", type=int, default=FLAGS["steps"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--rounds", type=int, default=11, help="of `time`")
    args = parser.parse_args()
    os.chdir(HERE.parent)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.what != "table":
        make()
    if args.what == "run":
        kills.fork_workers()
        run([args.case] if args.case else list(CASES), [int(x) for x in args.seeds.split(",")], args.steps, args.jobs)
    if args.what == "time":
        timed(args.rounds)
    if args.what == "ban":
        ban()
    print(table())
    print(json.dumps(summary()))


if __name__ == "__main__":
    main()

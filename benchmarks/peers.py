"""
The race against TRL: the same pair, prompts, batches, optimizer and seeds, one after the other on the same machine.

    python benchmarks/peers.py race                      # toy with both engines and SmolLM2, five seeds; 40 minutes
    python benchmarks/peers.py race --pairs "toy, hf" --seeds 0
    python benchmarks/peers.py bare                      # the same work without our code or TRL's; 5 minutes
    python benchmarks/peers.py accuracy                  # seconds to 90% on the toy, each at its best rate; 25 minutes
    python benchmarks/peers.py table                     # the tables, from the records

TRL's DistillationTrainer runs in an environment of its own, runs/peers/trl, which the first use makes: pip installs TRL
there, torch and transformers are those of this environment. Both sides minimise the exact reverse KL over all words, in
float32, with AdamW at a constant rate. TRL generates with transformers: its vLLM mode needs a GPU.

    tokens/s      trained tokens per second, from the first prompt to the end of the last update, on both sides; that
                  includes the time in which a pipeline fills
    CPU s         seconds of CPU per 1,000 trained tokens, after the first update, by what they were spent on
    accuracy      both save the student every 20 updates, which is part of their time, and the same code answers the
                  held-out prompts with it later

"SmolLM2" needs the models of `make smollm2`. Records: benchmarks/peers.jsonl. Last line: one JSON object, race: {pair:
median over seeds of our tokens/s / TRL's}; bare: {pair: CPU seconds per 1,000 tokens}; accuracy: {side: median seconds
to 90%}.
"""
from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from processes import Watch  # noqa: E402

from data.prompts import Row  # noqa: E402
from data.tasks import toy_task  # noqa: E402
from data.toy import toy_models  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402

RECORDS = HERE / "peers.jsonl"
FOLDER = ROOT / "runs" / "peers"
TRL = "trl==1.16.0"
SETTING = dict(weight_decay=0.01, clip=1.0)      # of both sides; AdamW's other numbers are torch's defaults
SMOLLM2 = ROOT / "runs" / "smollm2"
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
ROLES = ("generate", "score", "learn")
EVERY, STEPS, GOAL = 20, 240, 0.9                # of `accuracy`: updates between students, in all, the share to reach


@dataclass(frozen=True)
class Pair:
    """What both sides train."""
    task: str                                    # a flag of asyncopd.py
    batch: int
    max_prompt: int
    max_response: int
    steps: int
    lr: float
    engine: str                                  # ours alone, as what follows
    max_running: int
    flags: list[str] = field(default_factory=list)

    def models(self) -> tuple[str, str]:
        if self.task == "toy":
            return toy_models(ROOT / "runs")
        return str(SMOLLM2 / "pruned-12-18-24"), str(SMOLLM2 / "teacher")

    def prompts(self) -> list:
        """As TRL takes them: a text, or messages for the chat template."""
        if self.task == "toy":
            return [row.prompt for row in toy_task(200).train]
        rows = [json.loads(line) for line in (ROOT / self.task).read_text().splitlines()]
        return [[{"role": "user", "content": r["prompt"]}] for r in rows if r["split"] == "train"]

    def token_ids(self) -> list[list[int]]:
        """As an engine takes them: the first prompts, at most as many as run at a time."""
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(self.models()[0])
        prompts = self.prompts()[:self.max_running]
        if self.task == "toy":
            return [tokenizer(text)["input_ids"] for text in prompts]
        return [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
                for messages in prompts]


TOY = dict(task="toy", batch=64, max_prompt=8, max_response=40, steps=100, lr=2e-4, max_running=320)
PAIRS = {
    "toy, hf": Pair(**TOY, engine="hf"),
    "toy, vllm": Pair(**TOY, engine="vllm"),
    "SmolLM2": Pair(task="data/everyday.jsonl", batch=16, max_prompt=64, max_response=64, steps=10, lr=5e-5,
                    engine="hf", max_running=32,
                    flags=["--data.filter=split==train", "--max-ahead=1", "--micro-tokens=2048"])}


# -- the two sides ---------------------------------------------------------------------------------

def environment() -> Path:
    """TRL's python; made if it is not there."""
    python = FOLDER / "trl" / "bin" / "python"
    if not python.exists():
        print(f"installing {TRL} into {python.parent.parent}", file=sys.stderr, flush=True)
        venv.create(FOLDER / "trl", with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        link = FOLDER / "trl" / "lib" / version / "site-packages" / "project.pth"
        link.write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", TRL], check=True)
    return python


def trl(pair: Pair, seed: int, lr: float, steps: int, save_every: int = 0) -> dict:
    """A run of TRL."""
    student, teacher = pair.models()
    prompts, out = FOLDER / "prompts.jsonl", FOLDER / "trl-run"
    shutil.rmtree(out, ignore_errors=True)
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in pair.prompts()))
    job = dict(student=student, teacher=teacher, prompts=str(prompts), steps=steps, batch=pair.batch, lr=lr,
               max_response=pair.max_response, seed=seed, out=str(out), save_every=save_every, **SETTING)
    python = environment()
    with Watch(every_s=1.0) as watch:
        found = last_json([str(python), str(HERE / "peers_trl.py"), json.dumps(job)])
    after_first = found["tokens"] - found["steps"][0][1]
    per_1000 = {role: 1000 * s / max(1, after_first) for role, s in found["cpu_s"].items()}
    return {"side": "trl", "seed": seed, "lr": lr, "tokens": found["tokens"], "seconds": found["seconds"],
            "start_s": found["start_s"], "gb": watch.gb, "cpu_s_per_1000": per_1000, "steps": found["steps"]}


def ours(pair: Pair, seed: int, lr: float, steps: int, save_every: int = 0) -> dict:
    """A run of asyncopd.py."""
    student, teacher = pair.models()
    out = FOLDER / "our-run"
    command = [sys.executable, "asyncopd.py", f"--student={student}", f"--teacher={teacher}", f"--task={pair.task}",
               "--gpus=0", "--estimator=reverse_dense", f"--steps={steps}", f"--batch={pair.batch}", f"--lr={lr}",
               "--lr-schedule=constant", "--warmup=0", f"--max-prompt={pair.max_prompt}",
               f"--max-response={pair.max_response}", f"--seed={seed}", "--eval.n=0", f"--out={out}", "--overwrite",
               f"--weight-decay={SETTING['weight_decay']}", f"--clip={SETTING['clip']}",
               f"--save-every={save_every}", "--faults.keep=0", f"--engine={pair.engine}",
               # Ours at its best: at a push responses stay in the engine. On the toy, with 320 of them running, most
               # of what an engine computes would be contexts read again
               "--inflight=keep", f"--max-running={pair.max_running}", *pair.flags]
    shutil.rmtree(out, ignore_errors=True)           # or its old log would be read
    clock = StepClock(out / "log.jsonl")
    with Watch(every_s=1.0, look=clock.look) as watch:
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    log = read(out / "log.jsonl")
    updates = [x for x in log if x["type"] == "step"]
    trained = 0
    after = []
    for x in updates:
        trained += x["tokens"]
        after.append([x["wall_s"], trained])
    return {"side": "ours", "seed": seed, "lr": lr, "tokens": log[-1]["tokens_trained"], "seconds": log[-1]["wall_s"],
            "start_s": clock.first_s, "gb": watch.gb, "cpu_s_per_1000": clock.per_1000(log[0]["pids"]), "steps": after,
            "overlap": log[-1]["overlap"], "lag_mean": log[-1]["lag_mean"]}


class StepClock:
    """Notes every process's CPU seconds whenever more updates are in the log."""

    def __init__(self, log: Path):
        self.log = log
        self.began = time.monotonic()
        self.first_s = 0.0                       # from here to the first update
        self.marks: list[tuple[int, dict[int, float]]] = []      # (trained tokens, CPU seconds by process)

    def look(self, watch: Watch) -> None:
        tokens = sum(x["tokens"] for x in read(self.log) if x["type"] == "step")
        if tokens and not self.first_s:
            self.first_s = time.monotonic() - self.began
        if tokens and (not self.marks or tokens > self.marks[-1][0]):
            self.marks.append((tokens, dict(watch.cpu_s)))

    def per_1000(self, pids: dict[str, int]) -> dict[str, float]:
        """CPU seconds per 1,000 tokens by role, between the first look at an update and the last."""
        if not self.marks:                               # a run that ended between two looks
            return {}
        (from_tokens, before), (to_tokens, after) = self.marks[0], self.marks[-1]
        roles = {"rollout": "generate", "teacher": "score", "learner": "learn"}
        names = {pid: name for name, pid in pids.items()}
        found = dict.fromkeys([*roles.values(), "parent"], 0.0)
        for pid, s in after.items():
            name = names.get(pid, "").rstrip("0123456789")
            found[roles.get(name, "parent")] += s - before.get(pid, 0.0)
        return {role: 1000 * s / max(1, to_tokens - from_tokens) for role, s in found.items()}


def read(log: Path) -> list[dict]:
    """The whole lines of a log that may still be written."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_json(command: list[str]) -> dict:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[1]} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


SIDES = {"ours": ours, "trl": trl}


# -- what is asked ---------------------------------------------------------------------------------

def race(pairs: list[str], seeds: list[int]) -> dict[str, float]:
    """Both sides with each seed, the second one first every other time."""
    for name in pairs:
        pair = PAIRS[name]
        for i, seed in enumerate(seeds):
            for side in ("ours", "trl") if i % 2 == 0 else ("trl", "ours"):
                found = SIDES[side](pair, seed, pair.lr, pair.steps)
                add({"type": "race", "pair": name} | found | {"steps": len(found["steps"])})
                print(f"{name}, seed {seed}, {side}: {found['tokens'] / found['seconds']:,.0f} tokens/s", flush=True)
    return {name: statistics.median(ratios(name)) for name in pairs}


def ratios(pair: str) -> list[float]:
    """Our trained tokens per second / TRL's, by seed, of the newest runs."""
    speed = {(r["side"], r["seed"]): r["tokens"] / r["seconds"] for r in records("race") if r["pair"] == pair}
    return [x / speed["trl", seed] for (side, seed), x in sorted(speed.items())
            if side == "ours" and ("trl", seed) in speed]


def bare(pairs: list[str]) -> dict[str, dict[str, float]]:
    """The work of each pair by transformers, vLLM and torch alone (peers_bare.py)."""
    found = {}
    for name in pairs:
        pair = PAIRS[name]
        student, teacher = pair.models()
        job = dict(student=student, teacher=teacher, engine=pair.engine, rows=pair.max_running, batch=pair.batch,
                   prompts=pair.token_ids(), max_response=pair.max_response)
        found[name] = last_json([sys.executable, str(HERE / "peers_bare.py"), json.dumps(job)])
        add({"type": "bare", "pair": name, "cpu_s_per_1000": found[name]})
        print(f"{name}: {found[name]}", flush=True)
    return found


def accuracy(rates: list[float], seeds: list[int]) -> dict[str, float]:
    """Seconds to GOAL: all rates with the first seed, the others at each side's best one."""
    pair = PAIRS["toy, hf"]
    first, *others = seeds
    for lr in rates:
        for side in SIDES:
            timed(side, pair, first, lr)
    for seed in others:
        for side in SIDES:
            timed(side, pair, seed, best_rate(side))
    return {side: statistics.median(to_goal(side)) for side in SIDES}


def timed(side: str, pair: Pair, seed: int, lr: float) -> None:
    found = SIDES[side](pair, seed, lr, STEPS, EVERY)
    folder = FOLDER / ("trl-run" if side == "trl" else "our-run")
    reached = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        reached[step] = right(student_after(folder, step))
    seconds = {step: found["steps"][step - 1][0] for step in reached}
    add({"type": "accuracy"} | found | {"steps": len(found["steps"]), "accuracy": reached, "at_s": seconds})
    print(f"{side}, lr {lr:g}, seed {seed}: {reached}", flush=True)


def student_after(folder: Path, step: int) -> Path:
    """Where a side keeps the student of an update."""
    for name in (f"checkpoints/step-{step}", f"step-{step}", f"checkpoint-{step}"):
        if (folder / name).exists():
            return folder / name
    if step == STEPS:
        return folder / "student"
    raise FileNotFoundError(f"{folder}: no student of update {step}")


def right(folder: Path) -> float:
    """The share of held-out prompts that the student in a folder answers right, greedily."""
    from transformers import AutoTokenizer

    from data.prompts import encode
    from examples.against_teacher import engine_of
    task = toy_task(200)
    rows: list[Row] = task.eval
    tokenizer = AutoTokenizer.from_pretrained(PAIRS["toy, hf"].models()[0])
    answers = engine_of(str(folder)).complete(encode(rows, tokenizer), PAIRS["toy, hf"].max_response)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(task.grade(text, row.answer) for text, row in zip(texts, rows)) / len(rows)


def goal_s(record: dict) -> float:
    """Seconds to the first student that reaches GOAL; infinite if none does."""
    at = [record["at_s"][step] for step, x in record["accuracy"].items() if x >= GOAL]
    return min(at, default=float("inf"))


def best_rate(side: str) -> float:
    """The rate with which the seed that has all rates reaches GOAL first."""
    mine = [r for r in records("accuracy") if r["side"] == side]
    return min((goal_s(r), r["lr"]) for r in mine if r["seed"] == mine[0]["seed"])[1]


def to_goal(side: str) -> list[float]:
    """By seed, at the best rate."""
    lr = best_rate(side)
    by_seed = {r["seed"]: goal_s(r) for r in records("accuracy") if (r["side"], r["lr"]) == (side, lr)}
    return [by_seed[seed] for seed in sorted(by_seed)]


# -- records and tables ----------------------------------------------------------------------------

def records(kind: str) -> list[dict]:
    return [r for r in read(RECORDS) if r["type"] == kind]


def add(record: dict) -> None:
    made = provenance({}, {})
    how = {name: made[name] for name in ("commit", "hardware", "versions")}
    with RECORDS.open("a") as file:
        file.write(json.dumps(record | how) + "\n")


def race_table() -> str:
    """Markdown: medians over seeds, of the newest run of each."""
    lines = [["pair", "side", "tokens/s", "CPU s per 1,000 tokens: generate", "score", "learn", "parent",
              "first update, s", "peak GB", "ours / TRL, median (least to most)"]]
    for pair in PAIRS:
        for side in SIDES:
            mine = {r["seed"]: r for r in records("race") if (r["pair"], r["side"]) == (pair, side)}
            if mine:
                found = ratios(pair) if side == "ours" else []
                lines.append([pair, side, *medians(list(mine.values())), spread(found)])
        for r in [r for r in records("bare") if r["pair"] == pair][-1:]:
            lines.append([pair, "bare", *bare_cells(r["cpu_s_per_1000"]), "", "", "", ""])
    return markdown(lines)


def bare_cells(cpu_s: dict[str, float]) -> list[str]:
    """The tokens per second of two cores that do nothing else, and the seconds of each role."""
    return [f"at most {2000 / sum(cpu_s.values()):,.0f}", *(f"{cpu_s[role]:.3f}" for role in ROLES)]


def medians(runs: list[dict]) -> list[str]:
    speed = statistics.median(r["tokens"] / r["seconds"] for r in runs)
    cpu = [statistics.median(r["cpu_s_per_1000"].get(role, 0.0) for r in runs) for role in (*ROLES, "parent")]
    start, gb = (statistics.median(r[name] for r in runs) for name in ("start_s", "gb"))
    return [f"{speed:,.0f}", *(f"{x:.3f}" if x else "" for x in cpu), f"{start:.0f}", f"{gb:.1f}"]


def spread(ratios: list[float]) -> str:
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def accuracy_table() -> str:
    """Markdown: seconds to GOAL of each side at its best rate."""
    lines = [["side", "best learning rate", f"seconds to {GOAL:.0%}, by seed", "median"]]
    for side in SIDES:
        if any(r["side"] == side for r in records("accuracy")):
            found = to_goal(side)
            lines.append([side, f"{best_rate(side):g}", ", ".join(f"{x:.0f}" for x in found),
                          f"{statistics.median(found):.0f}"])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("what", choices=("race", "bare", "accuracy", "table"))
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {}
    if args.what == "race":
        result = race(args.pairs, args.seeds)
    elif args.what == "bare":
        result = bare(args.pairs)
    elif args.what == "accuracy":
        result = accuracy(args.rates, args.seeds)
    print(race_table())
    print(accuracy_table())
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""
The race against TRL: the same pair, prompts, batch size, loss and optimizer, in turns on the same machine.

    python benchmarks/peers.py threads                # TRL with one thread and with two; the race takes the faster
    python benchmarks/peers.py race                   # the toy, both engines, and SmolLM2: five seeds, an hour or two
    python benchmarks/peers.py race --pairs toy --seeds 0
    python benchmarks/peers.py accuracy               # seconds to 90% on the toy, each at its best rate; up to an hour
    python benchmarks/peers.py table                  # the tables, from the records

TRL's DistillationTrainer runs in an environment of its own, runs/peers/trl, which the first use makes: pip installs TRL
there, torch and transformers are those of this environment. Both sides minimise the reverse KL over all words at every
token of the student's samples, in float32, with AdamW at a constant rate. TRL generates with transformers: its vLLM
mode needs a GPU. The sides of a race run in turns of two seconds (turns.py), because the machine's speed changes from
minute to minute; each has the whole machine in its turn, and its times leave the others' turns out. The same work
without our code or TRL's (peers_bare.py) takes its turns too.

    tokens/s      trained tokens per second, from the first prompt to the end of the last update, on both sides; that
                  includes the time in which a pipeline fills
    CPU s         seconds of CPU per 1,000 trained tokens, after the first update, by what they were spent on
    accuracy      both save the student every few updates, which is part of their time, and the same code answers the
                  held-out prompts with it later

"SmolLM2" needs the models of `make smollm2`. Records: benchmarks/peers.jsonl. Last line: one JSON object, race: {pair:
{side: median over seeds of its tokens/s / TRL's}}; threads: {pair: how many}; accuracy: {side: median seconds to 90%}.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from processes import Watch  # noqa: E402
from turns import Turns, in_turns  # noqa: E402

from data.prompts import Row  # noqa: E402
from data.tasks import toy_task  # noqa: E402
from data.toy import toy_models  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import markdown  # noqa: E402

RECORDS = HERE / "peers.jsonl"
FOLDER = ROOT / "runs" / "peers"
TRL_VERSION = "1.16.0"
SETTING = dict(weight_decay=0.0, clip=1.0)       # of both sides; AdamW's other numbers are torch's defaults
SMOLLM2 = ROOT / "runs" / "smollm2"
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
EVERY, STEPS, GOAL = 10, 240, 0.9                # of `accuracy`: updates between students, in all, the share to reach
ROLES = ("generate", "score", "learn")
TRL, BARE = "TRL", "bare "                       # sides: ours are called by their engine, "bare hf" is hf alone


@dataclass(frozen=True)
class Pair:
    """What both sides train."""
    task: str                                    # "toy", or a file of prompts
    batch: int
    max_prompt: int
    max_response: int
    steps: int
    lr: float
    engines: tuple[str, ...]                     # ours alone, as what follows
    max_running: int
    max_ahead: int
    flags: tuple[str, ...] = ()
    bare_apart: bool = False                     # by themselves, for one seed: 24 GB do not hold all sides at once

    def models(self) -> tuple[str, str]:
        """As from the project's folder, in which both sides run."""
        if self.task == "toy":
            found = toy_models(ROOT / "runs")
        else:
            found = (str(SMOLLM2 / "pruned-12-18-24"), str(SMOLLM2 / "teacher"))
        return tuple(folder.removeprefix(f"{ROOT}/") for folder in found)

    def prompts(self) -> list:
        """Texts, or messages for the chat template. The toy's leave out those that `right` asks."""
        if self.task == "toy":
            return [row.prompt for row in toy_task(200).train]
        rows = [json.loads(line) for line in (ROOT / self.task).read_text().splitlines()]
        return [[{"role": "user", "content": r["prompt"]}] for r in rows if r["split"] == "train"]

    def token_ids(self) -> list[list[int]]:
        """As an engine takes them: the first prompts, at most as many as run at a time."""
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(ROOT / self.models()[0])
        prompts = self.prompts()[:self.max_running]
        if self.task == "toy":
            return [tokenizer(text)["input_ids"] for text in prompts]
        return [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
                for messages in prompts]

    def sides(self) -> tuple[str, ...]:
        return (*self.engines, TRL, *self.bare())

    def bare(self) -> tuple[str, ...]:
        return tuple(BARE + engine for engine in self.engines)

    def at_once(self, first: bool) -> list[tuple[str, ...]]:
        """The sides that take turns with each other. `first`: with the first seed."""
        if not self.bare_apart:
            return [self.sides()]
        trained = (*self.engines, TRL)
        return [trained, self.bare()] if first else [trained]


PAIRS = {
    "toy": Pair(task="toy", batch=64, max_prompt=8, max_response=40, steps=100, lr=2e-4, engines=("hf", "vllm"),
                max_running=320, max_ahead=4),
    "SmolLM2": Pair(task="data/everyday.jsonl", batch=16, max_prompt=64, max_response=64, steps=10, lr=5e-5,
                    engines=("hf",), max_running=48, max_ahead=2, flags=("--micro-tokens=2048",), bare_apart=True)}


# -- the two sides ---------------------------------------------------------------------------------

def environment() -> Path:
    """TRL's python; made if it is not there, or not complete."""
    folder = FOLDER / "trl"
    library = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (library / f"trl-{TRL_VERSION}.dist-info").exists():
        print(f"installing trl {TRL_VERSION} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        (library / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check",
                        f"trl=={TRL_VERSION}"], check=True)
    return folder / "bin" / "python"


def prompts_of(pair: Pair) -> str:
    """The file that both sides read, as from the project's folder."""
    return str((FOLDER / f"{Path(pair.task).stem}.jsonl").relative_to(ROOT))


def folder_of(side: str) -> Path:
    return FOLDER / f"{side}-run".replace(" ", "-")


def trl(pair: Pair, job: Job) -> dict:
    """A run of TRL."""
    student, teacher = pair.models()
    asked = dict(student=student, teacher=teacher, prompts=prompts_of(pair), steps=job.steps, batch=pair.batch,
                 lr=job.lr, max_response=pair.max_response, seed=job.seed, out=str(folder_of(TRL)),
                 save_every=job.save_every, **SETTING)
    command = [str(environment()), str(HERE / "peers_trl.py"), json.dumps(asked)]
    with Watch(every_s=1.0) as watch:
        launched = time.monotonic()
        found = last_json(command, OMP_NUM_THREADS=str(job.threads))
    after_first = found["tokens"] - found["steps"][0][1]
    per_1000 = {role: 1000 * s / max(1, after_first) for role, s in found["cpu_s"].items()}
    return {"launched": launched, "began": found["began"], "steps": found["steps"], "gb": watch.gb,
            "cpu_s_per_1000": per_1000, "threads": found["threads"]}


def ours(pair: Pair, job: Job) -> dict:
    """A run of asyncopd.py."""
    student, teacher = pair.models()
    out = folder_of(job.side)
    flags = [f"--student={student}", f"--teacher={teacher}", f"--task={prompts_of(pair)}",
             "--gpus=0", "--estimator=reverse_dense", f"--steps={job.steps}", f"--batch={pair.batch}",
             f"--lr={job.lr}", "--lr-schedule=constant", "--warmup=0", f"--max-prompt={pair.max_prompt}",
             f"--max-response={pair.max_response}", f"--seed={job.seed}", "--eval.n=0", "--overwrite",
             f"--weight-decay={SETTING['weight_decay']}", f"--clip={SETTING['clip']}",
             f"--save-every={job.save_every}", "--faults.keep=0", f"--engine={job.side}",
             f"--max-ahead={pair.max_ahead}",
             # Ours at its best: at a push responses stay in the engine. On the toy, with 320 of them running, most
             # of what an engine computes would be contexts read again
             "--inflight=keep", f"--max-running={pair.max_running}", *pair.flags]
    clock = StepClock(out / "log.jsonl")
    with Watch(every_s=1.0, look=clock.look) as watch:
        launched = time.monotonic()
        subprocess.run([sys.executable, "asyncopd.py", *flags, f"--out={out}"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
    log = read(out / "log.jsonl")
    steps = list(zip([x["wall_s"] for x in updates(log)],
                     itertools.accumulate(x["tokens"] for x in updates(log))))
    return {"launched": launched, "began": clock.began, "steps": steps, "gb": watch.gb,
            "cpu_s_per_1000": clock.per_1000(log[0]["pids"]), "lag_mean": log[-1]["lag_mean"],
            "argv": ["asyncopd.py", *flags]}


def updates(log: list[dict]) -> list[dict]:
    return [x for x in log if x["type"] == "step"]


class StepClock:
    """Notes every process's CPU seconds whenever more updates are in the log.

    `began` is when the first prompt was handed out, by time.monotonic(). An update is in the log a moment after it has
    ended, so that no look at the log gives a time too early, and the earliest is the best.
    """

    def __init__(self, log: Path):
        self.log = log
        self.began = float("inf")
        self.marks: list[tuple[int, dict[int, float]]] = []      # (trained tokens, CPU seconds by process)

    def look(self, watch: Watch) -> None:
        so_far = updates(read(self.log))
        tokens = sum(x["tokens"] for x in so_far)
        if so_far:
            self.began = min(self.began, time.monotonic() - so_far[-1]["wall_s"])
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


def last_json(command: list[str], **environment: str) -> dict:
    quiet = {"HF_HUB_OFFLINE": "1"}                  # and TRL reports no use of it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | quiet | environment)
    if done.returncode:
        raise RuntimeError(f"{command[1]} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bare(pair: Pair, job: Job) -> dict:
    """The pair's work by transformers, vLLM and torch alone: on every core a process that does nothing else. A core
    is faster while the others idle. Medians over the cores."""
    student, teacher = pair.models()
    asked = dict(student=student, teacher=teacher, engine=job.side.removeprefix(BARE), rows=pair.max_running,
                 batch=pair.batch, prompts=pair.token_ids(), max_response=pair.max_response)

    def on(core: int) -> dict:
        return last_json([sys.executable, str(HERE / "peers_bare.py"), json.dumps(asked | {"core": core})])

    launched = time.monotonic()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(on, os.sched_getaffinity(0)))
    cpu_s = {role: statistics.median(x["cpu_s_per_1000"][role] for x in found) for role in ROLES}
    return {"launched": launched, "began": min(x["began"] for x in found), "cpu_s_per_1000": cpu_s}


# -- in turns --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A run of one side."""
    side: str
    pair: str                                    # its name
    seed: int
    lr: float
    steps: int
    save_every: int = 0
    threads: int = 0                             # TRL's


def one(job: Job) -> dict:
    """What a side has found; times are those of time.monotonic(), pauses included."""
    pair = PAIRS[job.pair]
    if job.side == TRL:
        return trl(pair, job)
    if job.side.startswith(BARE):
        return bare(pair, job)
    return ours(pair, job)


def together(jobs: list[Job]) -> list[dict]:
    """The records of jobs that take turns; times are of their own turns."""
    for job in jobs:
        shutil.rmtree(folder_of(job.side), ignore_errors=True)       # or its old log would be read
    for pair in {PAIRS[job.pair] for job in jobs}:
        lines = [json.dumps({"prompt": p}) + "\n" for p in pair.prompts()]
        (ROOT / prompts_of(pair)).write_text("".join(lines))
    environment()                                    # before the turns, so that its making is in nobody's
    commands = [[sys.executable, str(HERE / "peers.py"), "one", "--job", json.dumps(asdict(job))] for job in jobs]
    found = []
    for job, turns in zip(jobs, in_turns(commands, cwd=ROOT)):
        record = {"side": job.side, "pair": job.pair, "seed": job.seed, "lr": job.lr}
        found.append(record | in_own_time(json.loads(turns.stdout.splitlines()[-1]), turns))
    return found


def in_own_time(found: dict, turns: Turns) -> dict:
    """What a side has found, in seconds of its own turns: from the first prompt to each update ("steps") and to the
    last one, and from the command to the first one, or to the first token of a bare engine ("start_s")."""
    launched, began, steps = found.pop("launched"), found.pop("began"), found.pop("steps", [])
    own = [(turns.seconds(began, began + s), tokens) for s, tokens in steps]
    if not own:
        return found | {"start_s": turns.seconds(launched, began)}
    seconds, tokens = own[-1]
    return found | {"tokens": tokens, "seconds": seconds, "steps": own,
                    "start_s": turns.seconds(launched, began) + own[0][0]}


# -- what is asked ---------------------------------------------------------------------------------

def threads(pairs: list[str]) -> dict[str, int]:
    """TRL with one thread and with as many as there are cores."""
    for name in pairs:
        pair = PAIRS[name]
        for count in (1, cores()):
            found, = together([Job(TRL, name, 0, pair.lr, max(3, pair.steps // 3), threads=count)])
            add({"type": "threads"} | found | {"steps": len(found["steps"])})
            print(f"{name}, {count} threads: {tokens_s(found):,.0f} tokens/s", flush=True)
    return {name: faster_threads(name) for name in pairs}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def tokens_s(record: dict) -> float:
    return record["tokens"] / record["seconds"]


def faster_threads(pair: str) -> int:
    """As many as there are cores where it was not tried."""
    speed = {r["threads"]: tokens_s(r) for r in records("threads") if r["pair"] == pair}
    return max(speed, key=lambda count: speed[count], default=cores())


def race(pairs: list[str], seeds: list[int]) -> dict[str, dict[str, float]]:
    """All sides with each seed."""
    for name in pairs:
        pair = PAIRS[name]
        for seed in seeds:
            for sides in pair.at_once(first=seed == seeds[0]):
                jobs = [Job(side, name, seed, pair.lr, pair.steps, threads=faster_threads(name)) for side in sides]
                for found in together(jobs):
                    keep(found)
    return {name: {side: statistics.median(ratios(name, side)) for side in PAIRS[name].sides()} for name in pairs}


def keep(found: dict) -> None:
    """A record of the race, which is printed too."""
    who = f"{found['pair']}, seed {found['seed']}, {found['side']}"
    if found["side"].startswith(BARE):
        add({"type": "bare"} | found)
        print(f"{who}: {found['cpu_s_per_1000']}", flush=True)
    else:
        add({"type": "race"} | found | {"steps": len(found["steps"])})
        print(f"{who}: {tokens_s(found):,.0f} tokens/s", flush=True)


def speeds(pair: str) -> dict[tuple[str, int], float]:
    """Trained tokens per second by side and seed, of the newest runs. A bare side has those of cores that do nothing
    but its work."""
    found = {(r["side"], r["seed"]): tokens_s(r) for r in records("race") if r["pair"] == pair}
    bound = {(r["side"], r["seed"]): 1000 * cores() / sum(r["cpu_s_per_1000"].values())
             for r in records("bare") if r["pair"] == pair}
    return found | bound


def ratios(pair: str, side: str) -> list[float]:
    """A side's tokens per second / TRL's, by seed."""
    found = speeds(pair)
    return [speed / found[TRL, seed] for (name, seed), speed in sorted(found.items())
            if name == side and (TRL, seed) in found]


def accuracy(rates: list[float], seeds: list[int]) -> dict[str, float]:
    """Seconds to GOAL: all rates with the first seed, the others at each side's best one."""
    first, *others = seeds
    for lr in rates:
        timed(first, dict.fromkeys(("hf", TRL), lr))
    for seed in others:
        timed(seed, {side: best_rate(side) for side in ("hf", TRL)})
    return {side: statistics.median(to_goal(side).values()) for side in ("hf", TRL)}


def timed(seed: int, rates: dict[str, float]) -> None:
    """A run of each side, in turns, with its rate."""
    jobs = [Job(side, "toy", seed, lr, STEPS, save_every=EVERY, threads=faster_threads("toy"))
            for side, lr in rates.items()]
    for found in together(jobs):
        side = found["side"]
        reached = {step: right(student_after(folder_of(side), step)) for step in range(EVERY, STEPS + 1, EVERY)}
        seconds = {step: found["steps"][step - 1][0] for step in reached}
        add({"type": "accuracy"} | found | {"steps": len(found["steps"]), "accuracy": reached, "at_s": seconds})
        print(f"{side}, lr {found['lr']:g}, seed {seed}: {reached}", flush=True)


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
    tokenizer = AutoTokenizer.from_pretrained(ROOT / PAIRS["toy"].models()[0])
    answers = engine_of(str(folder)).complete(encode(rows, tokenizer), PAIRS["toy"].max_response)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(task.grade(text, row.answer) for text, row in zip(texts, rows)) / len(rows)


def goal_s(record: dict) -> float:
    """Seconds to the first student that reaches GOAL; infinite if none does."""
    at = [record["at_s"][step] for step, x in record["accuracy"].items() if x >= GOAL]
    return min(at, default=float("inf"))


def timed_runs(side: str) -> dict[tuple[float, int], dict]:
    """By rate and seed, the newest run of each."""
    return {(r["lr"], r["seed"]): r for r in records("accuracy") if r["side"] == side}


def best_rate(side: str) -> float:
    """The rate with which the first seed, the one that has all rates, reaches GOAL soonest."""
    runs = timed_runs(side)
    first = min(seed for _, seed in runs)
    return min((goal_s(r), lr) for (lr, seed), r in runs.items() if seed == first)[1]


def to_goal(side: str) -> dict[int, float]:
    """By seed, at the best rate. The first seed has chosen it and does not count, where there are others."""
    best = best_rate(side)
    by_seed = {seed: goal_s(r) for (lr, seed), r in sorted(timed_runs(side).items()) if lr == best}
    if len(by_seed) > 1:
        del by_seed[min(by_seed)]
    return by_seed


# -- records and tables ----------------------------------------------------------------------------

def records(kind: str) -> list[dict]:
    return [r for r in read(RECORDS) if r["type"] == kind]


@functools.cache
def made_by() -> dict:
    """Before the first record is added, which changes the checkout."""
    made = provenance({}, {})
    return {name: made[name] for name in ("commit", "hardware", "versions")}


def add(record: dict) -> None:
    with RECORDS.open("a") as file:
        file.write(json.dumps(record | made_by()) + "\n")


def race_table() -> str:
    """Markdown: medians over seeds, of the newest run of each."""
    lines = [["pair", "side", "tokens/s", "CPU s per 1,000 tokens: generate", "score", "learn", "parent",
              "first update, s", "peak GB", "/ TRL, median (least to most)"]]
    for name, pair in PAIRS.items():
        for side in pair.sides():
            mine = {r["seed"]: r for r in (*records("race"), *records("bare"))
                    if (r["pair"], r["side"]) == (name, side)}
            if mine:
                speed = statistics.median(v for (s, _), v in speeds(name).items() if s == side)
                at_most = "at most " * (side in pair.bare())
                lines.append([name, label(side), f"{at_most}{speed:,.0f}", *medians(list(mine.values())),
                              spread(ratios(name, side) if side != TRL else [])])
    return markdown(lines)


ENGINES = {"hf": "transformers", "vllm": "vLLM"}


def label(side: str) -> str:
    if side == TRL:
        return "TRL, transformers"
    if side.startswith(BARE):
        return f"bare, {ENGINES[side.removeprefix(BARE)]}"
    return f"asyncopd, {ENGINES[side]}"


def medians(runs: list[dict]) -> list[str]:
    cpu = [statistics.median(r["cpu_s_per_1000"].get(role, 0.0) for r in runs) for role in (*ROLES, "parent")]
    start, gb = (statistics.median(r.get(name, 0.0) for r in runs) for name in ("start_s", "gb"))
    return [*(f"{x:.3f}" if x else "" for x in cpu), f"{start:.0f}", f"{gb:.1f}" if gb else ""]


def spread(ratios: list[float]) -> str:
    if len(ratios) < 2:
        return "".join(f"{r:.2f}, one seed" for r in ratios)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def accuracy_table() -> str:
    """Markdown: seconds to GOAL of each side at its best rate."""
    lines = [["side", "best learning rate", f"seconds to {GOAL:.0%}, by seed", "median",
              "TRL's seconds / these, median (least to most)"]]
    for side in ("hf", TRL):
        if timed_runs(side):
            found = to_goal(side)
            lines.append([label(side), f"{best_rate(side):g}", ", ".join(map(in_seconds, found.values())),
                          in_seconds(statistics.median(found.values())), spread(sooner(side) if side != TRL else [])])
    if len(lines) == 1:
        return "Not measured yet."
    return markdown(lines)


def sooner(side: str) -> list[float]:
    """TRL's seconds to GOAL / a side's, by seed."""
    mine, theirs = to_goal(side), to_goal(TRL)
    return [theirs[seed] / s for seed, s in mine.items() if seed in theirs]


def in_seconds(x: float) -> str:
    if x == float("inf"):
        return f"not in {STEPS} updates"
    return f"{x:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("what", choices=("threads", "race", "accuracy", "table", "one"))
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--job", type=json.loads, help="of `one`, which is a side's process in a race")
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(one(Job(**args.job))))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    made_by()
    result: dict[str, object] = {}
    if args.what == "threads":
        result = threads(args.pairs)
    elif args.what == "race":
        result = race(args.pairs, args.seeds)
    elif args.what == "accuracy":
        result = accuracy(args.rates, args.seeds)
    print(race_table())
    print(accuracy_table())
    print(json.dumps(result))


if __name__ == "__main__":
    main()

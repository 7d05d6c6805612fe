"""
Eight GPUs without eight GPUs: the real parent, scheduler, slots, pipes and rollout worker, with an engine, a teacher
and a learner that take time instead of computing. What a rule for overdue responses costs, at any scale of time.

    python benchmarks/pipeline.py              # everything: benchmarks/pipeline.jsonl and figures/lag.png; 10 minutes
    python benchmarks/pipeline.py --quick      # the defaults under each rule; 3 minutes
    python benchmarks/pipeline.py --smoke      # two small batches: does it work at all? seconds

A token here stands for 64 tokens of a response of up to 16,384; lengths are lognormal (sigma 0.8) or Pareto (1.3),
mean about 4,500, cut at 16,384. The GPUs are split as in the paper: asynchronous, 1 teacher, 4 rollout and 3 learner
GPUs (the learner's three are one process three times as fast as one); synchronous, the same seven shared in time, 7
rollout workers and then a learner 7/3 as fast. An engine's turn takes turn_s (1 + running / knee): it reads the weights
once and every response's keys and values, which for 4B parameters on a B200 weigh the same at about 37 responses of a
batch of 256, 9 of ours of 64. Reading a context again, which a push costs every running response, is PREFILL times as
fast as generating. Other models and other splits: benchmarks/splits.py.
The learner is the slowest stage: the bound is the learner busy all the time.

Columns: trained tokens per second as a multiple of sync; share of the bound; overlap (3 is the most); lag min/mean/max;
tokens dropped; mean length of a trained response / of all begun; context tokens read again per trained token; the
parent's own work / wall time.
Last line: one JSON object with cut_vs_keep, cut_vs_bound, async_vs_sync, overlap, lag_max, max_lag, dropped,
scheduler_share (the last one at 1,280 slots).
"""
import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from config import Config, Eval, slot_count  # noqa: E402
from control import controller  # noqa: E402
from control.plan import plan  # noqa: E402
from control.preflight import Job  # noqa: E402
from control.resolve import resolve  # noqa: E402
from engines.drawn import Drawn  # noqa: E402
from engines.table import ENGINES  # noqa: E402
from learner import Divisors  # noqa: E402
from record.account import Account  # noqa: E402
from record.metrics import BY_LEARNER  # noqa: E402

T = 256                      # longest response, in units of 64 tokens
BATCH = 64                   # responses per train batch; the paper's 256 takes four times as long
PREFILL = 20                 # tokens of context read while a full engine generates one


@dataclass(frozen=True)
class Pace:
    """How long the stand-ins take; it travels to them in --task."""
    step_s: float = 0.4      # learner seconds for BATCH responses of mean length, on its three GPUs
    teacher_s: float = 0.2   # seconds of one teacher for the same
    turn_s: float = 0.002    # an engine's turn, one token for every running response, with nothing running
    knee: float = 9.0        # running responses with which a turn takes twice as long


def as_task(kind: str, pace: Pace) -> str:
    return f"{kind}@{json.dumps(asdict(pace))}"


def read_task(task: str) -> tuple[str, Pace]:
    kind, _, pace = task.partition("@")
    return kind, Pace(**json.loads(pace))


def length(kind: str, uid: int) -> int:
    """Tokens of response `uid`."""
    rng = random.Random(f"{kind}-{uid}")
    x = 53 * rng.lognormvariate(0, 0.8) if kind == "lognormal" else 23 * rng.paretovariate(1.3)
    return max(1, min(T, round(x)))


class StandIn:
    """An engine: a turn of generation takes its time, and so does reading a prompt or a context."""

    def __init__(self, cfg, device, dtype):
        self.kind, self.pace = read_task(cfg.task)
        self.rows, self.debt, self.preempted, self.version = {}, 0.0, 0, 0
        full = max(1, slot_count(cfg) // cfg.rollouts)
        self.read_s = self.turn_s(full) / full / PREFILL           # per token of context

    def turn_s(self, running):
        return self.pace.turn_s * (1 + running / self.pace.knee)

    def load(self, tensors, version):
        self.debt += 0.01 * self.pace.step_s
        self.version = version

    def checksums(self, layout, version):
        return []

    def logp(self, tokens):
        return torch.zeros(len(tokens) - 1)

    def add(self, key, tokens, budget, *, uid, position):
        self.rows[key] = [length(self.kind, uid) - position, []]   # tokens to draw; of each, its version
        self.debt += len(tokens) * self.read_s

    def step(self):
        if self.rows:
            time.sleep(self.turn_s(len(self.rows)) + self.debt)
            self.debt = 0.0
        done = []
        for key, row in self.rows.items():
            row[1].append(self.version)
            if len(row[1]) >= row[0]:
                done.append(key)
        return done

    def take(self, keys):
        out = {}
        for key in keys:
            versions = torch.tensor(self.rows.pop(key)[1])
            n = len(versions)
            out[key] = Drawn(torch.zeros(n, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.int64),
                             torch.zeros(n, 1), torch.zeros(n), versions)
        return out

    def not_begun(self):
        return [key for key, row in self.rows.items() if not row[1]]


def teacher(cfg, link, shared, device, dtype):
    kind, pace = read_task(cfg.task)
    per_token = pace.teacher_s / (BATCH * mean_length(kind))
    link.send("ready")
    while True:
        waiting = []
        for order, body in link.orders(wait=True):
            if order == "stop":
                return link.send("stopped")
            waiting += body
        for i in range(0, len(waiting), 8):
            group = waiting[i:i + 8]
            with link.span("score"):
                time.sleep(per_token * sum(len(shared.slots.read(s).tokens) for s in group))
            link.send("scored", slots=group)


def learner(cfg, link, shared, start, device, dtype):
    speed = 7 / 3 if cfg.schedule == "sync" else 1.0
    kind, pace = read_task(cfg.task)
    per_token = pace.step_s / (BATCH * mean_length(kind)) / speed
    version = start.version
    divisors = Divisors(lockstep=cfg.schedule != "async")
    shared.weights.publish({"w": torch.zeros(1)}, version, torch.zeros(1))
    link.send("ready")
    while True:
        for order, body in link.orders(wait=True):
            if order == "stop":
                return link.send("stopped")
            if order != "train":
                Path(body).mkdir(parents=True)
                link.send("saved", folder=body, version=version, why="")
                continue
            segments = [shared.slots.read(s) for s in body]
            lags = torch.cat([version - s.version for s in segments])
            context = sum(s.start - s.prompt for s in segments)
            divisors.note(segments)
            with link.span("step"):
                time.sleep(per_token * (len(lags) + context))
            version += 1
            with link.span("publish"):
                shared.weights.publish({"w": torch.zeros(1)}, version, torch.zeros(1))
            metrics = dict.fromkeys(BY_LEARNER, 0.0) | dict(
                step=version, version=version, tokens=len(lags), sequences=len(segments), context=context,
                token_weight=divisors.token_weight(segments), lag_min=int(lags.min()),
                lag_mean=lags.float().mean().item(), lag_max=int(lags.max()))
            link.send("trained", metrics=metrics, skipped=[], events=[], flush=False)


ENGINES["stand-in"] = f"{__name__}:StandIn"              # in every process: a new one imports this file again
controller.WORKERS |= {"teacher": teacher, "learner": learner}


def mean_length(kind: str) -> float:
    if kind not in MEANS:
        MEANS[kind] = statistics.mean(length(kind, uid) for uid in range(20_000))
    return MEANS[kind]


MEANS: dict[str, float] = {}


def token_weights(steps: list[dict]) -> dict[str, float]:
    """The mean weight of a trained token in the shortest and the longest third of the responses, relative to the mean:
    over the first five batches and over all; as it was, and had each batch been divided by its own tokens."""
    found = {}
    for rule in ("", "own_"):
        for name, lines in (("first_", steps[:5]), ("", steps)):
            account = Account()
            for x in lines:
                weight = x["token_weight"] if rule == "" else steps[0]["tokens"] / x["tokens"]
                account.enter(x | {"token_weight": weight}, x["trained"])
            short, long = account.weight_by_length()
            found |= {f"{rule}{name}weight_short": short, f"{rule}{name}weight_long": long}
    return found


def play(kind="lognormal", *, steps=40, batch=BATCH, workers=4, filling=5, pace=Pace(), **flags) -> dict:  # noqa: B008
    """One run: its row of the table, without the first batches, which fill the pipeline."""
    from dataclasses import replace
    out = tempfile.mkdtemp()
    cfg = resolve(Config(gpus=0, task="toy", student="-", teacher="-", engine="hf", steps=steps, batch=batch,
                         max_prompt=4, max_response=T, estimator="reverse_ppo", rollouts=workers, out=out,
                         eval=Eval(n=0), save_every=0, **flags))
    cfg = replace(cfg, engine="stand-in", task=as_task(kind, pace))
    job = Job(prompts=[[1]], eval_prompts=[], eval_rows=[], grade=lambda a: ([], []),
              layout={"w": torch.Size([1])}, probe=[1, 2], hidden=1)
    parent = controller.Controller(cfg, job, plan(cfg), quiet=True)
    try:
        parent.start()
        parent.loop()
        parent.finish()
    finally:
        parent.close()
    log = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    shutil.rmtree(out)
    last, m = log[-1], [x for x in log if x["type"] == "step"][filling:]
    cut = [x["uid"] for x in log if x["type"] == "event" and x["what"] == "cut" and x["version"] >= filling]
    weights = token_weights([x for x in log if x["type"] == "step"])
    wall = m[-1]["wall_s"] - m[0]["wall_s"]
    tokens = sum(x["tokens"] for x in m[1:])
    responses = sum(x["sequences"] for x in m) - len(cut)
    begun = [length(kind, uid) for uid in range(parent.scheduler.prompts)]
    return dict(rule="sync" if cfg.schedule == "sync" else f"step-off {cfg.max_ahead}" if cfg.schedule == "step-off"
                else cfg.overdue, lengths=kind, inflight=cfg.inflight, max_ahead=cfg.max_ahead, max_lag=cfg.max_lag,
                slots=len(parent.slots), steps=steps,
                tok_s=tokens / wall, overlap=last["overlap"], lag_min=min(x["lag_min"] for x in m),
                lag_mean=last["lag_mean"], lag_max=last["lag_max"], dropped=last["tokens_dropped"],
                dropped_share=last["tokens_dropped"] / max(1, last["tokens_generated"]),
                mean_trained=sum(x["tokens"] for x in m) / max(1, responses), mean_begun=statistics.mean(begun),
                context=sum(x["context"] for x in m) / sum(x["tokens"] for x in m), cuts=len(cut),
                scheduler_share=parent.routing_s / last["wall_s"], step_s=wall / (len(m) - 1),
                **weights, bound=tokens / wall / (BATCH * mean_length(kind) / pace.step_s))


HEADER = ("rule", "lengths", "A", "L", "× sync", "of the bound", "overlap", "lag", "dropped", "trained / begun length",
          "context / token", "parent")


def cells(r: dict, sync: float) -> tuple[str, ...]:
    bounded = r["rule"] in ("cut", "wait", "drop")
    rule = r["rule"] + ", finish" * (r["inflight"] == "finish") + ", 1,280 slots" * (r["slots"] >= 1280)
    return (rule, r["lengths"], str(r["max_ahead"]), str(r["max_lag"]) if bounded else "", f"{r['tok_s'] / sync:.2f}",
            f"{r['bound']:.2f}", f"{r['overlap']:.2f}", f"{r['lag_min']} / {r['lag_mean']:.1f} / {r['lag_max']}",
            f"{r['dropped_share']:.0%}", f"{r['mean_trained'] / r['mean_begun']:.2f}", f"{r['context']:.3f}",
            f"{r['scheduler_share']:.2%}")


def table() -> str:
    """Markdown, from pipeline.jsonl."""
    rows = [json.loads(line) for line in (HERE / "pipeline.jsonl").read_text().splitlines()]
    sync = {r["lengths"]: r["tok_s"] for r in rows if r["rule"] == "sync"}
    lines = [HEADER, ("---", "---", *["--:"] * (len(HEADER) - 2)), *(cells(r, sync[r["lengths"]]) for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="two small batches and no record")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if args.smoke:
        return print(json.dumps(play(steps=2, batch=8, workers=1, filling=0)))
    record = (HERE / "pipeline.jsonl").open("w") if not args.quick else None
    sync, rows = {}, []

    def show(r):
        rows.append(r)
        if record:
            record.write(json.dumps(r) + "\n"), record.flush()
        print("  ".join(f"{c:>14}" for c in cells(r, sync[r["lengths"]]["tok_s"])), flush=True)
        return r
    print("  ".join(f"{c[:14]:>14}" for c in HEADER))
    for kind in ["lognormal"] if args.quick else ["lognormal", "pareto"]:
        sync[kind] = play(kind, schedule="sync", workers=7, steps=max(12, args.steps // 3))
        show(sync[kind])
        if not args.quick:
            show(play(kind, schedule="step-off", max_ahead=2, steps=max(15, args.steps // 2)))
        for rule in ("keep", "cut", "wait", "drop"):
            show(play(kind, overdue=rule, steps=args.steps))
        if not args.quick:
            for lag in (4, 6, 8, 12):
                show(play(kind, max_lag=lag, steps=args.steps))
            show(play(kind, overdue="wait", max_lag=4, steps=args.steps // 2))
            show(play(kind, overdue="drop", max_lag=4, steps=args.steps))
            show(play(kind, inflight="finish", steps=args.steps))
    big = show(play("lognormal", batch=256, steps=12))
    if record:
        record.close()
    first = {r["rule"]: r for r in reversed(rows) if r["lengths"] == "lognormal" and r["max_lag"] == 16
             and r["inflight"] == "recompute" and r["slots"] < 1280}
    print(json.dumps({
        "cut_vs_keep": first["cut"]["tok_s"] / first["keep"]["tok_s"], "cut_vs_bound": first["cut"]["bound"],
        "async_vs_sync": first["cut"]["tok_s"] / sync["lognormal"]["tok_s"], "overlap": first["cut"]["overlap"],
        "lag_max": first["cut"]["lag_max"], "max_lag": 16, "dropped": first["cut"]["dropped"],
        "scheduler_share": big["scheduler_share"]}))


if __name__ == "__main__":
    main()

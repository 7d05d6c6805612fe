"""
Asynchronous on-policy distillation: a student writes, a teacher scores, a learner updates, all at once.

    python asyncopd.py --gpus 8 --kl reverse --mc-samples 4
    python asyncopd.py --gpus 0                                 # no GPU: the same processes, a toy model

This file is the parent: the flags, which role runs where, starting the workers, the loop that routes slot numbers
between them, and everything a person sees. The decisions are in cache.Ledger, the algorithm in learner.Learner and
estimators.py. What is left out: several machines.
Reading order: estimators, cache, rollout, learner, asyncopd (then tasks and record, at leisure).
Tests: tests/test_cli.py, tests/test_pipeline.py
"""
from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import get_type_hints

import torch
import yaml

import record
import tasks
from cache import Ledger, Link, Slots, Weights, stop_ids, teacher_worker, vocab_size
from estimators import DEFAULT, ESTIMATORS
from learner import METRICS, learner_worker
from rollout import rollout_worker

ROOT = Path(__file__).resolve().parent


# -- flags -----------------------------------------------------------------------------------------

def knob(default, help, **more):
    return field(default=default, metadata=dict(help=help, **more))


@dataclass(frozen=True, kw_only=True)
class Config:
    # objective
    kl: str            = knob("reverse", "divergence to minimise", choices=tuple(DEFAULT))
    mc_samples: int    = knob(4, "candidates per position, N")
    top_k: int         = knob(16, "words per position of the top-k estimators, K")
    estimator: str     = knob("", "row of estimators.ESTIMATORS (default: by --kl)", choices=("", *ESTIMATORS))
    tail: bool         = knob(True, "forward_topk counts the words outside of the top k, as one")
    is_weight: bool    = knob(True, "reverse_topk_pg weighs by p / mu")
    beta: float        = knob(0.5, "jsd_dense: 0 is the forward KL, 1 the reverse KL")
    # models and prompts
    student: str       = knob("", "folder or hub name of the model to train")
    teacher: str       = knob("", "folder or hub name of the model to learn from")
    task: str          = knob("", "toy, FILE.jsonl, FILE.parquet or hf:DATASET[:CONFIG]")
    prompt_key: str    = knob("prompt", "key of the prompt in a row of the task")
    answer_key: str    = knob("answer", "key of the answer; rows without one are trained on, not graded")
    prompt_suffix: str = knob("", "text put after every prompt")
    eval_task: str     = knob("", "file to evaluate on (default: held out from --task)")
    # staleness
    schedule: str      = knob("async", "sync: lag 0, no overlap", choices=("async", "sync"))
    max_ahead: int     = knob(4, "train batches that generation may run ahead: memory, and the mean lag")
    overdue: str       = knob("keep", "what happens to a response whose lag grows", choices=("keep",))
    # training
    steps: int         = knob(200, "train batches")
    batch: int         = knob(256, "responses per train batch")
    minibatches: int   = knob(1, "optimizer updates per train batch")
    lr: float          = knob(3e-6, "AdamW learning rate")
    lr_schedule: str   = knob("constant", "of the learning rate after the warm-up", choices=("constant", "cosine"))
    warmup: int        = knob(0, "optimizer updates over which the learning rate rises to --lr")
    weight_decay: float = knob(0.01, "AdamW weight decay")
    clip: float        = knob(1.0, "largest gradient norm")
    seed: int          = knob(0, "of prompt order and of every draw")
    max_prompt: int    = knob(2048, "longest prompt, tokens")
    max_response: int  = knob(16384, "longest response, tokens")
    temperature: float = knob(1.0, "of the student's sampling")
    top_p: float       = knob(1.0, "nucleus of the student's sampling")
    micro_tokens: int  = knob(16384, "padded tokens per forward pass of learner and teacher")
    chunk: int         = knob(1024, "positions whose full logits exist at once in the learner")
    # machines
    gpus: int          = knob(-1, "GPUs to use (0: everything on the CPU, -1: all there are)")
    rollouts: int      = knob(0, "rollout workers (0: by the number of GPUs)")
    teachers: int      = knob(0, "teacher workers (0: by the number of GPUs)")
    engine: str        = knob("", "of the rollouts (default: vllm where it is installed)", choices=("", "vllm", "hf"))
    max_running: int   = knob(256, "responses that an engine generates at the same time")
    gpu_share: float   = knob(0.0, "share of a GPU's memory for vLLM (0: 0.85, or 0.3 where a GPU has all roles)")
    gap_max: float     = knob(0.0, "stop when engine and learner differ by more, nats (0: 1e-3 in float32, 1 in bf16)")
    # record
    out: str           = knob("", "run folder (default: runs/<task>-<time>)")
    overwrite: bool    = knob(False, "empty the run folder if it is in use")
    eval_every: int    = knob(0, "steps between evaluations (0: only at the start and the end)")
    eval_n: int        = knob(200, "rows to evaluate on")
    eval_teacher: bool = knob(False, "evaluate the teacher too")
    save_every: int    = knob(0, "steps between checkpoints (0: only the student at the end)")

    @classmethod
    def from_cli(cls, argv: list[str]) -> Config:
        """default < file < flag. A file is turned into flags and read by the same parser."""
        parser = argparse.ArgumentParser("asyncopd", allow_abbrev=False, description=__doc__.split("\n\n")[0])
        parser.error = lambda message: refuse(message)
        parser.add_argument("--config", default="", metavar="FILE", help="YAML file of the flags below")
        for f, kind in zip(fields(cls), get_type_hints(cls).values()):
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how, **f.metadata)
        given = parser.parse_args(argv)
        toy = given.task in ("", "toy") and not given.student
        path = given.config or (str(ROOT / "configs" / "toy.yaml") if toy else "")
        args = vars(parser.parse_args(read_flags(path) + argv))
        args.pop("config")
        return settle(cls(**args))


def refuse(message: str):
    raise ValueError(message)


def read_flags(path: str) -> list[str]:
    if not path:
        return []
    try:
        written = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as e:
        refuse(f"--config {path}: {' '.join(str(e).split())}")
    if not isinstance(written, dict):
        refuse(f"--config {path}: not a mapping of flags")
    flags = []
    for key, value in written.items():
        name = str(key).replace("_", "-")
        flags.append(("--" if value else "--no-") + name if isinstance(value, bool) else f"--{name}={value}")
    return flags


def settle(cfg: Config) -> Config:
    """Refuse what cannot be; put in what an empty value stands for."""
    for name in ("mc_samples", "top_k", "steps", "batch", "minibatches", "max_prompt", "max_response", "micro_tokens",
                 "chunk", "max_running", "lr", "clip", "temperature"):
        getattr(cfg, name) > 0 or refuse(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0")
    for name in ("max_ahead", "warmup", "weight_decay", "rollouts", "teachers", "eval_every", "eval_n", "save_every"):
        getattr(cfg, name) >= 0 or refuse(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative")
    0 <= cfg.beta <= 1 or refuse(f"--beta {cfg.beta}: must be between 0 and 1")
    0 < cfg.top_p <= 1 or refuse(f"--top-p {cfg.top_p}: must be above 0 and at most 1")
    cfg.minibatches <= cfg.batch or refuse(f"--minibatches {cfg.minibatches}: more than the {cfg.batch} of --batch")
    there = torch.cuda.device_count()
    cfg.gpus <= there or refuse(f"--gpus {cfg.gpus}: this machine has {there} (--gpus 0 runs on the CPU)")
    gpus = there if cfg.gpus < 0 else cfg.gpus
    estimator = cfg.estimator or DEFAULT[cfg.kl]
    vllm = importlib.util.find_spec("vllm") is not None
    cfg.engine != "vllm" or vllm or refuse("--engine vllm: vLLM is not installed (--engine hf runs without it)")
    cfg.task or refuse("--task is missing: toy, FILE.jsonl, FILE.parquet or hf:DATASET")
    if cfg.task != "toy" and not (cfg.student and cfg.teacher):
        refuse("--student and --teacher are missing: a folder or a hub name each")
    return replace(
        cfg, gpus=gpus, estimator=estimator, kl=ESTIMATORS[estimator].kl,
        engine=cfg.engine or ("vllm" if vllm else "hf"), rollouts=cfg.rollouts or max(1, gpus - 2),
        teachers=cfg.teachers or 1, max_ahead=0 if cfg.schedule == "sync" else cfg.max_ahead,
        gpu_share=cfg.gpu_share or (0.85 if gpus > 1 else 0.3), gap_max=cfg.gap_max or (1.0 if gpus else 1e-3),
        out=cfg.out or f"runs/{Path(cfg.task).stem.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")


def plan(cfg: Config) -> dict[str, str]:
    """worker -> device. GPU 0.. generate, then the teacher, the last one learns; a single GPU is shared by all."""
    roles = [f"rollout{i}" for i in range(cfg.rollouts)] + [f"teacher{i}" for i in range(cfg.teachers)] + ["learner"]
    if cfg.gpus == 0:
        return {role: "cpu" for role in roles}
    return {role: f"cuda:{min(i, cfg.gpus - 1)}" for i, role in enumerate(roles)}


# -- workers ---------------------------------------------------------------------------------------

WORKERS = {"rollout": rollout_worker, "teacher": teacher_worker, "learner": learner_worker}


def guarded(name: str, pipe, log: str, cfg: Config, device: str, args: tuple) -> None:
    """Process target: whatever the worker raises reaches the parent with its traceback; only the parent prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C is for the parent, which stops us in order
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1), os.dup2(sink, 2)
    if device == "cpu":
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // 2))
        if name.startswith("rollout"):                   # vLLM binds its threads to cores: leave the rest the others
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(int(name[7:]) % max(1, cores - 1)))
    else:
        os.environ["CUDA_VISIBLE_DEVICES"], device = device.split(":")[1], "cuda:0"
    link = Link(pipe)
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        WORKERS[name.rstrip("0123456789")](cfg, link, *args, device, dtype)
    except EOFError:                                     # the parent is gone
        pass
    except BaseException:
        link.send("crash", traceback=traceback.format_exc())
        raise


class Hand:
    """A worker as its parent sees it."""

    def __init__(self, name: str, device: str, cfg: Config, args: tuple):
        spawn = multiprocessing.get_context("spawn")
        self.name, self.role, self.load, self.stopped = name, name.rstrip("0123456789"), 0, False
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=guarded, name=name, daemon=True,
                                     args=(name, theirs, f"{cfg.out}/{name}.log", cfg, device, args))
        self.process.start()
        theirs.close()

    def send(self, order: str, body=None) -> None:
        self.pipe.send((order, body))


# -- the run ---------------------------------------------------------------------------------------

class Run:
    """The parent: routes slots, keeps the record, ends the run. `loop` is the whole of the pipeline."""

    def __init__(self, cfg: Config):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        if cfg.task == "toy" and not cfg.student:
            student, teacher = tasks.toy_models(ROOT / "runs")
            cfg = replace(cfg, student=student, teacher=cfg.teacher or teacher)
        self.task = tasks.load_task(cfg.task, prompt_key=cfg.prompt_key, answer_key=cfg.answer_key,
                                    eval_file=cfg.eval_task, eval_n=cfg.eval_n)
        for flag, name in (("--student", cfg.student), ("--teacher", cfg.teacher)):
            try:
                AutoConfig.from_pretrained(name)
            except (OSError, ValueError) as e:
                refuse(f"{flag} {name}: neither a model folder nor on the hub ({str(e).splitlines()[0]})")
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.student)
        same_words(self.tokenizer, AutoTokenizer.from_pretrained(cfg.teacher))
        self.prompts = [p for p in tasks.encode(self.task.train, self.tokenizer, cfg.prompt_suffix)
                        if 0 < len(p) <= cfg.max_prompt]
        self.prompts or refuse(f"--max-prompt {cfg.max_prompt}: every prompt of {cfg.task} is longer")
        self.eval_prompts = tasks.encode(self.task.eval, self.tokenizer, cfg.prompt_suffix)
        self.ends = set(stop_ids(cfg.student))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.student))
        layout = {name: p.shape for name, p in model.named_parameters()}
        probe = (self.prompts[0] + self.prompts[-1] + self.prompts[0])[:64]
        cfg = replace(cfg, top_k=min(cfg.top_k, vocab_size(cfg.student)))
        estimator, dtype = ESTIMATORS[cfg.estimator], torch.bfloat16 if cfg.gpus else torch.float32
        hidden = AutoConfig.from_pretrained(cfg.teacher).get_text_config().hidden_size
        self.cfg, self.slot_bytes = cfg, estimator.bytes(cfg.mc_samples, cfg.top_k, hidden * dtype.itemsize)
        self.slots = Slots((cfg.max_ahead + 1) * cfg.batch, cfg.max_prompt, cfg.max_response,
                           estimator.columns(cfg.mc_samples, cfg.top_k),
                           hidden if estimator.support == "full" else 0, dtype)
        self.weights = Weights(layout, probe, torch.bfloat16 if cfg.gpus else torch.float32)
        self.ledger = Ledger(self.slots, cfg.batch, cfg.schedule, cfg.max_ahead)
        self.hands: list[Hand] = []
        self.spans: list[tuple[str, str, float, float]] = []       # worker, what, from, to
        self.generated: dict[str, int] = {}                        # rollout worker -> tokens it has drawn
        self.pushed: dict[str, dict] = {}                          # rollout worker -> its last push
        self.accuracy: dict[tuple[str, int], float] = {}           # (who, step)
        self.steps: list[dict] = []
        self.made = 0

    def start(self) -> None:
        """Start the workers, wait until all can work, evaluate version 0."""
        cfg, where = self.cfg, plan(self.cfg)
        both = (self.slots, self.weights)
        shared = {"rollout": both, "teacher": (self.slots,), "learner": both}
        record.show_start(where, [
            [f"{len(self.slots)} slots", f"{self.slots.bytes / 2**20:,.1f} MiB"],
            [f"a token's scores ({cfg.estimator})", f"{self.slot_bytes:,} bytes"],
            ["published weights, twice", f"{self.weights.flat.nbytes / 2**20:,.1f} MiB"]], changed(cfg))
        for name, device in where.items():
            self.hands.append(Hand(name, device, cfg, shared[name.rstrip("0123456789")]))
        self.log = record.Log(Path(cfg.out), cfg.steps)
        self.log.write("run", **record.provenance(asdict(cfg), {h.name: h.process.pid for h in self.hands}))
        waiting = set(where)
        while waiting:
            waiting -= {hand.name for hand, kind, _ in self.reports() if kind == "ready"}
        for hand in self.role("teacher")[:cfg.eval_teacher] + self.role("rollout")[:1]:
            waiting |= self.evaluate(hand)
        while waiting:
            waiting -= {hand.name for hand, kind, _ in self.reports() if kind == "evaluated"}
        self.began = self.last_step = time.monotonic()

    def role(self, role: str) -> list[Hand]:
        return [h for h in self.hands if h.role == role]

    def loop(self) -> None:
        """Give work, hear reports, until the last batch is trained."""
        while self.ledger.version < self.cfg.steps:
            self.give_work()
            for hand, kind, body in self.reports():
                self.handle(hand, kind, body)

    def give_work(self) -> None:
        lists: dict[str, list] = {h.name: [] for h in self.hands}
        for t in self.ledger.hand_out():
            hand = min(self.role("rollout"), key=lambda h: h.load)
            prompt = self.prompts[tasks.prompt_number(t.uid, len(self.prompts), self.cfg.seed)]
            self.slots.open(t.slot, t.uid, prompt, len(prompt), self.ledger.version)
            lists[hand.name].append((None if self.cfg.schedule == "async" else self.ledger.version, t.slot))
            t.holder, hand.load = hand.name, hand.load + 1
        for t in self.ledger.to_score():
            hand = min(self.role("teacher"), key=lambda h: h.load)
            lists[hand.name].append(t.slot)
            t.stage, t.holder, hand.load = "teacher", hand.name, hand.load + 1
        if batch := self.ledger.next_batch():
            lists["learner"] = [t.slot for t in batch]
        order = {"rollout": "take", "teacher": "score", "learner": "train"}
        for hand in self.hands:
            if lists[hand.name]:
                hand.send(order[hand.role], lists[hand.name])

    def handle(self, hand: Hand, kind: str, body: dict) -> None:
        if kind == "generated":
            for s in body["slots"]:
                self.ledger.generated(s)
        elif kind == "scored":
            for s in body["slots"]:
                self.ledger.scored(s)
        elif kind == "trained":
            self.ledger.trained()                        # after the publish: a freed slot never meets older weights
            self.step_done(body["metrics"])
        hand.load -= len(body.get("slots", ()))

    def reports(self):
        """(hand, kind, body) of everything that has arrived, waiting up to a second; a dead worker ends the run."""
        by_pipe = {h.pipe: h for h in self.hands if not h.stopped}
        for pipe in wait(list(by_pipe), timeout=1.0):
            hand = by_pipe[pipe]
            try:
                kind, body, spans = pipe.recv()
            except (EOFError, ConnectionResetError):
                hand.process.join(5)
                raise RuntimeError(f"{hand.name} died with exit code {hand.process.exitcode}; "
                                   f"its output: {self.cfg.out}/{hand.name}.log") from None
            self.spans += [(hand.name, *s) for s in spans]
            if kind == "crash":
                raise RuntimeError(f"{hand.name} crashed\n{body['traceback']}")
            if "tokens" in body:
                self.generated[hand.name] = body["tokens"]
            if kind == "pushed":
                self.pushed[hand.name] = body
            if kind == "evaluated":
                self.graded(hand, body)
            yield hand, kind, body

    # -- evaluation and record ---------------------------------------------------------------------

    def evaluate(self, hand: Hand) -> set[str]:
        """Ask for greedy answers to the held-out rows; who will report (nobody where no row has an answer)."""
        if not self.eval_prompts:
            return set()
        hand.send("evaluate", (self.eval_prompts, self.cfg.max_response))
        return {hand.name}

    def graded(self, hand: Hand, body: dict) -> None:
        answers = [[t for t in a if t not in self.ends] for a in body["answers"]]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        right = [self.task.grade(text, row.answer) for text, row in zip(texts, self.task.eval)]
        who, step = ("teacher", 0) if hand.role == "teacher" else ("student", body["version"])
        self.accuracy[who, step] = sum(right) / len(right)
        self.log.write("eval", step=step, accuracy=self.accuracy[who, step], n=len(right), who=who,
                       examples=[dict(prompt=r.prompt, text=t, right=ok) for r, t, ok in
                                 list(zip(self.task.eval, texts, right))[:3]])

    def step_done(self, metrics: dict) -> None:
        cfg, now, made = self.cfg, time.monotonic(), sum(self.generated.values())
        metrics |= {"gen_tok_s": (made - self.made) / (now - self.last_step), "wall_s": now - self.began,
                    "push_s": max(p["seconds"] for p in self.pushed.values())}
        metrics |= {f"engine_gap_{name}": max(p["gap"][i] for p in self.pushed.values())
                    for i, name in enumerate(("mean", "p95", "max"))}
        assert metrics.keys() == METRICS.keys(), metrics.keys() ^ METRICS.keys()
        self.made, self.last_step = made, now
        self.steps.append(metrics)
        self.log.step(metrics)
        step = metrics["step"]
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            self.evaluate(self.role("rollout")[0])
        if cfg.save_every and step % cfg.save_every == 0:
            self.role("learner")[0].send("save", f"{cfg.out}/checkpoints/step-{step}")

    def finish(self) -> None:
        """The last evaluation, the student's folder, the totals."""
        cfg, steps, wall = self.cfg, self.steps, self.last_step - self.began
        self.evaluate(self.role("rollout")[0])
        self.role("learner")[0].send("save", f"{cfg.out}/student")
        self.stop()
        record.write_trace(Path(cfg.out) / "trace.json", self.spans)
        busy = record.busy_shares(self.spans, self.began, self.last_step)
        trained, generated = sum(m["tokens"] for m in steps), sum(self.generated.values())
        tail = [m["kl"] for m in steps[-10:]]
        totals = {
            "steps": len(steps), "tokens": trained, "tokens_generated": generated, "tokens_trained": trained,
            "tokens_in_flight": sum(int(self.slots.length[s]) for s in self.ledger.tickets), "wall_s": wall,
            "overlap": sum(busy.values()), "busy": busy, "train_tok_s": trained / wall, "gen_tok_s": generated / wall,
            "score_tok_s": trained / wall / busy["teacher"],
            "lag_mean": sum(m["lag_mean"] * m["tokens"] for m in steps) / trained,
            "lag_max": max(m["lag_max"] for m in steps), "kl_before": steps[0]["kl"], "kl_after": sum(tail) / len(tail),
            "accuracy_before": self.accuracy.get(("student", 0)),
            "accuracy_after": self.accuracy.get(("student", cfg.steps)),
            "accuracy_teacher": self.accuracy.get(("teacher", 0))}
        assert totals.keys() == record.DONE.keys(), totals.keys() ^ record.DONE.keys()
        self.log.write("done", **totals)
        self.log.close()
        record.show_end(totals, cfg.out)

    def stop(self) -> None:
        """Every worker ends after the orders it has; then it is gone."""
        for hand in self.hands:
            hand.send("stop")
        while any(not h.stopped for h in self.hands):
            for hand, kind, _ in self.reports():
                hand.stopped = kind == "stopped"
        self.close()

    def checkpoint(self, within_s: float) -> str:
        """Save the student as it is; the folder, or "" where the learner does not manage in time or was never there."""
        if not self.steps:
            return ""
        folder, limit = f"{self.cfg.out}/checkpoints/step-{len(self.steps)}", time.monotonic() + within_s
        self.role("learner")[0].send("save", folder)
        while time.monotonic() < limit:
            for _, _, body in self.reports():
                if body.get("folder") == folder:
                    return folder
        return ""

    def close(self) -> None:
        """No process is left, whatever happened."""
        for hand in self.hands:
            hand.process.join(5 if hand.stopped else 0)
            hand.process.kill()
        for hand in self.hands:
            hand.process.join()


def changed(cfg: Config) -> dict[str, object]:
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}


def same_words(student, teacher) -> None:
    """Distillation compares probabilities id by id: both tokenizers must give every id the same word."""
    s, t = student.get_vocab(), teacher.get_vocab()
    if s != t:
        word = next(w for w in sorted(s.keys() | t.keys(), key=lambda w: s.get(w, t.get(w))) if s.get(w) != t.get(w))
        refuse(f"--student and --teacher do not share a vocabulary: {word!r} is {s.get(word)} in the student's and "
               f"{t.get(word)} in the teacher's")


def main(argv: list[str]) -> int:
    run = None
    try:
        cfg = Config.from_cli(argv)
        out = Path(cfg.out)
        if out.exists() and any(out.iterdir()):
            cfg.overwrite or refuse(f"--out {cfg.out}: not empty (--overwrite empties it)")
            shutil.rmtree(out)
        run = Run(cfg)
        out.mkdir(parents=True, exist_ok=True)
        run.start()
        run.loop()
        run.finish()
        return 0
    except ValueError as e:
        print(f"asyncopd: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(f"asyncopd: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        saved = run.checkpoint(within_s=15) if run else ""
        print(f"asyncopd: interrupted{f', {saved} holds the student' if saved else ''}", file=sys.stderr)
        return 130
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))

"""
The toy in one process at a constant lag: what `--schedule step-off` trains, without the pipeline around it.

`Run` draws batch j under the weights of version j - lag, has the teacher score it, and makes one update, with the
engine, the teacher and the learner of the pipeline, in a fraction of its time, so that hundreds of runs fit into
hours. It trains the tokens that the real command trains: `python benchmarks/step_off.py` makes twelve steps of both and
compares them. Only rounding differs, because there a batch lies in other slots. `exact` then measures the student over
all words.

What is left out: the processes, checkpoints, extensions. Last line: one JSON object, {"same_tokens": steps that trained
as many tokens as the command's, "steps", "kl_gap": the largest relative difference of their KL}.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from cache import Segment, Slots  # noqa: E402
from config import Config, compute_dtype  # noqa: E402
from control.resolve import configure  # noqa: E402
from data.prompts import Row, encode, prompt_number  # noqa: E402
from data.tasks import Task, toy_task  # noqa: E402
from data.toy import toy_models  # noqa: E402
from engines.hf import HFEngine  # noqa: E402
from estimators import ESTIMATORS  # noqa: E402
from examples.against_teacher import answered, every_logp  # noqa: E402
from learner import Learner  # noqa: E402
from models.alignment import by_length  # noqa: E402
from teacher import HFTeacher  # noqa: E402

STEPS, LAG = 12, 4           # of the comparison with the command
TOY = ["--task=toy", "--gpus=0", "--engine=hf", "--batch=64", "--warmup=0", "--max-prompt=8", "--max-response=40"]


class Run:
    """A run in one process, batch by batch; batch j is drawn by the weights of version j - lag."""

    def __init__(self, cfg: Config, rows: list[Row], lag: int = 0):
        """`rows`: the prompts to train on."""
        self.cfg = cfg
        self.rows = rows
        self.lag = lag
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.student)
        self.engine = HFEngine(cfg, "cpu", compute_dtype(cfg))
        self.teacher = HFTeacher(cfg, "cpu", compute_dtype(cfg))
        self.learner = Learner(cfg, "cpu", compute_dtype(cfg))
        estimator = ESTIMATORS[cfg.estimator]
        width = self.teacher.model.config.hidden_size if estimator.support == "full" else 0
        self.slots = Slots(cfg.batch, cfg.max_prompt, cfg.max_response,
                           estimator.columns(cfg.mc_samples, cfg.top_k), hidden=width)
        self.versions: list[dict[str, Tensor]] = [self.weights()]          # the last `lag` + 1
        self.updates = 0
        self.tokens = 0

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.learner.student.parameters().items()}

    def step(self) -> dict[str, object]:
        """One train batch; the learner's numbers of it."""
        segments = self.generate()
        metrics = self.train(segments)
        self.tokens += sum(map(len, segments))
        self.updates += 1
        self.versions = [*self.versions, self.weights()][-self.lag - 1:]
        return metrics

    def train(self, segments: list[Segment]) -> dict[str, object]:
        """Score these segments, and make the update."""
        for group in by_length(segments, self.cfg.micro_tokens):
            self.teacher.score(group, self.slots)
        return self.learner.step(segments, self.updates).metrics

    def push(self) -> None:
        """The weights that draw the next batch."""
        self.engine.load(self.versions[0], max(0, self.updates - self.lag))

    def generate(self) -> list[Segment]:
        """One batch of responses, in the order in which the pipeline hands out prompts."""
        cfg = self.cfg
        version = max(0, self.updates - self.lag)
        self.push()
        uids = range(self.updates * cfg.batch, (self.updates + 1) * cfg.batch)
        chosen = [self.rows[prompt_number(uid, len(self.rows), cfg.seed)] for uid in uids]
        for s, (uid, prompt) in enumerate(zip(uids, encode(chosen, self.tokenizer))):
            self.slots.open(s, uid, prompt, len(prompt), version)
            self.engine.add(s, prompt, cfg.max_response, uid=uid, position=0)
        left = cfg.batch
        while left:
            for s, drawn in self.engine.take(self.engine.step()).items():
                self.slots.append(s, *drawn)
                left -= 1
        return [self.slots.read(s) for s in range(cfg.batch)]


class Toy(Run):
    """A run of the toy, and what it has learnt."""

    def __init__(self, flags: list[str], lag: int):
        schedule = ["--schedule=step-off", f"--max-ahead={lag}"] if lag else ["--schedule=sync"]
        cfg = configure([*TOY, *flags, *schedule])
        self.task: Task = toy_task(cfg.eval.n)
        super().__init__(cfg, self.task.train, lag)

    @torch.no_grad()
    def exact(self) -> dict[str, float]:
        """On the held-out prompts: the share of right greedy answers; KL(p || q) and KL(q || p) per token over all
        words, on answers that the student samples."""
        self.engine.load(self.weights(), self.updates)
        prompts = encode(self.task.eval, self.tokenizer)
        greedy = self.engine.complete(prompts, self.cfg.max_response)
        texts = self.tokenizer.batch_decode(greedy, skip_special_tokens=True)
        right = [self.task.grade(text, row.answer) for text, row in zip(texts, self.task.eval)]
        sampled = self.engine.complete(prompts, self.cfg.max_response, temperature=1.0)
        kl = forward_kl = 0.0
        tokens = 0
        for group in by_length([answered(0, p, a) for p, a in zip(prompts, sampled)], 4096):
            logp, logq = (every_logp(model, group) for model in (self.engine.model, self.teacher.model))
            kl += (logp.exp() * (logp - logq)).sum().item()
            forward_kl += (logq.exp() * (logq - logp)).sum().item()
            tokens += len(logp)
        return {"accuracy": sum(right) / len(right), "kl": kl / tokens, "forward_kl": forward_kl / tokens}


def distil(flags: list[str], lag: int) -> dict[str, float]:
    """A whole run: what `Toy.exact` says at its end, and the tokens that were trained."""
    toy = Toy(flags, lag)
    for _ in range(toy.cfg.steps):
        toy.step()
    return toy.exact() | {"tokens": toy.tokens}


def main() -> None:
    torch.set_num_threads(1)
    models = [f"--{role}={folder}" for role, folder in zip(("student", "teacher"), toy_models(HERE.parent / "runs"))]
    flags = [*models, f"--steps={STEPS}", "--lr=2e-4"]
    toy = Toy(flags, LAG)
    ours = [toy.step() for _ in range(toy.cfg.steps)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "asyncopd.py", *TOY, *flags, "--schedule=step-off", f"--max-ahead={LAG}",
                   "--eval.every=0", "--eval.no-teacher", f"--out={folder}/run"]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        log = [json.loads(line) for line in open(f"{folder}/run/log.jsonl", encoding="utf-8")]
    pairs = list(zip(ours, [row for row in log if row["type"] == "step"], strict=True))
    print(json.dumps({"same_tokens": sum(a["tokens"] == b["tokens"] for a, b in pairs), "steps": len(pairs),
                      "kl_gap": max(abs(a["kl"] / b["kl"] - 1) for a, b in pairs)}))


if __name__ == "__main__":
    main()

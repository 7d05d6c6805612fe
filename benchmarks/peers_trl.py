"""
One run of TRL's DistillationTrainer, in TRL's own environment: the other side of peers.py, which starts it.

    runs/peers/trl/bin/python benchmarks/peers_trl.py '{"student": .., "teacher": .., "prompts": .., "steps": ..}'

It imports nothing of the project. The trainer has the setting that peers.py gives it, float32 as the other side has it,
and otherwise its defaults, with three exceptions that make it faster here: no gradient checkpointing, no progress bar,
and buffers for the logits that are no wider than the vocabulary (they have 32,768 columns, which for the toy's 32 words
is memory that is fetched and never used). CPU seconds of its one process are divided by what it was doing: generate,
score (the teacher's forward pass without its head, which the loss applies), learn (the rest of a step).
Last line: one JSON object, {"began": the first prompt, by time.monotonic(), "tokens" trained, "cpu_s" by role after the
first update, "steps": [[seconds since then, tokens] after each update], "threads"}.
"""
from __future__ import annotations

import json
import sys
import time

import torch
import transformers
import trl.kernels.chunked_divergence
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer


class Clock(transformers.TrainerCallback):
    """Seconds and trained tokens after each update, and CPU seconds by role."""

    def __init__(self, save_every: int):
        self.save_every = save_every
        self.save = lambda folder: None
        self.began = 0.0
        self.cpu_began = 0.0
        self.tokens = 0
        self.steps: list[tuple[float, int]] = []
        self.cpu_s = {"generate": 0.0, "score": 0.0}

    def on_train_begin(self, *args, **kwargs) -> None:
        self.began = time.monotonic()
        self.cpu_began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append((time.monotonic() - self.began, self.tokens))
        if state.global_step == 1:               # as of the other side, what comes after the first update counts
            self.cpu_began = time.process_time()
            self.cpu_s = {"generate": 0.0, "score": 0.0}
        rest = time.process_time() - self.cpu_began - self.cpu_s["generate"] - self.cpu_s["score"]
        self.cpu_s["learn"] = rest
        if self.save_every and state.global_step % self.save_every == 0:
            self.save(f"{args.output_dir}/step-{state.global_step}")

    def timed(self, role: str, fn):
        def wrapped(*args, **kwargs):
            start = time.process_time()
            out = fn(*args, **kwargs)
            self.cpu_s[role] += time.process_time() - start
            return out
        return wrapped


class Trainer(DistillationTrainer):
    """The trainer, watched by a clock."""
    clock: Clock

    def _generate_single_turn(self, *args, **kwargs):
        ids = self.clock.timed("generate", super()._generate_single_turn)(*args, **kwargs)
        self.clock.tokens += sum(map(len, ids))
        return ids


def main() -> None:
    job = json.loads(sys.argv[1])
    with open(job["prompts"], encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    clock = Clock(job["save_every"])
    trainer = Trainer(
        model=job["student"], teacher_model=job["teacher"], train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[clock],
        args=DistillationConfig(
            output_dir=job["out"], max_steps=job["steps"], per_device_train_batch_size=job["batch"],
            learning_rate=job["lr"], lr_scheduler_type="constant", weight_decay=job["weight_decay"],
            max_grad_norm=job["clip"], max_completion_length=job["max_response"], beta=1.0, seed=job["seed"],
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
            save_strategy="no", logging_steps=10 ** 6))
    divergence = trl.kernels.chunked_divergence
    divergence.VOCAB_CHUNK_SIZE = min(divergence.VOCAB_CHUNK_SIZE, trainer.model.config.vocab_size)
    trainer.clock = clock
    clock.save = trainer.save_model
    teacher = trainer.teacher_model.base_model
    teacher.forward = clock.timed("score", teacher.forward)
    trainer.train()
    print(json.dumps({"began": clock.began, "tokens": clock.tokens, "cpu_s": clock.cpu_s, "steps": clock.steps,
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()

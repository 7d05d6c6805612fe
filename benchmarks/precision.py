"""
What computing in bf16 costs in the learner: throughout, as it is done, or under autocast alone.

    python benchmarks/precision.py        # a minute

The toy's student in bf16 answers, by the hf engine; the learner's log-probs of these answers are compared with what
the engine has recorded (w = p / mu at lag 0), and the gradient of one batch with that in float32.

    log w std   standard deviation of log w over the tokens: 0 if the learner rounds as the engine does
    gradient    norm of the difference from the gradient in float32, relative to that gradient's norm

Last line: one JSON object, {"throughout": {"log_w_std", "gradient"}, "autocast": {..}}: the figures of docs/using.md.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from step_off import Toy  # noqa: E402

from data.toy import toy_models  # noqa: E402
from learner import Learner  # noqa: E402
from models import sharding  # noqa: E402
from models.alignment import by_length  # noqa: E402

BATCH = 48


def gradient(toy: Toy, segments: list, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of all parameters, flat, and log w of the emitted tokens, of one batch without an update."""
    learner = Learner(toy.cfg, "cpu", dtype)
    tokens = sum(map(len, segments))
    measured = [learner.backward(group, tokens) for group in by_length(segments, toy.cfg.micro_tokens)]
    flat = torch.cat([p.grad.flatten().float() for p in learner.student.model.parameters()])
    return flat, torch.cat([m["w"] for m in measured]).log()


def main() -> None:
    torch.set_num_threads(1)
    models = [f"--{role}={folder}" for role, folder in zip(("student", "teacher"), toy_models(HERE.parent / "runs"))]
    toy = Toy([*models, "--dtype=bfloat16", f"--batch={BATCH}"], lag=0)
    segments = toy.generate()
    for group in by_length(segments, toy.cfg.micro_tokens):
        toy.teacher.score(group, toy.slots)
    exact, _ = gradient(toy, segments, torch.float32)
    found = {}
    throughout = sharding.compute_in
    for name, how in (("throughout", throughout), ("autocast", lambda model, dtype: None)):
        sharding.compute_in = how
        got, log_w = gradient(toy, segments, torch.bfloat16)
        found[name] = {"log_w_std": log_w.std().item(), "gradient": ((got - exact).norm() / exact.norm()).item()}
        print(f"{name:12}  log w std {found[name]['log_w_std']:.4f}   gradient {found[name]['gradient']:.1%}")
    sharding.compute_in = throughout
    print(json.dumps(found))


if __name__ == "__main__":
    main()

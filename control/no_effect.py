"""
Flags that cannot act in a run, because of its other flags. They are not refused: an experiment
changes one flag and leaves the rest of its command as it is. But the run says so at its start.

Only a flag that somebody wrote counts. A flag that contradicts another is refused (resolve.py).
Tests: tests/test_no_effect.py
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from config import Config
from control.command_line import Given
from estimators import ESTIMATORS


class Rule(NamedTuple):
    flag: str                              # by its name with dots
    idle: Callable[[Config], bool]         # whether it cannot act
    why: str                               # what follows "--beta 0.2"; {c} is the Config


def is_toy(c: Config) -> bool:
    return c.task == "toy"


def is_lockstep(c: Config) -> bool:
    return c.schedule != "async"


def evaluates_nothing(c: Config) -> bool:
    return c.eval.n == 0


def draws_no_candidates(c: Config) -> bool:
    return ESTIMATORS[c.estimator].support not in ("candidates", "teacher_mc")


def has_no_top_words(c: Config) -> bool:
    return ESTIMATORS[c.estimator].support not in ("student_topk", "sampled_topk",
                                                   "teacher_topk")


NO_EFFECT = (
    Rule("kl", lambda c: c.kl != ESTIMATORS[c.estimator].kl,
         "has no effect with {c.estimator}, which has the other KL"),
    Rule("mc_samples", draws_no_candidates,
         "has no effect with {c.estimator}, which draws no candidates"),
    Rule("draws", draws_no_candidates,
         "has no effect with {c.estimator}, which draws no candidates"),
    Rule("top_k", has_no_top_words, "has no effect with {c.estimator}, which has no top-k words"),
    Rule("beta", lambda c: "beta" not in ESTIMATORS[c.estimator].knobs,
         "has no effect with {c.estimator}"),
    Rule("max_ahead", lambda c: c.schedule == "sync",
         "has no effect with --schedule sync, which generates nothing ahead"),
    Rule("max_lag", is_lockstep,
         "has no effect with --schedule {c.schedule}, whose lag is constant"),
    Rule("max_lag", lambda c: c.schedule == "async" and c.overdue == "keep",
         "has no effect with --overdue keep"),
    Rule("overdue", is_lockstep,
         "has no effect with --schedule {c.schedule}, in which no response is overdue"),
    Rule("inflight", is_lockstep,
         "has no effect with --schedule {c.schedule}, in which a response ends under the weights "
         "that began it"),
    Rule("warmup", lambda c: c.warmup > c.steps * c.minibatches,
         "outlasts this run of {c.steps} x {c.minibatches} updates, so that --lr is never reached"),
    Rule("micro_tokens", lambda c: c.micro_tokens < c.max_prompt + c.max_response,
         "has no effect on a longer sequence, which has a forward pass of its own (--max-prompt "
         "{c.max_prompt}, --max-response {c.max_response})"),
    Rule("save_every", lambda c: c.save_every > c.steps,
         "has no effect in a run of {c.steps} steps"),
    Rule("overwrite", lambda c: c.overwrite and c.resume, "has no effect with --resume"),
    Rule("data.prompt_key", is_toy, "has no effect with --task toy, whose rows have no keys"),
    Rule("data.answer_key", is_toy, "has no effect with --task toy, whose rows have no keys"),
    Rule("data.eval_task", evaluates_nothing, "has no effect with --eval.n 0"),
    Rule("eval.k", evaluates_nothing, "has no effect with --eval.n 0"),
    Rule("eval.temperature", evaluates_nothing, "has no effect with --eval.n 0"),
    Rule("eval.teacher", lambda c: c.eval.teacher and c.eval.n == 0,
         "has no effect with --eval.n 0"),
    Rule("eval.every", lambda c: c.eval.every > 0 and c.eval.n == 0,
         "has no effect with --eval.n 0"),
    Rule("eval.every", lambda c: c.eval.every >= c.steps and c.eval.n > 0,
         "has no effect in a run of {c.steps} steps, which evaluates at its start and its end"),
)


def notes(cfg: Config, given: Given) -> list[str]:
    """A line for every flag that was given and cannot act. `cfg`: resolved."""
    written = given.meant
    if "kl" in written:                    # the estimator has decided cfg.kl
        cfg = replace(cfg, kl=written["kl"])
    return [f"{given.shown(rule.flag)} {rule.why.format(c=cfg)}" for rule in NO_EFFECT
            if rule.flag in written and rule.idle(cfg)]

"""
Advice, once in a run on several GPUs: which split would have been faster, by how busy the roles have been.

It is said and never done: a role cannot change its GPU in the middle of a run. What is left out:
whether the other split fits (--dry-run says that).
Tests: tests/test_split.py
"""
from __future__ import annotations

from collections.abc import Mapping

from config import Config
from control.command_line import NOTHING
from control.estimate import splits

AFTER = 10               # batches of this start of the run
FULL = 0.8               # a role that works for less of the time is not what the others wait for
GAIN = 1.1               # what a split must gain to be worth a word


def advice(cfg: Config, busy: Mapping[str, float]) -> str:
    """One line; "" if no split is known to be faster. It counts on a role's work being shared out
    evenly; the engines' is not quite, since all of them read the weights in every step.

    busy    by role, the share of the time that its workers have worked, on average
    """
    if cfg.gpus <= 2 or cfg.extend or cfg.schedule == "sync" or max(busy.values()) < FULL:
        return ""
    work = {"rollout": busy["rollout"] * cfg.rollouts, "teacher": busy["teacher"] * cfg.teachers,
            "learner": busy["learner"] * cfg.learners}           # in workers that never wait

    def fullest(other: Config) -> float:
        return max(work["rollout"] / other.rollouts, work["teacher"] / other.teachers,
                   work["learner"] / other.learners)

    best = min(splits(cfg, NOTHING), key=fullest)
    gain = fullest(cfg) / fullest(best)
    if gain < GAIN:
        return ""
    shares = ", ".join(f"{role} {share:.0%}" for role, share in busy.items())
    return (f"busy so far: {shares}. --rollouts {best.rollouts} --teachers {best.teachers} "
            f"--learners {best.learners} would be up to {gain:.1f} x faster, if it fits (--dry-run)")

"""
Which role runs on which device, and what fits there.

Tests: tests/test_cli.py
"""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncopd import Config


def plan(cfg: Config) -> dict[str, str]:
    """worker -> device. GPU 0.. generate, then the teacher, the last one learns; a single GPU is shared by all."""
    roles = [f"rollout{i}" for i in range(cfg.rollouts)] + [f"teacher{i}" for i in range(cfg.teachers)] + ["learner"]
    if cfg.gpus == 0:
        return {role: "cpu" for role in roles}
    return {role: f"cuda:{min(i, cfg.gpus - 1)}" for i, role in enumerate(roles)}

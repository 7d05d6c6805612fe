"""
Preflight, the room: memory of every device, and the disk of the run folder.

Tests: tests/test_plan.py, tests/test_bad_input.py
"""
from __future__ import annotations

import shutil
from pathlib import Path

from config import Config, in_bf16, require
from control import plan
from extension import ModelPair
from models import footprint
from models.footprint import Shape


def check_memory(cfg: Config, models: ModelPair,
                 added: plan.Additions) -> tuple[list[plan.Need], dict[str, float]]:
    """What every worker takes, and GB free by device. Raises ValueError where that is too little.
    """
    free = footprint.free_gb()
    needs = plan.memory(cfg, models.student, models.teacher, free.get("gpu", 0.0), added)
    plan.check(needs, free)
    return needs, free


def check_disk(cfg: Config, student: Shape, added: plan.Additions) -> None:
    """Refuse a disk too small for the student and, with --save-every, for its checkpoints.

    Files of an earlier run in --out count as free: they are among these checkpoints, or are
    deleted.
    """
    half = in_bf16(cfg)
    weights = student.P * (2 if half else 4)
    learned = student.adapters(cfg.lora_rank) if cfg.lora_rank else student.P
    training = learned * (12 if half else 8)     # AdamW's moments; float32 weights unless they are
    training += 1e9 * added.gb.get("checkpoint", 0.0)
    kept = checkpoints_at_once(cfg)
    need = weights + kept * (weights + training)
    free = free_bytes(cfg)
    require(need < free,
            f"--out {cfg.out}: {need / 1e9:,.1f} GB for the student and {kept} checkpoints "
            f"(--faults.keep), where {free / 1e9:,.1f} are free")


def checkpoints_at_once(cfg: Config) -> int:
    """Those that are kept, and one that is being written."""
    if cfg.save_every == 0:
        return 0
    written = cfg.steps // cfg.save_every
    if cfg.faults.keep == 0:
        return written + 1
    return min(cfg.faults.keep, written) + 1


def free_bytes(cfg: Config) -> int:
    out = Path(cfg.out)
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if cfg.resume or cfg.overwrite:
        free += sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return free

"""
The shared memory of a run, and what is printed before the run starts.

What is left out: whether there is enough memory (plan.py, preflight_memory.py).
Tests: tests/test_pipeline.py
"""
from __future__ import annotations

from cache import Slots
from config import Config, compute_dtype, each_flag, slot_count
from control import plan
from control.preflight import Job
from control.resolve import default_values
from estimators import ESTIMATORS
from extension import Extensions
from record import report
from transport.shared import SharedMemory
from transport.weights import TRANSPORTS


def allocate(cfg: Config, job: Job) -> SharedMemory:
    """Make what all processes share. The number of slots is explained in scheduler.Scheduler."""
    estimator = ESTIMATORS[cfg.estimator]
    extra = {name: (t.shape, t.dtype) for name, t in job.slot_tensors.items()}
    slots = Slots(slot_count(cfg), cfg.max_prompt, cfg.max_response,
                  estimator.columns(cfg.mc_samples, cfg.top_k),
                  hidden=job.hidden if estimator.support == "full" else 0,
                  dtype=compute_dtype(cfg), extra=extra, sparse=Extensions.load(cfg).sparse)
    weights = TRANSPORTS[cfg.transport](job.layout, job.probe, compute_dtype(cfg), cfg.out)
    return SharedMemory(slots, weights, job.shared_tensors, job.eval_prompts)


def memory_rows(cfg: Config, job: Job, shared: SharedMemory) -> list[list[str]]:
    """The table of the shared memory."""
    hidden_bytes = job.hidden * compute_dtype(cfg).itemsize
    scores = ESTIMATORS[cfg.estimator].bytes(cfg.mc_samples, cfg.top_k, hidden_bytes)
    tensors = [[f"a row of {name}", f"{size:,} bytes"]
               for name, size in plan.row_bytes(job.slot_tensors).items()]
    where = ", on the GPU of the first learner" if cfg.transport == "nccl" else ""
    return [[f"{len(shared.slots)} slots", f"{shared.slots.bytes / 2**20:,.1f} MiB"],
            [f"a token's scores ({cfg.estimator})", f"{scores:,} bytes"],
            *tensors,
            [f"published weights, twice{where}", f"{2 * shared.weights.nbytes / 2**20:,.1f} MiB"]]


def show_start(cfg: Config, job: Job, shared: SharedMemory) -> None:
    """Print who runs where, the shared memory, the changed flags and the first prompt."""
    defaults = default_values(cfg)
    changed = {name: value for name, value in each_flag(cfg) if value != defaults[name]}
    workers = plan.rows(*job.memory)
    report.show_start(plan.why(cfg), workers, memory_rows(cfg, job, shared), changed)
    report.show_prompt(job.notes, job.first_prompt)

"""
Which role runs on which device, and what fits there: arithmetic on the flags and on two model configurations.

Nothing here asks a GPU anything but how much memory is free, so that the plan for eight GPUs can be read on a laptop.
GB are 1e9 bytes. What is left out: buffers of libraries, and what an allocator loses to fragments: leave a tenth free.
Tests: tests/test_plan.py
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimators import ESTIMATORS
from extensions import oprd
from extensions.effopd import KEPT, PROMPTS
from models.footprint import Shape, chunk_size, logit_bytes

if TYPE_CHECKING:
    from asyncopd import Config

PROCESS_GB = {"rollout": 1.0, "teacher": 0.5, "learner": 0.5}      # interpreter and libraries; on a GPU its context
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "process")


# -- who runs where --------------------------------------------------------------------------------

def split(gpus: int, rollouts: int, teachers: int, learners: int, teacher_gpus: int = 1) -> tuple[int, int, int]:
    """Workers per role; what is not 0 stays. Eight GPUs: 4 generate, 1 scores, 3 learn; others in that proportion."""
    teachers = teachers or max(1, gpus // 8)
    rest = max(1, gpus - teachers * teacher_gpus)
    learners = learners or max(1, rest - rollouts if rollouts and gpus > 2 else 3 * rest // 7)
    return rollouts or max(1, rest - learners), teachers, learners


def plan(cfg: Config) -> dict[str, str]:
    """worker -> device. GPU 0.. generate, then the teachers, the last ones learn; a single GPU is shared by all.

    A teacher over several GPUs has them all in its device's name: cuda:4,5.
    """
    roles = [f"rollout{i}" for i in range(cfg.rollouts)] + [f"teacher{i}" for i in range(cfg.teachers)]
    roles += [f"learner{i or ''}" for i in range(cfg.learners)]
    if cfg.gpus == 0:
        return {role: "cpu" for role in roles}
    where, at = {}, 0
    for role in roles:
        n = cfg.teacher_gpus if role.startswith("teacher") else 1
        where[role] = "cuda:" + ",".join(str(min(i, cfg.gpus - 1)) for i in range(at, at + n))
        at += n
    return where


def each(device: str) -> list[str]:
    """cuda:4,5 -> cuda:4 and cuda:5."""
    kind, _, numbers = device.partition(":")
    return [f"{kind}:{n}" for n in numbers.split(",")] if numbers else [device]


def why(cfg: Config) -> str:
    """One line on the split, for the start of a run."""
    spread = f" on {cfg.teacher_gpus} GPUs each" if cfg.teacher_gpus > 1 else ""
    said = f"{cfg.rollouts} to generate, {cfg.teachers} to score{spread}, {cfg.learners} to learn"
    if cfg.gpus == 0:
        return f"no GPU: {said}, all on the same cores"
    if cfg.gpus <= 2:
        return f"{cfg.gpus} GPU{'s, one for generation' if cfg.gpus == 2 else ', shared by all'}: {said}"
    ours = split(cfg.gpus, 0, 0, 0, cfg.teacher_gpus) == (cfg.rollouts, cfg.teachers, cfg.learners)
    source = ("the paper's split of eight, or its proportion: a response is scored once, read and differentiated once, "
              "and written token by token" if ours else "as --rollouts, --teachers and --learners say")
    return f"{cfg.gpus} GPUs: {said} ({source}); `busy` in the last line of the log says who waits"


# -- what a model takes ----------------------------------------------------------------------------

# -- what fits -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Need:
    """What a worker takes of its device, GB by part (PARTS); the worker `shared` is memory that all processes see."""
    worker: str
    device: str
    parts: dict[str, float]

    @property
    def gb(self) -> float:
        return sum(self.parts.values())


def memory(cfg: Config, student: Shape, teacher: Shape, gpu_gb: float = 0.0) -> list[Need]:
    """Every worker's need, and that of the shared memory. `gpu_gb` is the size of a GPU, for vLLM's share of it.

    A micro-batch is at most --micro-tokens, or one response of the greatest length if that is more.
    """
    half, row, itemsize = cfg.gpus > 0, ESTIMATORS[cfg.estimator], 2 if cfg.gpus else 4
    longest = cfg.max_prompt + cfg.max_response
    tokens = max(longest, min(cfg.micro_tokens, cfg.batch * longest))
    where, full = plan(cfg), teacher.V * teacher.H * itemsize if row.support == "full" else 0
    P, W = oprd.shape(cfg, student, teacher)
    needs = []
    for worker, device in where.items():
        role = worker.rstrip("0123456789")
        if role == "learner":
            n, trained = cfg.learners, student.adapters(cfg.lora_rank) if cfg.lora_rank else student.P
            compute = 2 * student.P if half else 0         # bf16 copies that autocast or FSDP makes and backward reads
            if n > 1:                                      # two layers at a time, and embedding and head
                compute = (2 if half else 4) * (2 * student.P // student.L + 2 * student.V * student.H)
            parts = dict(weights=4 * student.P / n + compute + full, gradients=4 * trained / n,
                         optimizer=8 * trained / n,
                         activations=tokens * (student.activations(half, cfg.gradient_checkpointing) + 4 * W),
                         logits=min(tokens, chunk_size(cfg, student.V)) * student.V * logit_bytes(row.support, half)
                         + half * 4 * student.V * student.H)          # the head's weight in bf16, and its gradient
            if cfg.effopd == "accuracy":                   # it generates: keys that are normed are float32
                parts["cache"] = min(PROMPTS, cfg.max_running) * longest * student.cached(4)
        elif role == "teacher":      # no backward pass: a layer's widest moment, and log-probs of 1,024 positions
            parts = dict(weights=itemsize * teacher.P / cfg.teacher_gpus,
                         activations=itemsize * tokens * (4 * teacher.H + teacher.A + 2 * teacher.K + 3 * teacher.I
                                                          + (W > 0) * teacher.L * teacher.H),
                         logits=1024 * teacher.V * (8 + 2 * half))
            if cfg.teacher_engine == "vllm":
                parts["cache"] = cache_bytes(cfg, teacher, "vllm", itemsize, gpu_gb)
            elif cfg.eval_teacher:                         # one answer at least
                parts["cache"] = longest * teacher.cached(itemsize) / cfg.teacher_gpus
        else:
            parts = dict(weights=itemsize * student.P * (1 if half else 2),      # on the CPU the copy of a push, too
                         cache=cache_bytes(cfg, student, cfg.engine, itemsize, gpu_gb))
        parts = {k: v / 1e9 for k, v in parts.items()} | {"process": PROCESS_GB[role]}
        needs += [Need(worker, d, parts) for d in each(device)]
    if half:      # transformers reads a model into the host's memory first, all workers at the same time
        given = cfg.oprd_weight > 0 and cfg.oprd_head and (student.V, student.H) == (teacher.V, teacher.H)
        head = row.support == "full" or given            # is what a learner wants of the teacher
        whole = itemsize * teacher.P * (cfg.learners * head + cfg.teachers * (
            cfg.teacher_engine == "hf" and cfg.teacher_gpus == 1))
        needs.append(Need("loading", "cpu", {"weights": (4 * student.P * cfg.learners + whole) / 1e9}))
    slot = (cfg.max_response * (row.bytes(cfg.mc_samples, cfg.top_k, teacher.H * itemsize) + 4) + 4 * longest
            + 2 * P * W)
    if cfg.effopd:        # the weights before a jump and those it is measured from; every learner has the gate's set
        kept = cfg.learners * min(KEPT, cfg.batch) * slot if cfg.effopd == "kl" else 0
        needs.append(Need("jumps", "cpu", {"weights": 8 * student.P / 1e9, "cache": kept / 1e9}))
    return [*needs, Need("shared", "shm", {"weights": 2 * student.P * itemsize / 1e9,
                                           "cache": (cfg.max_ahead + 1) * cfg.batch * slot / 1e9})]


def cache_bytes(cfg: Config, model: Shape, engine: str, itemsize: int, gpu_gb: float) -> float:
    """Keys and values of an engine. vLLM takes its share of a GPU whatever it needs, at least one response."""
    longest = (cfg.max_prompt + cfg.max_response) * model.cached(itemsize)
    if engine == "vllm":
        left = cfg.gpu_share * gpu_gb * 1e9 - itemsize * model.P if cfg.gpus else 1e9
        return max(longest, left)
    return longest * min(cfg.max_running, -(-(cfg.max_ahead + 1) * cfg.batch // cfg.rollouts))


REMEDY = {"weights": "a smaller model", "gradients": "a smaller student, more --learners, or --lora-rank",
          "optimizer": "a smaller student, more --learners, or --lora-rank",
          "activations": "--gradient-checkpointing, or a lower --max-response and --micro-tokens",
          "logits": "a lower --chunk", "cache": "a lower --max-ahead or --batch, --max-running or --gpu-share",
          "process": "fewer workers"}


def check(needs: list[Need], free: dict[str, float]) -> None:
    """Refuse what cannot fit, in one line. What is shared is the host's memory too."""
    for device, there in free.items():
        on = [n for n in needs if n.device == device or (device == "cpu" and n.device == "shm")]
        if (total := sum(n.gb for n in on)) > there:
            worst = max(on, key=lambda n: n.gb)
            part = max(worst.parts, key=worst.parts.get)
            raise ValueError(f"{', '.join(n.worker for n in on)}: {total:,.1f} GB on {device}, where {there:,.1f} are "
                             f"free; most of it is {worst.worker}'s {part}, {worst.parts[part]:,.1f} GB: "
                             f"{REMEDY[part]}")


def rows(needs: list[Need], free: dict[str, float]) -> list[list[str]]:
    """Cells of the table that is printed at the start, GB; the last column: free on that device."""
    total: dict[str, float] = defaultdict(float)
    out = [["GB", "device", *PARTS, "all", "free"]]
    for n in needs:
        total[n.device] += n.gb
        cells = [f"{n.parts[p]:,.2f}" if p in n.parts else "" for p in PARTS]
        out.append([n.worker, n.device, *cells, f"{n.gb:,.2f}", f"{free[n.device]:,.1f}" if n.device in free else ""])
    return out

"""
Which role runs on which device, and what fits there: arithmetic on the flags and on the shapes of
two models.

The only thing asked of a GPU is how much of its memory is free, so that the plan for eight GPUs
can be read on a laptop. GB are 1e9 bytes. What is left out: the buffers of libraries, and what an
allocator loses to fragmentation; leave a tenth of the memory free.
Tests: tests/test_plan.py
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from config import Config, compute_dtype, in_bf16, most_running, slot_count
from estimators import ESTIMATORS
from extension import Extensions, ModelPair, SlotTensor
from models.footprint import Shape, chunk_size, gpu_share, logit_bytes
from transport.direct import PARCEL_BYTES
from transport.process import worker_name

PROCESS_GB = 0.5                 # interpreter and libraries; on a GPU also its context
VLLM_GB = 0.5                    # the same of vLLM
REMEDY = {
    "weights": "a smaller model",
    "gradients": "a smaller student, more --learners, or --lora-rank",
    "optimizer": "a smaller student, more --learners, or --lora-rank",
    "activations": "--gradient-checkpointing, or a lower --max-response and --micro-tokens",
    "logits": "a model with fewer words",
    "cache": "a lower --max-ahead, --batch or --max-running",
    "extensions": "other flags of --extend, or none",
    "process": "fewer workers",
}
PARTS = tuple(REMEDY)            # of a worker's memory, in the order of the table


# -- who runs where -------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Placement:
    """A worker and its device: cpu, cuda:3, or cuda:4,5 for a teacher over two GPUs."""
    role: str                                # rollout, teacher or learner
    index: int                               # within its role, from 0
    device: str

    @property
    def name(self) -> str:
        """rollout0, teacher0, learner, learner1: as in the log."""
        return worker_name(self.role, self.index)

    @property
    def devices(self) -> list[str]:
        """One by one. Example: cuda:4,5 -> cuda:4 and cuda:5."""
        kind, _, numbers = self.device.partition(":")
        if not numbers:
            return [self.device]
        return [f"{kind}:{number}" for number in numbers.split(",")]


def split(gpus: int, rollouts: int, teachers: int, learners: int,
          teacher_gpus: int = 1) -> tuple[int, int, int]:
    """Rollout workers, teachers and learners. A number that is not 0 stays as it is.

    Of eight GPUs 4 generate, 1 scores and 3 learn; other numbers are split in that proportion.
    """
    if teachers == 0:
        teachers = max(1, gpus // 8)
    rest = max(1, gpus - teachers * teacher_gpus)
    if learners == 0:
        learners = 3 * rest // 7
        if rollouts > 0 and gpus > 2:
            learners = rest - rollouts
        learners = max(1, learners)
    if rollouts == 0:
        rollouts = max(1, rest - learners)
    return rollouts, teachers, learners


def plan(cfg: Config) -> list[Placement]:
    """Every worker's device: the first GPUs generate, then come the teachers, the last ones learn.

    Where there are fewer GPUs than workers, the last GPU is shared.
    """
    workers = {"rollout": cfg.rollouts, "teacher": cfg.teachers, "learner": cfg.learners}
    placed = []
    first = 0
    for role, count in workers.items():
        width = cfg.teacher_gpus if role == "teacher" else 1
        for index in range(count):
            numbers = [min(first + i, cfg.gpus - 1) for i in range(width)]
            device = "cuda:" + ",".join(str(number) for number in numbers)
            if cfg.gpus == 0:
                device = "cpu"
            placed.append(Placement(role=role, index=index, device=device))
            first += width
    return placed


def waves(cfg: Config, placed: list[Placement]) -> list[list[Placement]]:
    """In which order workers start: a wave begins when the one before is ready.

    vLLM measures a GPU's free memory while it starts, and fails or takes too little if others take
    or release some meanwhile. On a GPU that it shares it starts by itself, before them. A worker
    that is restarted later cannot wait for that.
    """
    engine = {"rollout": cfg.engine, "teacher": cfg.teacher_engine}
    on = Counter(device for p in placed for device in p.devices)
    first = [p for p in placed if engine.get(p.role) == "vllm" and p.device != "cpu"
             and any(on[device] > 1 for device in p.devices)]
    return [*([p] for p in first), [p for p in placed if p not in first]]


def why(cfg: Config) -> str:
    """One line about the split, for the start of a run."""
    spread = f" on {cfg.teacher_gpus} GPUs each" if cfg.teacher_gpus > 1 else ""
    counts = (f"{cfg.rollouts} to generate, {cfg.teachers} to score{spread}, "
              f"{cfg.learners} to learn")
    if cfg.gpus == 0:
        return f"no GPU: {counts}, all on the same cores"
    if cfg.gpus == 1:
        return f"1 GPU, shared by all: {counts}"
    if cfg.gpus == 2:
        return f"2 GPUs, one for generation: {counts}"
    source = "by the estimate of --dry-run, or as --rollouts, --teachers and --learners say"
    if split(cfg.gpus, 0, 0, 0, cfg.teacher_gpus) == (cfg.rollouts, cfg.teachers, cfg.learners):
        source = "the paper's split of eight, or its proportion"
    return (f"{cfg.gpus} GPUs: {counts} ({source}); `busy` in the last line of the log says who "
            "waits")


# -- slots and extensions -------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Additions:
    """The memory that the extensions of a run take. Without extensions there is none."""
    slot_tensors: Mapping[str, SlotTensor] = field(default_factory=dict)
    gb: Mapping[str, float] = field(default_factory=dict)        # Extension.extra_gb
    states: bool = False                     # the teacher's hidden states of some layer are read

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.slot_tensors.values())

    @property
    def row_values(self) -> int:
        """Numbers in a row of all slot tensors together."""
        return sum(math.prod(t.shape[1:]) for t in self.slot_tensors.values())


def additions(cfg: Config, extensions: Extensions, models: ModelPair) -> Additions:
    tensors = extensions.slot_tensors(models)
    size = slot_bytes(cfg, models.teacher, Additions(slot_tensors=tensors))
    gb = extensions.extra_gb(replace(models, slot_bytes=size))
    return Additions(slot_tensors=tensors, gb=gb, states=bool(extensions.teacher_layers))


def slot_bytes(cfg: Config, teacher: Shape, added: Additions) -> int:
    """Of one slot: its tokens, and for each new one its version, ids and log-probs."""
    estimator = ESTIMATORS[cfg.estimator]
    scores = estimator.bytes(cfg.mc_samples, cfg.top_k, teacher.H * itemsize(cfg))
    tokens = 4 * (cfg.max_prompt + cfg.max_response)
    return tokens + cfg.max_response * (scores + 4) + added.slot_bytes


def row_bytes(slot_tensors: Mapping[str, SlotTensor]) -> dict[str, int]:
    """By name, what a row of each of the extensions' tensors takes in a slot."""
    return {name: math.prod(t.shape[1:]) * t.dtype.itemsize for name, t in slot_tensors.items()}


def itemsize(cfg: Config) -> int:
    """Bytes of a number in the dtype of compute."""
    return compute_dtype(cfg).itemsize


# -- what each worker takes -----------------------------------------------------------------------

@dataclass(frozen=True)
class Need:
    """What a worker takes of its device, GB by part (PARTS). The worker `shared` is the memory
    that all processes see."""
    worker: str
    device: str
    parts: dict[str, float]

    @property
    def gb(self) -> float:
        return sum(self.parts.values())


def memory(cfg: Config, student: Shape, teacher: Shape, gpu_gb: float = 0.0,
           added: Additions | None = None) -> list[Need]:
    """Every worker's need, and that of the shared memory.

    gpu_gb: the size of a GPU, of which vLLM takes a share. A micro-batch has at most
    --micro-tokens, or one response of the greatest length if that is more.
    """
    added = added or Additions()
    needs = []
    for worker in plan(cfg):
        if worker.role == "learner":
            parts = learner_parts(cfg, student, teacher, added)
            if cfg.transport == "nccl" and worker.index == 0:
                parts["weights"] += 2 * student.P * itemsize(cfg)        # published twice
        elif worker.role == "teacher":
            parts = teacher_parts(cfg, teacher, gpu_gb, added)
        else:
            parts = rollout_parts(cfg, student, gpu_gb)
        parts = {name: size / 1e9 for name, size in parts.items()}
        parts["process"] = process_gb(cfg, worker.role)
        needs += [Need(worker.name, device, parts) for device in worker.devices]
    if cfg.gpus > 0:
        needs.append(loading(cfg, student, teacher))
    if "host" in added.gb:
        needs.append(Need("extensions", "cpu", {"extensions": added.gb["host"]}))
    shared = {"cache": slot_count(cfg) * slot_bytes(cfg, teacher, added) / 1e9}
    if cfg.transport != "nccl":
        shared = {"weights": 2 * student.P * itemsize(cfg) / 1e9} | shared     # published twice
    return [*needs, Need("shared", "shm", shared)]


def process_gb(cfg: Config, role: str) -> float:
    engines = {"rollout": cfg.engine, "teacher": cfg.teacher_engine}
    if engines.get(role) == "vllm":
        return PROCESS_GB + VLLM_GB
    return PROCESS_GB


def micro_batch(cfg: Config, responses: int) -> int:
    """The most tokens in a forward pass of learner or teacher, of at most so many responses."""
    longest = cfg.max_prompt + cfg.max_response
    return max(longest, min(cfg.micro_tokens, responses * longest))


def learner_parts(cfg: Config, student: Shape, teacher: Shape,
                  added: Additions) -> dict[str, float]:
    """Bytes of one learner: its shard of the student in float32, and a micro-batch."""
    half = in_bf16(cfg)
    support = ESTIMATORS[cfg.estimator].support
    tokens = micro_batch(cfg, math.ceil(cfg.batch / cfg.minibatches))
    n = cfg.learners
    trained = student.adapters(cfg.lora_rank) if cfg.lora_rank else student.P
    compute = 2 * student.P if half else 0   # bf16 copies, kept for the backward pass
    if n > 1:                                # two layers at a time, and embedding and head
        compute = itemsize(cfg) * (2 * student.P // student.L + 2 * student.V * student.H)
    teacher_head = teacher.V * teacher.H * itemsize(cfg) if support == "full" else 0
    # the head's weight in bf16, and its gradient; the positions whose logits exist at once
    head_copies = 4 * student.V * student.H if half else 0
    head_copies += longer_head(cfg, student)
    positions = min(tokens, chunk_size(cfg, student.V))
    per_token = student.activations(half, cfg.gradient_checkpointing) + 4 * added.row_values
    parts = {"weights": 4 * student.P / n + compute + teacher_head,
             "gradients": 4 * trained / n,
             "optimizer": 8 * trained / n,
             "activations": tokens * per_token,
             "logits": positions * student.V * logit_bytes(support, half) + head_copies}
    if "learner" in added.gb:
        parts["extensions"] = 1e9 * added.gb["learner"]
    return parts


def teacher_parts(cfg: Config, teacher: Shape, gpu_gb: float,
                  added: Additions) -> dict[str, float]:
    """Bytes of a teacher. There is no backward pass: only a layer's widest moment exists, and the
    log-probs of 1,024 positions; for an extension that reads hidden states, those of every layer.
    """
    width = 4 * teacher.H + teacher.A + 2 * teacher.K + 3 * teacher.I
    if added.states:
        width += teacher.L * teacher.H
    per_logit = 10 if in_bf16(cfg) else 8
    parts = {"weights": itemsize(cfg) * teacher.P / cfg.teacher_gpus,
             "activations": itemsize(cfg) * micro_batch(cfg, cfg.batch) * width,
             "logits": 1024 * teacher.V * per_logit + longer_head(cfg, teacher)}
    if cfg.teacher_engine == "vllm":
        parts["cache"] = cache_bytes(cfg, teacher, "teacher", gpu_gb)
    elif cfg.eval.teacher:                         # one answer at least
        longest = cfg.max_prompt + cfg.max_response
        parts["cache"] = longest * teacher.cached(itemsize(cfg)) / cfg.teacher_gpus
    return parts


def longer_head(cfg: Config, model: Shape) -> int:
    """Bytes of a bf16 head's weight in float32, which a CPU needs for a float32 product
    (models/head.product)."""
    return 4 * model.V * model.H if in_bf16(cfg) and cfg.gpus == 0 else 0


def rollout_parts(cfg: Config, student: Shape, gpu_gb: float) -> dict[str, float]:
    """Bytes of a rollout worker. On a CPU vLLM packs its weights: while new ones are loaded they
    exist twice. Transformers copies them into place."""
    weights = itemsize(cfg) * student.P
    if cfg.gpus == 0 and cfg.engine == "vllm":
        weights *= 2
    if cfg.transport == "nccl":              # parcels on their way; the embedding is the largest
        weights += 2 * max(PARCEL_BYTES, itemsize(cfg) * student.V * student.H)
    return {"weights": weights,
            "cache": cache_bytes(cfg, student, "rollout", gpu_gb)}


def cache_bytes(cfg: Config, model: Shape, role: str, gpu_gb: float) -> float:
    """Keys and values of an engine. vLLM takes its share of a GPU whatever it needs, and at least
    that of one response."""
    longest = (cfg.max_prompt + cfg.max_response) * model.cached(itemsize(cfg))
    engine = cfg.engine if role == "rollout" else cfg.teacher_engine
    if engine == "vllm":
        room = 1e9
        if cfg.gpus > 0:
            room = gpu_share(cfg, role) * gpu_gb * 1e9 - itemsize(cfg) * model.P
        return max(longest, room)
    return longest * most_running(cfg)


def loading(cfg: Config, student: Shape, teacher: Shape) -> Need:
    """While a run starts: transformers reads a model into the host's memory first, in all workers
    at the same time."""
    readers = 0                                    # of the teacher's weights
    if ESTIMATORS[cfg.estimator].support == "full":
        readers += cfg.learners                    # for its head
    if cfg.teacher_engine == "hf" and cfg.teacher_gpus == 1:
        readers += cfg.teachers
    size = 4 * student.P * cfg.learners + itemsize(cfg) * teacher.P * readers
    return Need("loading", "cpu", {"weights": size / 1e9})


# -- what fits ------------------------------------------------------------------------------------

def check(needs: list[Need], free: dict[str, float]) -> None:
    """Raise ValueError where a device has too little memory. Shared memory is the host's too."""
    for device, available in free.items():
        on_it = [n for n in needs if n.device == device or (device == "cpu" and n.device == "shm")]
        total = sum(n.gb for n in on_it)
        if total > available:
            worst = max(on_it, key=lambda n: n.gb)
            part = max(worst.parts, key=worst.parts.get)
            names = ", ".join(n.worker for n in on_it)
            raise ValueError(f"{names}: {total:,.1f} GB on {device}, where {available:,.1f} are "
                             f"free; most of it is {worst.worker}'s {part}, "
                             f"{worst.parts[part]:,.1f} GB: {REMEDY[part]}")


def rows(needs: list[Need], free: dict[str, float]) -> list[list[str]]:
    """Cells of the table at the start, GB. The last column is what is free on that device."""
    used = [part for part in PARTS if any(part in n.parts for n in needs)]
    table = [["GB", "device", *used, "all", "free"]]
    for n in needs:
        cells = [f"{n.parts[part]:,.2f}" if part in n.parts else "" for part in used]
        available = f"{free[n.device]:,.1f}" if n.device in free else ""
        table.append([n.worker, n.device, *cells, f"{n.gb:,.2f}", available])
    return table

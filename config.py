"""
Every flag of the core: its name, default, bounds and meaning.

A flag is a field of a frozen dataclass, and the text under a field is its help.
control/command_line.py turns the command line and a YAML file into a `Config`, control/resolve.py
fills in what a value of 0 or "auto" stands for. The flags of an extension are its own
(extension.py); their values are in `Config.extensions`.

What is left out: checks of more than one value (control/resolve.py, control/preflight.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch

from estimators import DEFAULT, ESTIMATORS


def require(condition: object, message: str) -> None:
    """Refuse bad input: a ValueError that names the value and the remedy. The command ends with
    exit code 2."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Bound:
    """The values that a number may take: finite ones, `least` and `most` among them, `above` not.
    """
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def allows(self, value: float) -> bool:      # an int may be too large for math.isfinite
        return self.above < value < math.inf and self.least <= value <= self.most

    def __str__(self) -> str:
        if self.above > -math.inf:
            low = f"must be above {self.above:,}"
        elif self.least == 0:
            low = "must not be negative"
        else:
            low = f"must be at least {self.least:,}"
        if self.most == math.inf:
            return f"{low}, and finite"
        return f"{low}, and at most {self.most:,}"


LARGEST = 2**31 - 1                              # slots count in int32

Count = Annotated[int, Bound(above=0, most=LARGEST)]         # how many, at least one
CountOrZero = Annotated[int, Bound(least=0, most=LARGEST)]   # 0: see the text under the field
Positive = Annotated[float, Bound(above=0)]
NotNegative = Annotated[float, Bound(least=0)]
Workers = Annotated[int, Bound(least=0, most=1024)]          # of one role; 0 chooses by --gpus

KL = Literal[tuple(DEFAULT)]
EstimatorName = Literal["auto", *ESTIMATORS]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: a divergence of student p and teacher q on the student's responses."""
    kl: KL = "reverse"
    """divergence: reverse is KL(p || q), forward is KL(q || p)"""
    mc_samples: Count = 4
    """N, the number of candidate tokens per position of the Monte Carlo estimators"""
    draws: Literal["auto", "iid", "optimal"] = "auto"
    """how the N tokens are chosen (draws.py): iid draws them independently, as the paper does;
    optimal keeps the probable ones and samples the rest, without bias and with less variance; auto
    is optimal where the estimator and the extensions allow it"""
    top_k: Count = 16
    """K, the number of tokens per position of the top-k estimators"""
    estimator: EstimatorName = "auto"
    """a row of the table in docs/estimators.md; auto chooses by --kl"""
    beta: Annotated[float, Bound(least=0, most=1)] = 0.5
    """for --estimator jsd_dense: 0 is the forward KL, 1 the reverse KL"""


@dataclass(frozen=True, kw_only=True)
class Models:
    """Two models with the same tokenizer, and the prompts to train on."""
    student: str = ""
    """model to train: a folder or a hub name"""
    teacher: str = ""
    """model to learn from: a folder or a hub name"""
    task: str = ""
    """prompts: toy, FILE.jsonl, FILE.parquet or hf:DATASET[:CONFIG][:SPLIT]"""


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """How far generation may run ahead of training. The lag of a token is the number of versions
    between the weights that drew it and the weights that train on it."""
    schedule: Literal["async", "sync", "step-off"] = "async"
    """when responses are generated:
    async: all the time, up to --max-ahead batches ahead of training;
    sync: only after training on the batch before, so that the lag is 0 and nothing overlaps;
    step-off: those of batch j under version j - max_ahead, so that the lag is constant"""
    max_ahead: CountOrZero = 4
    """train batches that generation may run ahead; sets the memory and the mean lag"""
    max_lag: CountOrZero = 16
    """largest lag of a trained token, in versions; at least --max-ahead"""
    overdue: Literal["cut", "wait", "drop", "keep"] = "cut"
    """what happens to a running response that would exceed --max-lag:
    cut: train what it has, and continue the rest under new weights;
    wait: hold the learner until it ends;
    drop: discard it;
    keep: train it late, beyond --max-lag"""
    inflight: Literal["recompute", "keep", "finish"] = "recompute"
    """what running responses do when new weights arrive:
    recompute: continue under them, once the hidden states so far are computed again;
    keep: continue under them, with the keys and values so far, which are of older weights;
    finish: end under the old weights first"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, optimizer, lengths and sampling."""
    steps: Count = 200
    """train batches until the end of the run"""
    batch: Count = 256
    """responses per train batch"""
    minibatches: Count = 1
    """optimizer updates per train batch"""
    lr: Annotated[float, Bound(above=0, most=1)] = 3e-6
    """learning rate of AdamW"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """shape of the learning rate after the warm-up"""
    warmup: CountOrZero = 0
    """optimizer updates over which the learning rate rises to --lr"""
    weight_decay: Annotated[float, Bound(least=0, most=100)] = 0.01
    """weight decay of AdamW"""
    clip: Positive = 1.0
    """largest norm of the gradient"""
    lora_rank: CountOrZero = 0
    """train only LoRA adapters of this rank, on every linear layer; 0 trains all weights"""
    seed: Annotated[int, Bound(least=0, most=2**32 - 1)] = 0
    """seed of the order of prompts and of every draw"""
    max_prompt: Count = 2048
    """longest prompt, in tokens; where the default does not fit, it follows from the models"""
    max_response: Count = 16384
    """longest response, in tokens; where the default does not fit, it follows from the models"""
    temperature: Annotated[float, Bound(least=0.01, most=100)] = 1.0
    """temperature at which the student samples"""
    top_p: Annotated[float, Bound(above=0, most=1)] = 1.0
    """nucleus from which the student samples"""
    micro_tokens: Count = 16384
    """tokens, padding included, in a forward pass of learner and teacher"""
    gradient_checkpointing: bool = False
    """keep only the input of each layer for the backward pass, and compute the rest again"""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """GPUs, and how many workers of each role share them."""
    gpus: Annotated[int, Bound(least=-1, most=1024)] = -1
    """GPUs to use; 0 runs everything on the CPU, -1 uses all that this machine has"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """numbers that all models compute in; the learner's own weights, what it adds up and every
    log-prob stay float32; auto is bfloat16 on GPUs and float32 on a CPU"""
    rollouts: Workers = 0
    """rollout workers, which generate; 0 chooses by --gpus"""
    teachers: Workers = 0
    """teacher workers, which score; 0 chooses by --gpus"""
    teacher_gpus: Annotated[int, Bound(least=1, most=1024)] = 1
    """GPUs of each teacher, over which its layers are spread; for a teacher larger than a GPU"""
    learners: Workers = 0
    """learner workers, over which the one student is sharded; 0 chooses by --gpus"""
    engine: str = "auto"
    """what generates: vllm or hf (transformers); auto is vllm where it is installed"""
    teacher_engine: str = "hf"
    """what scores: hf or vllm; vllm serves only estimators that need log-probs or top-k of it"""
    transport: str = "shared"
    """how new weights reach the rollout workers: shared is the host's memory, nccl goes from the
    learner's GPU to theirs"""
    max_running: Annotated[int, Bound(least=1, most=65_536)] = 256
    """responses that an engine generates at the same time"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is recorded, and what it continues from."""
    config: str = ""
    """YAML file of flags, which flags of the command line override"""
    dry_run: bool = False
    """print models, devices, memory and the expected bottleneck, then stop"""
    out: str = ""
    """run folder; without this flag runs/<task>-<time>"""
    overwrite: bool = False
    """empty the run folder if there is a run in it"""
    resume: bool = False
    """continue from the newest checkpoint in --out, with the flags of that run"""
    save_every: CountOrZero = 0
    """steps between checkpoints; 0 saves on an interrupt only, and the student at the end"""
    log: str = "none"
    """tracker that receives what log.jsonl records: wandb, tensorboard, trackio, or none"""
    extend: str = ""
    """extensions to switch on, separated by commas: names from extensions/, or Python files"""


@dataclass(frozen=True, kw_only=True)
class Data:
    """How the rows of --task become prompts, and on which rows to evaluate."""
    prompt_key: str = "prompt"
    """key of a row's prompt, a text or a list of messages; a.b looks inside a record, a,b takes
    the first that is there"""
    answer_key: str = "answer"
    """key of a row's answer; a row without one is trained on, but not graded; a key that is given
    must be there in some row"""
    filter: str = ""
    """rows to train on: KEY OP VALUE [and ...]; example: difficulty>=6"""
    template: str = "{prompt}"
    """text around every prompt, which stands in the place of {prompt}, the only place there is"""
    suffix: str = ""
    """text after every prompt"""
    thinking: bool = False
    """enable_thinking of the student's chat template"""
    long_prompts: Literal["skip", "refuse"] = "skip"
    """what happens to prompts longer than --max-prompt: skip and count them, or refuse the task"""
    eval_task: str = ""
    """rows to evaluate on, written like --task; without this flag, rows held out from the task"""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation of the student on rows that are not trained on."""
    every: CountOrZero = 0
    """steps between evaluations; 0 evaluates at the start and at the end only"""
    n: Annotated[int, Bound(least=0, most=100_000)] = 200
    """rows to evaluate on"""
    k: Annotated[int, Bound(least=1, most=4096)] = 1
    """answers per row, for avg@k and pass@k"""
    temperature: Annotated[float, Bound(least=0, most=100)] = 0.0
    """temperature of these answers; 0 is greedy"""
    teacher: bool = False
    """evaluate the teacher too, with one greedy answer per row"""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a run survives."""
    keep: CountOrZero = 2
    """newest checkpoints to keep; 0 keeps all"""
    restarts: CountOrZero = 3
    """restarts of rollout and teacher workers, in all, before the run gives up"""
    stall_s: Annotated[float, Bound(above=0, most=366 * 86_400)] = 900.0
    """seconds without a sign of life after which a worker counts as dead"""
    skips: Count = 3
    """successive updates that may be skipped as not finite before the run gives up"""


# Flat flags, in the order of --help
GROUPS = {"objective": Objective, "model": Models, "staleness": Staleness, "training": Training,
          "machine": Machines, "run": Run}


@dataclass(frozen=True, kw_only=True)
class Config(Objective, Models, Staleness, Training, Machines, Run):
    """All flags of a run. `extensions`: by the name of each one that is switched on, the values of
    its own flags."""
    data: Data = field(default_factory=Data)
    eval: Eval = field(default_factory=Eval)
    faults: Faults = field(default_factory=Faults)
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)


NESTED = {"data": Data, "eval": Eval, "faults": Faults}      # --data.filter, --eval.n, ...


def compute_dtype(cfg: Config) -> torch.dtype:
    """The dtype of --dtype: of matrix products, published weights and what the engines hold."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if cfg.gpus > 0 else torch.float32
    return getattr(torch, cfg.dtype)


def in_bf16(cfg: Config) -> bool:
    return compute_dtype(cfg) == torch.bfloat16


def slot_count(cfg: Config) -> int:
    """Slots of a run: control/scheduler.py says what this number bounds."""
    return (cfg.max_ahead + 1) * cfg.batch


def most_running(cfg: Config) -> int:
    """Responses that a rollout worker can have at the same time: each holds a slot. An engine that
    is used without a run has none (rollouts 0), and needs none."""
    if cfg.rollouts == 0:
        return cfg.max_running
    return min(cfg.max_running, math.ceil(slot_count(cfg) / cfg.rollouts))


def flag_of(name: str) -> str:
    """The flag that sets a field. Example: data.prompt_key -> --data.prompt-key."""
    return "--" + name.replace("_", "-")


def each_flag(flags: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of every flag of a dataclass of flags and of those inside it."""
    for f in fields(flags):
        value = getattr(flags, f.name)
        if is_dataclass(value):
            yield from each_flag(value, f"{prefix}{f.name}.")
        elif f.name == "extensions":
            for extension, values in value.items():
                for name, x in values.items():
                    yield f"{extension}.{name}", x
        else:
            yield f"{prefix}{f.name}", value


def each_type(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, type) of every flag of a dataclass of flags and of those inside it; a type
    is an Annotated one where the flag has a `Bound`."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            yield from each_type(hint, f"{prefix}{name}.")
        elif name != "extensions":
            yield f"{prefix}{name}", hint


def check_values(flags: Any, prefix: str = "") -> None:
    """Raise ValueError for a number outside the bound in its field's type, and for a text that no
    file could hold. `flags`: any dataclass of flags."""
    hints = get_type_hints(type(flags), include_extras=True)
    for f in fields(flags):
        value = getattr(flags, f.name)
        flag = flag_of(prefix + f.name)
        if is_dataclass(value):
            check_values(value, f"{prefix}{f.name}.")
        elif isinstance(value, str):
            check_text(flag, value)
        else:
            check_bound(flag, value, hints[f.name])


def check_bound(flag: str, value: Any, hint: Any) -> None:
    """`hint`: the type of a field, which may hold a `Bound`."""
    for bound in getattr(hint, "__metadata__", ()):
        if isinstance(bound, Bound):
            require(bound.allows(value), f"{flag} {value}: {bound}")


def check_text(flag: str, text: str) -> None:
    """Refuse what no path, no log and no terminal takes: a null byte, bytes that are no UTF-8."""
    require("\0" not in text, f"{flag} {text!r}: holds a null byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} {text!r}: is not UTF-8") from None

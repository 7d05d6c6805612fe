"""
Every flag of the core: its name, default, bounds and meaning. Nothing is derived here.

A flag is a field of a frozen dataclass, and the text under a field is its help. control/command_line.py turns the
command line and a YAML file into a `Config`, control/resolve.py fills in what a value of 0 or "auto" stands for. The
flags of an extension are its own (extension.py); their values are in `Config.extensions`.

What is left out: checks that look at more than one value (control/resolve.py, control/preflight.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from estimators import DEFAULT, ESTIMATORS


def require(condition: object, message: str) -> None:
    """Refuse bad input: a ValueError that names the value and the remedy. The command ends with exit code 2."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Bound:
    """The values that a number may take; they include `least` and `most` and exclude `above`."""
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most and value > self.above

    def __str__(self) -> str:
        if self.above > -math.inf:
            low = f"above {self.above:g}"
        elif self.least == 0 and self.most == math.inf:
            return "must not be negative"
        else:
            low = f"at least {self.least:g}"
        if self.most == math.inf:
            return f"must be {low}"
        return f"must be {low} and at most {self.most:g}"


Count = Annotated[int, Bound(above=0)]                  # how many, at least one
CountOrZero = Annotated[int, Bound(least=0)]            # 0 has a meaning of its own, which the help text states
Positive = Annotated[float, Bound(above=0)]
NotNegative = Annotated[float, Bound(least=0)]

KL = Literal[tuple(DEFAULT)]
EstimatorName = Literal["auto", *ESTIMATORS]


@dataclass(frozen=True, kw_only=True)
class Objective:
    kl: KL = "reverse"
    """divergence to minimise, student p and teacher q: reverse is KL(p || q), forward is KL(q || p)"""
    mc_samples: Count = 4
    """N, the number of candidate words per position"""
    top_k: Count = 16
    """K, the number of words per position of the top-k estimators"""
    estimator: EstimatorName = "auto"
    """row of the table in estimators.py; auto follows from --kl"""
    beta: Annotated[float, Bound(least=0, most=1)] = 0.5
    """interpolation of --estimator jsd_dense: 0 is the forward KL, 1 the reverse KL"""


@dataclass(frozen=True, kw_only=True)
class Models:
    student: str = ""
    """folder or hub name of the model to train"""
    teacher: str = ""
    """folder or hub name of the model to learn from"""
    task: str = ""
    """prompts to train on: toy, FILE.jsonl, FILE.parquet or hf:DATASET[:CONFIG][:SPLIT]"""


@dataclass(frozen=True, kw_only=True)
class Staleness:
    schedule: Literal["async", "sync", "step-off"] = "async"
    """sync: lag 0 and no overlap; step-off: batch j is drawn as a whole under version j - max_ahead"""
    max_ahead: CountOrZero = 4
    """number of train batches that generation may run ahead; sets the memory and the mean lag"""
    max_lag: CountOrZero = 16
    """largest lag of a trained token, in versions; at least --max-ahead"""
    overdue: Literal["cut", "wait", "drop", "keep"] = "cut"
    """what happens to a response that would exceed --max-lag. cut: train what it has and continue the rest under new
    weights; wait: hold the learner until it ends; drop: discard it; keep: train it late"""
    inflight: Literal["recompute", "finish"] = "recompute"
    """what running responses do when new weights arrive. recompute: continue under them after their context is
    computed again; finish: end under the old weights first"""


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: Count = 200
    """number of train batches"""
    batch: Count = 256
    """responses per train batch"""
    minibatches: Count = 1
    """optimizer updates per train batch"""
    lr: Positive = 3e-6
    """learning rate of AdamW"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """shape of the learning rate after the warm-up"""
    warmup: CountOrZero = 0
    """optimizer updates over which the learning rate rises to --lr"""
    weight_decay: NotNegative = 0.01
    """weight decay of AdamW"""
    clip: Positive = 1.0
    """largest norm of the gradient"""
    lora_rank: CountOrZero = 0
    """rank of LoRA adapters on every linear layer, which alone are trained; 0 trains all weights"""
    seed: CountOrZero = 0
    """seed of the prompt order and of every draw"""
    max_prompt: Count = 2048
    """longest prompt, in tokens"""
    max_response: Count = 16384
    """longest response, in tokens"""
    temperature: Positive = 1.0
    """temperature at which the student samples"""
    top_p: Annotated[float, Bound(above=0, most=1)] = 1.0
    """nucleus from which the student samples"""
    micro_tokens: Count = 16384
    """padded tokens per forward pass of learner and teacher"""
    gradient_checkpointing: bool = False
    """keep only the input of each layer for the backward pass and compute the rest again"""


@dataclass(frozen=True, kw_only=True)
class Machines:
    gpus: int = -1
    """number of GPUs to use; 0 runs everything on the CPU, -1 uses all there are"""
    rollouts: CountOrZero = 0
    """number of rollout workers; 0 chooses by the number of GPUs"""
    teachers: CountOrZero = 0
    """number of teacher workers; 0 chooses by the number of GPUs"""
    teacher_gpus: Count = 1
    """GPUs over which each teacher is spread, layer by layer, when it is larger than one GPU"""
    learners: CountOrZero = 0
    """number of learner workers, over which one student is sharded; 0 chooses by the number of GPUs"""
    engine: str = "auto"
    """what generates: vllm or hf; auto is vllm where it is installed"""
    teacher_engine: str = "hf"
    """what scores: hf or vllm; vllm serves the estimators that need only scores or the teacher's best words"""
    max_running: Count = 256
    """responses that an engine generates at the same time"""


@dataclass(frozen=True, kw_only=True)
class Run:
    config: str = ""
    """YAML file of flags; a flag on the command line overrides it"""
    dry_run: bool = False
    """print models, devices, memory and the expected bottleneck, then stop"""
    out: str = ""
    """run folder; by default runs/<task>-<time>"""
    overwrite: bool = False
    """empty the run folder if a run is in it"""
    resume: bool = False
    """continue from the newest checkpoint in --out, with the flags of that run"""
    save_every: CountOrZero = 0
    """steps between checkpoints; 0 saves only on an interrupt, and the student at the end"""
    log: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    """tracker that receives the numbers of log.jsonl as well"""
    extend: str = ""
    """extensions to switch on, separated by commas: names from extensions/ or paths of Python files"""


@dataclass(frozen=True, kw_only=True)
class Data:
    prompt_key: str = "prompt"
    """key of the prompt in a row of the task; a.b looks inside a record, a,b takes the first that is there"""
    answer_key: str = "answer"
    """key of the answer; a row without one is trained on and not graded"""
    filter: str = ""
    """rows to train on: KEY OP VALUE [and ...], for example difficulty>=6"""
    template: str = "{prompt}"
    """text in which {prompt} is replaced by the prompt"""
    suffix: str = ""
    """text that follows every prompt"""
    thinking: bool = False
    """enable_thinking of the student's chat template"""
    long_prompts: Literal["skip", "refuse"] = "skip"
    """what happens to prompts longer than --max-prompt: skip and count them, or refuse the task"""
    eval_task: str = ""
    """rows for evaluation, written like --task; by default some rows of the task are held out"""


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: CountOrZero = 0
    """steps between evaluations; 0 evaluates only at the start and at the end"""
    n: CountOrZero = 200
    """number of rows to evaluate on"""
    k: Count = 1
    """answers to each row, for avg@k and pass@k"""
    temperature: NotNegative = 0.0
    """temperature of these answers; 0 is greedy"""
    teacher: bool = False
    """evaluate the teacher too, with one greedy answer per row"""


@dataclass(frozen=True, kw_only=True)
class Faults:
    keep: CountOrZero = 2
    """number of newest checkpoints to keep; 0 keeps all"""
    restarts: CountOrZero = 3
    """how often rollout and teacher workers are restarted, in all, before the run ends"""
    stall_s: Positive = 900.0
    """seconds without a sign of life after which a worker counts as dead"""
    skips: Count = 3
    """consecutive updates that may be skipped because they are not finite before the run ends"""


GROUPS = {"objective": Objective, "models": Models, "staleness": Staleness, "training": Training,
          "machines": Machines, "run": Run}          # flat flags, in the order of --help


@dataclass(frozen=True, kw_only=True)
class Config(Objective, Models, Staleness, Training, Machines, Run):
    """All flags of a run. `extensions`: for each one that is switched on, by name, the values of its own flags."""
    data: Data = field(default_factory=Data)
    eval: Eval = field(default_factory=Eval)
    faults: Faults = field(default_factory=Faults)
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)


NESTED = {"data": Data, "eval": Eval, "faults": Faults}      # --data.prompt-key, --eval.n, --faults.keep


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


def check_bounds(flags: Any, prefix: str = "") -> None:
    """Raise ValueError for a number outside the bound that stands with its field, for any dataclass of flags."""
    hints = get_type_hints(type(flags), include_extras=True)
    for f in fields(flags):
        value = getattr(flags, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{prefix}{f.name}.")
        for bound in getattr(hints[f.name], "__metadata__", ()):
            if isinstance(bound, Bound):
                require(bound.allows(value), f"{flag_of(prefix + f.name)} {value}: {bound}")

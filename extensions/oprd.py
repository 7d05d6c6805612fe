"""
OPRD (arXiv 2606.06021): on the student's own rollouts, bring its hidden states to those of the teacher.

    L = mean over layers l, mean over positions t, of |h_student - h_teacher|^2 / d          --estimator none: L alone
                                                                                     --oprd-weight c: divergence + c L
h is what leaves block l, the last one past the final norm, at the position that predicts a new token: rows that come
from models import alignment
from alignment.response_rows, nothing shifts here. Student layer i of S is compared with teacher layer
round(i (T - 1) / (S - 1)). The target follows from the tokens and from a frozen teacher, so there is no importance
weight, whatever the lag. The LM head gets no gradient: it is a copy of the teacher's (--oprd-head), or needs a KL.

The teacher must be of the student's origin: a continuation of it, whose directions mean the same. `fit` measures that
on rollouts of the initial student, before the run, so that no slot waits for it; and with --oprd-rank it finds what the
teacher's states are projected to before they are cached, 2 * rank bytes per layer and token instead of 2 * d:
    same origin   x = P'(h - m) on both sides: mean m and top eigenvectors P of the teacher's states (rank d: raw)
    --oprd-bridge another width or origin: the teacher's x as above, the student's by least squares onto it; both are
                  compared as unit vectors, |x_student - x_teacher|^2 / rank
What is left out: fitting anew as the student moves; a bridge that learns. Tests: tests/test_oprd.py
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cache import Segment, Slots

if TYPE_CHECKING:
    from config import Config
    from estimators import Estimator
    from models.footprint import Shape

FILE = "oprd.safetensors"            # in the run folder: what `fit` found
ROLLOUTS = {False: 256, True: 2000}  # of `fit`; for a bridge
LONGEST = 256                        # of these, tokens
ALIKE = 0.5                          # mean cosine of two states from which on they are of the same origin


# -- what is compared ------------------------------------------------------------------------------

def pairs(which: str, S: int, T: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), 0-based, of S and T. Example: all, 3, 5 -> (0, 0), (1, 2), (2, 4)."""
    chosen = {"all": range(S), "even": range(0, S, 2), "odd": range(1, S, 2), "last": range(S - 1, S)}[which]
    return [(i, round(i * (T - 1) / (S - 1)) if S > 1 else T - 1) for i in chosen]


def compared(cfg: Config, s: Segment) -> slice:
    """Which of a segment's new tokens. After a cut `first` counts from the beginning of the response."""
    first = max(0, cfg.oprd_tokens - (s.start - s.prompt))
    return {"last": slice(max(0, len(s) - cfg.oprd_tokens), len(s)), "first": slice(0, min(first, len(s))),
            "all": slice(0, len(s))}[cfg.oprd_positions]


def shape(cfg: Config, student: Shape, teacher: Shape) -> tuple[int, int]:
    """Of the states in a slot: positions P, and values W for each, 2 bytes a value."""
    P = cfg.max_response if cfg.oprd_positions == "all" else min(cfg.max_response, cfg.oprd_tokens)
    W = len(pairs(cfg.oprd_layers, student.L, teacher.L)) * (cfg.oprd_rank or teacher.H)
    return (P, W) if cfg.oprd_weight else (0, 0)


class Side:
    """One of the two models: its layers, one per pair, and how their states are shown to the other side."""

    def __init__(self, cfg: Config, who: Literal["student", "teacher"], device: torch.device | str):
        counts = (text_config(name).num_hidden_layers for name in (cfg.student, cfg.teacher))
        self.cfg, self.layers = cfg, [pair[who == "teacher"] for pair in pairs(cfg.oprd_layers, *counts)]
        self.mean = self.basis = None                              # [pairs, d], [pairs, d, rank]
        if cfg.oprd_rank:
            found = load_file(Path(cfg.out) / FILE)
            self.mean, self.basis = (found[f"{who}.{x}"].to(device) for x in ("mean", "basis"))

    def pick(self, rows: Tensor, segments: list[Segment]) -> Tensor:
        """Of rows [M, d] at all new tokens of the segments, those that are compared [m, d]."""
        parts = zip(rows.split([len(s) for s in segments]), segments)
        return torch.cat([x[compared(self.cfg, s)] for x, s in parts])

    def show(self, pair: int, states: Tensor) -> Tensor:
        """[m, d] -> [m, rank], or as they are; float32."""
        if self.basis is None:
            return states.float()
        return (states.to(self.basis.device).float() - self.mean[pair]) @ self.basis[pair]

    def record(self, states: list[Tensor], segments: list[Segment], slots: Slots) -> None:
        """The teacher: write what the slots of these segments hold, from [m, d] of every pair."""
        shown, at = torch.cat([self.show(i, x).bfloat16().cpu() for i, x in enumerate(states)], 1), 0
        for s in segments:
            n = slots.compared[s.slot] = len(range(len(s))[compared(self.cfg, s)])
            slots.states[s.slot, :n], at = shown[at:at + n], at + n

    def distance(self, states: list[Tensor], cached: Tensor) -> Tensor:
        """The student: the loss at a position [m], from [m, d] of every pair and what the teacher has recorded."""
        total = torch.zeros(len(cached), device=cached.device)
        for i, (h, theirs) in enumerate(zip(states, cached.float().chunk(len(states), 1))):
            ours, d = self.show(i, h), h.shape[1]
            if self.cfg.oprd_bridge:
                ours, theirs, d = normalize(ours), normalize(theirs), self.cfg.oprd_rank
            total = total + (ours - theirs).square().sum(1) / d
        return total / len(states)


# -- before the run --------------------------------------------------------------------------------

def settle(cfg: Config, row: Estimator) -> Config:
    """Refuse flags that cannot be; put in what the others mean by them."""
    weight = cfg.oprd_weight if row.head else cfg.oprd_weight or 1.0
    for f in fields(cfg):
        weight or not f.name.startswith("oprd_") or getattr(cfg, f.name) == f.default or refuse(
            f"--{f.name.replace('_', '-')} {getattr(cfg, f.name)}: without OPRD (--oprd-weight 1, --estimator none)")
    weight == 0 or cfg.teacher_engine == "hf" or refuse(
        f"--teacher-engine vllm: {f'--oprd-weight {weight:g}' if row.head else '--estimator none'} needs the teacher's "
        "hidden states, which vLLM does not give (--teacher-engine hf does)")
    return replace(cfg, oprd_weight=weight, oprd_rank=cfg.oprd_rank or 8 * cfg.oprd_bridge)


def check(cfg: Config, student: Shape, teacher: Shape) -> None:
    """Refuse a pair of models whose states cannot be compared as the flags say."""
    if cfg.oprd_weight:
        student.H == teacher.H or cfg.oprd_bridge or refuse(
            f"--teacher {cfg.teacher}: its states are {teacher.H} wide, the student's {student.H} (--oprd-bridge)")
        cfg.oprd_rank <= teacher.H or refuse(f"--oprd-rank {cfg.oprd_rank}: the teacher's states are {teacher.H} wide")
        pairs(cfg.oprd_layers, student.L, teacher.L) or refuse(
            f"--oprd-layers {cfg.oprd_layers}: the student has {student.L} layer (--oprd-layers all)")


@torch.no_grad()
def fit(cfg: Config, prompts: list[list[int]], device: str, dtype: torch.dtype) -> bytes:
    """What both sides read from FILE, from rollouts of the initial student. Raises ValueError for another origin."""
    from data.prompts import prompt_number
    from engines.hf import HFEngine
    from models.alignment import by_length
    from models.loading import load_model
    engine, teacher = HFEngine(cfg, device, dtype), load_model(cfg.teacher, device, dtype)
    asked = [prompts[prompt_number(i, len(prompts), cfg.seed)] for i in range(ROLLOUTS[cfg.oprd_bridge])]
    answers = engine.complete(asked, min(LONGEST, cfg.max_response), temperature=1.0)
    segments = [Segment(-1, torch.tensor(x + y), len(x), len(x), *[torch.empty(len(y), 0)] * 4)
                for x, y in zip(asked, answers)]
    layers = pairs(cfg.oprd_layers, *(text_config(name).num_hidden_layers for name in (cfg.student, cfg.teacher)))
    sums, found = [Sums() for _ in layers], defaultdict(list)
    for group in by_length(segments, cfg.micro_tokens):
        ours, theirs = states(engine.model, group), states(teacher, group)
        for x, (i, j) in zip(sums, layers):
            x.add(ours[i], theirs[j], cfg.oprd_rank, cfg.oprd_bridge)
    for x, (i, j) in zip(sums, layers):
        (cosine := x.cosine / x.n) >= ALIKE or cfg.oprd_bridge or refuse(
            f"--teacher {cfg.teacher}: of another origin than the student: at its layer {i} and the teacher's {j} the "
            f"mean cosine of their states is {cosine:.2f}, below {ALIKE} (--oprd-bridge)")
        for name, value in x.solve(cfg.oprd_rank, cfg.oprd_bridge).items():
            found[name].append(value.float().cpu())      # layers may lie on several GPUs
    return save({name: torch.stack(values).contiguous() for name, values in found.items()})


class Sums:
    """Over the states of one pair, in float64: cosines, states, products; for a bridge of both sides in one row."""

    def __init__(self):
        self.n = self.cosine = self.total = self.products = 0

    def add(self, ours: Tensor, theirs: Tensor, rank: int, bridge: bool) -> None:
        ours, theirs = ours.double(), theirs.to(ours.device).double()
        x = torch.cat([ours, theirs], 1) if bridge else theirs
        self.n, self.width = self.n + len(x), theirs.shape[1]
        self.cosine = self.cosine + (torch.nan if bridge else cosine_similarity(ours, theirs).sum())
        if rank:
            self.total, self.products = self.total + x.sum(0), self.products + x.T @ x

    def solve(self, rank: int, bridge: bool) -> dict[str, Tensor]:
        """What is in FILE, of this pair: means [d] and bases [d, rank] of both sides, if they are projected."""
        cosine = {"cosine": torch.as_tensor(self.cosine / self.n)}
        if rank == 0:
            return cosine
        d, mean = self.width, self.total / self.n
        covariance = self.products / self.n - torch.outer(mean, mean)
        ours = basis = torch.linalg.eigh(covariance[-d:, -d:]).eigenvectors.flip(1)[:, :rank]
        if bridge:                           # least squares, with intercept, onto what the teacher shows
            ours = torch.linalg.pinv(covariance[:-d, :-d], hermitian=True) @ covariance[:-d, -d:] @ basis
        return cosine | {"teacher.mean": mean[-d:], "teacher.basis": basis,
                         "student.mean": mean[:len(ours)], "student.basis": ours}


def states(model, group: list[Segment]) -> list[Tensor]:
    """Of every layer, [M, d] at the new tokens."""
    from models.alignment import pad, response_rows
    tokens, mask = pad(group, model.device)
    out = model.base_model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return [response_rows(x, group) for x in out.hidden_states[1:]]


def gives_head(cfg: Config) -> bool:
    """Does the student begin with the teacher's LM head? Not with a tied one: the embedding would come along."""
    a, b = ((c.vocab_size, c.hidden_size, c.tie_word_embeddings) for c in map(text_config, (cfg.student, cfg.teacher)))
    return cfg.oprd_head and cfg.lora_rank == 0 and a == b and not a[2]


def note(cfg: Config, row: Estimator) -> list[str]:
    """What a person should know before the run."""
    return [] if row.head or gives_head(cfg) else [
        "the student keeps its LM head, which OPRD alone does not train (--kl reverse --oprd-weight 10 does)"]


def text_config(folder: str):
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(folder).get_text_config()


def refuse(message: str):
    raise ValueError(message)

"""
OPRD (arXiv 2606.06021): on the student's own rollouts, bring its hidden states to the teacher's.

    L = mean over layers l, mean over positions t, of |h_student - h_teacher|^2 / d

    --extend oprd --oprd.weight c                divergence + c L
    --extend oprd --estimator none               L alone

h is what leaves block l, the last one past the final norm, at the position that predicts a new
token. Student layer i of S is compared with teacher layer round(i (T - 1) / (S - 1)). The target
follows from the tokens and from a frozen teacher, so that there is no importance weight, whatever
the lag. Alone, L gives the LM head no gradient: the head is a copy of the teacher's (--oprd.head),
or a divergence has to train it.

The teacher should descend from the student's base model or be its continuation: then directions in
both spaces mean the same. `prepare` measures that on rollouts of the initial student. With
--oprd.rank it also finds what the teacher's states are projected to before they are cached, at
2 * rank bytes per layer and token instead of 2 * d:

    same descent   x = P'(h - m) on both sides, with the mean m and the top eigenvectors P of the
                   teacher's states (rank d: the raw states)
    --oprd.bridge  another width or descent: the teacher's x as above, the student's by least
                   squares onto it. Both are compared as unit vectors, |x_s - x_t|^2 / rank

What is left out: fitting again as the student moves; a bridge that learns. After a cut, "last"
counts from the end of each piece.
Shapes: M new tokens, m of them compared; d width of a state; P compared positions of a slot.
Tests: tests/test_oprd.py
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cache import Segment, Slots
from config import Config, Count, CountOrZero, Positive, require
from data.prompts import prompt_number
from engines.hf import HFEngine
from estimators import ESTIMATORS
from extension import Extension, ModelPair, Outcome, SlotTensor, Step, prepared_file
from models.alignment import by_length, pad, response_rows
from models.loading import load_head, load_model, text_config

STATES = "oprd_states"               # slot tensor: the teacher's states at compared positions
ROLLOUTS = {False: 256, True: 2000}  # with which `prepare` works; for a bridge
LONGEST = 256                        # of these, tokens
ALIKE = 0.5                          # from this mean cosine on two states count as related


class OPRD(Extension):
    """The distance between hidden states, as a loss."""

    @dataclass(frozen=True)
    class Flags:
        weight: Positive = 1.0
        """factor of the distance between hidden states in the loss"""
        rank: CountOrZero = 0
        """project the teacher's states to this rank before they are cached; 0 caches them whole"""
        layers: Literal["all", "even", "odd", "last"] = "all"
        """layers of the student that are compared"""
        positions: Literal["last", "first", "all"] = "last"
        """positions of a response that are compared: the last or first --oprd.tokens, or all; the
        last ones of each piece, if it was cut"""
        tokens: Count = 2000
        """how many, see --oprd.positions"""
        bridge: bool = False
        """compare unit vectors of a fitted projection: for a teacher of another width or
        descent"""
        head: bool = True
        """start with a copy of the teacher's LM head where the shapes agree"""

    METRICS = {"oprd": "distance between hidden states of student and teacher, mean over compared "
                       "positions and layers; --oprd.weight times it is minimised, and it is no "
                       "part of `loss`"}
    fixed_on_resume = ("weight", "rank", "layers", "bridge", "teacher")
    loss_over = STATES

    def __init__(self, name: str, cfg: Config, flags: Any):
        super().__init__(name, cfg, flags)
        self.rank = flags.rank or (8 if flags.bridge else 0)
        self.layer_counts: tuple[int, int] | None = None     # of student and teacher
        self.distances: list[Tensor] = []            # of the current step, by micro-batch [m]
        self.projection: StateProjection | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(student layer, teacher layer) that are compared."""
        if self.layer_counts is None:
            ours, theirs = text_config(self.cfg.student), text_config(self.cfg.teacher)
            self.layer_counts = (ours.num_hidden_layers, theirs.num_hidden_layers)
        return layer_pairs(self.flags.layers, *self.layer_counts)

    @property
    def student_layers(self) -> list[int]:
        return [student for student, _ in self.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        return [teacher for _, teacher in self.pairs]

    # -- the parent

    def check(self, models: ModelPair) -> list[str]:
        flags = self.flags
        self.layer_counts = (models.student.L, models.teacher.L)
        require(self.cfg.teacher_engine == "hf",
                f"--teacher-engine {self.cfg.teacher_engine}: --extend oprd needs the teacher's "
                "hidden states, which vLLM does not give (--teacher-engine hf does)")
        ours = models.student.H
        theirs = models.teacher.H
        require(ours == theirs or flags.bridge,
                f"--teacher {self.cfg.teacher}: its states are {theirs} wide, the student's "
                f"{ours} (--oprd.bridge compares them all the same)")
        require(self.rank <= theirs,
                f"--oprd.rank {self.rank}: the teacher's states are {theirs} wide")
        require(self.pairs,
                f"--oprd.layers {flags.layers}: the student has {models.student.L} layer "
                "(--oprd.layers all)")
        require(not getattr(models.student_config, "sliding_window", None),
                f"--student {self.cfg.student}: has a sliding window, which the rollouts of "
                "--extend oprd would ignore")
        file = prepared_file(self.cfg, self.name)
        require(not self.cfg.resume or self.rank == 0 or file.exists(),
                f"--resume: {file} is gone, and without it the states cannot be projected as "
                "before")
        copied = self.copies_head(models.student_config, models.teacher_config)
        if ESTIMATORS[self.cfg.estimator].head or copied:
            return []
        return ["the student keeps its LM head, which --estimator none does not train "
                "(--kl reverse --extend oprd --oprd.weight 10 does)"]

    def copies_head(self, ours: Any, theirs: Any) -> bool:
        """Whether the student starts with the teacher's LM head, from their configurations. Not a
        tied one: the embedding would come along."""
        same = (ours.vocab_size, ours.hidden_size) == (theirs.vocab_size, theirs.hidden_size)
        tied = ours.tie_word_embeddings or theirs.tie_word_embeddings
        return self.flags.head and self.cfg.lora_rank == 0 and same and not tied

    def slot_tensors(self, models: ModelPair) -> dict[str, SlotTensor]:
        positions = self.cfg.max_response
        if self.flags.positions != "all":
            positions = min(positions, self.flags.tokens)
        pairs = layer_pairs(self.flags.layers, models.student.L, models.teacher.L)
        width = len(pairs) * (self.rank or models.teacher.H)
        return {STATES: SlotTensor((positions, width), torch.bfloat16)}

    def extra_gb(self, models: ModelPair) -> dict[str, float]:
        """On GPUs: while a learner starts, the teacher that it takes the head from. Where the
        estimator wants that head as well, it is counted already."""
        counted = ESTIMATORS[self.cfg.estimator].support == "full"
        copied = self.copies_head(models.student_config, models.teacher_config)
        if self.cfg.gpus == 0 or counted or not copied:
            return {}
        return {"host": self.cfg.learners * 2 * models.teacher.P / 1e9}

    @torch.no_grad()
    def prepare(self, prompts: list[list[int]], device: str,
                dtype: torch.dtype) -> dict[str, Tensor]:
        """The projections of both sides, from rollouts of the initial student.

        Raises ValueError for a teacher whose states are not related to the student's.
        """
        cfg = self.cfg
        engine = HFEngine(cfg, device, dtype)
        teacher = load_model(cfg.teacher, device, dtype)
        segments = rollouts(cfg, engine, prompts, ROLLOUTS[self.flags.bridge])
        sums = [Sums(self.rank, self.flags.bridge) for _ in self.pairs]
        for group in by_length(segments, cfg.micro_tokens):
            ours = all_states(engine.model, group)
            theirs = all_states(teacher, group)
            for x, (i, j) in zip(sums, self.pairs):
                x.add(ours[i], theirs[j])
        found = defaultdict(list)
        for x, (i, j) in zip(sums, self.pairs):
            self.check_related(x.mean_cosine, i, j)
            for name, value in x.solve().items():
                found[name].append(value.float().cpu())  # layers may lie on several GPUs
        return {name: torch.stack(values).contiguous() for name, values in found.items()}

    def check_related(self, cosine: float, i: int, j: int) -> None:
        require(self.flags.bridge or cosine >= ALIKE,
                f"--teacher {self.cfg.teacher}: is not related to the student: at its layer {i} "
                f"and the teacher's {j} the mean cosine of their states is {cosine:.2f}, below "
                f"{ALIKE} (--oprd.bridge compares them all the same)")

    # -- a teacher worker

    def record(self, states: list[Tensor], segments: list[Segment], slots: Slots) -> None:
        if self.projection is None:
            self.projection = self.load_projection("teacher")
        parts = []
        for pair, x in enumerate(states):
            chosen = self.pick(x, segments)
            parts.append(self.projection.show(pair, chosen).bfloat16().cpu())
        shown = torch.cat(parts, 1)
        at = 0
        for s in segments:
            rows = self.compared(s)
            n = rows.stop - rows.start
            slots.used[STATES][s.slot] = n
            slots.extra[STATES][s.slot, :n] = shown[at:at + n]
            at += n

    def compared(self, s: Segment) -> slice:
        """Which of a segment's new tokens. After a cut "first" counts from the beginning of the
        response, and "last" from the end of each piece: when a piece is scored and trained, nobody
        knows yet where the response ends."""
        n = len(s)
        if self.flags.positions == "last":
            return slice(max(0, n - self.flags.tokens), n)
        if self.flags.positions == "first":
            first = max(0, self.flags.tokens - (s.start - s.prompt))
            return slice(0, min(first, n))
        return slice(0, n)

    def pick(self, rows: Tensor, segments: list[Segment]) -> Tensor:
        """Of rows [M, d] at all new tokens of the segments, those that are compared [m, d]."""
        parts = zip(rows.split([len(s) for s in segments]), segments)
        return torch.cat([x[self.compared(s)] for x, s in parts])

    def load_projection(self, side: Literal["student", "teacher"]) -> StateProjection:
        if self.rank == 0:
            return StateProjection()
        found = self.prepared()
        return StateProjection(found[f"{side}.mean"], found[f"{side}.basis"])

    # -- a learner

    def attach(self, learner: Any, saved: Mapping[str, Tensor]) -> None:
        """The projection of the student's states; at the start of a run, the teacher's head."""
        self.ranks = learner.ranks
        self.device = learner.student.device
        self.projection = self.load_projection("student")
        configs = text_config(self.cfg.student), text_config(self.cfg.teacher)
        if not learner.continues and self.copies_head(*configs):
            student = learner.student
            theirs = load_head(self.cfg.teacher, "cpu", student.dtype)
            for name, p in student.head.named_parameters():
                p.data.copy_(self.ranks.part(theirs.get_parameter(name).data, p))

    def loss(self, states: list[Tensor], segments: list[Segment]) -> Tensor:
        """weight * the distance at a compared position [m]."""
        cached = torch.cat([s.extra[STATES] for s in segments]).to(self.device)
        chosen = [self.pick(x, segments) for x in states]
        distance = self.distance(chosen, cached)
        self.distances.append(distance.detach().cpu())
        return self.flags.weight * distance

    def distance(self, states: list[Tensor], cached: Tensor) -> Tensor:
        """The mean over layers of the distance [m], from states [m, d] of every pair of layers and
        what the teacher has recorded."""
        total = torch.zeros(len(cached), device=cached.device)
        for pair, (h, theirs) in enumerate(zip(states, cached.float().chunk(len(states), 1))):
            ours = self.projection.show(pair, h)
            d = h.shape[1]
            if self.flags.bridge:
                ours = normalize(ours)
                theirs = normalize(theirs)
                d = self.rank
            total = total + (ours - theirs).square().sum(1) / d
        return total / len(states)

    def after_step(self, step: Step) -> Outcome:
        mine = torch.cat([torch.empty(0), *self.distances])
        self.distances = []
        if any(part["y"].isnan().any() for part in step.measured):       # an update was not made
            mine = torch.tensor([torch.nan])
        every = torch.cat(self.ranks.all(mine))
        return Outcome(metrics={"oprd": every.mean().item()})        # nan: nothing was compared


class StateProjection:
    """How the states of one model are shown to the other side: projected, or as they are."""

    def __init__(self, mean: Tensor | None = None, basis: Tensor | None = None):
        """mean [pairs, d], basis [pairs, d, rank]."""
        self.mean = mean
        self.basis = basis

    def show(self, pair: int, states: Tensor) -> Tensor:
        """[m, d] -> [m, rank], or [m, d] as they are; float32."""
        if self.basis is None:
            return states.float()
        if self.basis.device != states.device:
            self.mean = self.mean.to(states.device)
            self.basis = self.basis.to(states.device)
        return (states.float() - self.mean[pair]) @ self.basis[pair]


def layer_pairs(which: str, S: int, T: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), 0-based, of S and T. Example: all, 3, 5 -> (0, 0), (1, 2),
    (2, 4)."""
    chosen = {"all": range(S), "even": range(0, S, 2), "odd": range(1, S, 2),
              "last": range(S - 1, S)}[which]
    if S == 1:
        return [(i, T - 1) for i in chosen]
    return [(i, round(i * (T - 1) / (S - 1))) for i in chosen]


# -- before the run ------------------------------------------------------------------------------

def rollouts(cfg: Config, engine: HFEngine, prompts: list[list[int]], n: int) -> list[Segment]:
    """Answers of the initial student to the first n prompts of the run."""
    asked = [prompts[prompt_number(i, len(prompts), cfg.seed)] for i in range(n)]
    answers = engine.complete(asked, min(LONGEST, cfg.max_response), temperature=1.0)
    segments = []
    for prompt, answer in zip(asked, answers):
        blank = torch.empty(len(answer), 0)
        segments.append(Segment(slot=-1, tokens=torch.tensor(prompt + answer), prompt=len(prompt),
                                start=len(prompt), version=torch.zeros(len(answer)), ids=blank,
                                logpi=blank, logmu=blank, logq=blank))
    return segments


def all_states(model, group: list[Segment]) -> list[Tensor]:
    """The states of every layer, [M, d] at the new tokens."""
    tokens, mask = pad(group, model.device)
    out = model.base_model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return [response_rows(x, group) for x in out.hidden_states[1:]]


class Sums:
    """Over the states of one pair of layers, in float64: cosines, states, products of states. For
    a bridge both sides stand in one row."""

    def __init__(self, rank: int, bridge: bool):
        self.rank = rank
        self.bridge = bridge
        self.n = 0
        self.width = 0                               # of the teacher's states
        self.cosine = 0.0
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """States [M, d] of both sides at the same positions."""
        ours = ours.double()
        theirs = theirs.to(ours.device).double()
        x = torch.cat([ours, theirs], 1) if self.bridge else theirs
        self.n += len(x)
        self.width = theirs.shape[1]
        if self.bridge:
            self.cosine = torch.nan                  # of two different spaces it says nothing
        else:
            self.cosine = self.cosine + cosine_similarity(ours, theirs).sum()
        if self.rank:
            self.total = self.total + x.sum(0)
            self.products = self.products + x.T @ x

    @property
    def mean_cosine(self) -> float:
        return float(self.cosine / self.n)

    def solve(self) -> dict[str, Tensor]:
        """What `prepare` keeps of this pair: the cosine; with a rank the means [d] and the bases
        [d, rank] of both sides."""
        cosine = {"cosine": torch.as_tensor(self.cosine / self.n)}
        if self.rank == 0:
            return cosine
        d = self.width
        mean = self.total / self.n
        covariance = self.products / self.n - torch.outer(mean, mean)
        eigenvectors = torch.linalg.eigh(covariance[-d:, -d:]).eigenvectors
        basis = eigenvectors.flip(1)[:, :self.rank]
        ours = basis
        if self.bridge:          # least squares, with intercept, onto what the teacher shows
            inverse = torch.linalg.pinv(covariance[:-d, :-d], hermitian=True)
            ours = inverse @ covariance[:-d, -d:] @ basis
        return cosine | {"teacher.mean": mean[-d:], "teacher.basis": basis,
                         "student.mean": mean[:len(ours)], "student.basis": ours}

"""
From tokens to log-probs: alignment, and the teacher, which fills in the scores of the slots that it is given.

`response_rows` is the only place where a sequence is shifted; teacher, learner and engine all go through it. The
teacher is a plain transformers forward pass, exact, with its own full normaliser; what it writes beside logq (its top
K, draws of its own, its last hidden state) is what the table entry of the running estimator asks for. Only ids come in:
nothing is ever tokenized twice. engines/vllm_teacher.py holds the same two methods in vLLM.
Tests: tests/test_cache.py, tests/test_supports.py, tests/test_teacher.py
"""
from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cache import Segment, Slots
from estimators import ESTIMATORS, LOG_MIN, LOG_RATIO_MAX, draw
from extensions import oprd
from models.alignment import by_length, kept_rows, pad, response_rows
from models.head import teacher_logq
from models.loading import load_model, stop_ids, vocab_size

if TYPE_CHECKING:
    from config import Config
    from transport.link import Link

# -- models and alignment --------------------------------------------------------------------------

@torch.no_grad()
def score(model, segments: list[Segment], slots: Slots, support: str, vocab: int, *, seed: int = 0,
          chunk: int = 1024, side: oprd.Side | None = None) -> None:
    """Write the teacher's log-probs, float32, into logq, and what else `support` and `side` ask of the teacher."""
    (tokens, mask), head = pad(segments, model.device), model.get_output_embeddings()
    out = model.base_model(input_ids=tokens, attention_mask=mask, output_hidden_states=side is not None)
    if side:
        side.record([side.pick(response_rows(out.hidden_states[1 + i], segments), segments) for i in side.layers],
                    segments, slots)
    rows = kept_rows(response_rows(out.last_hidden_state, segments).to(head.weight.device), segments)      # of several
    ids, at = torch.cat([s.ids for s in segments]).long().to(rows.device), 0
    if support == "teacher_mc":      # numbers of its own for every token: another stream than that of the rollout
        u = kept_rows(torch.cat([torch.from_numpy(np.random.default_rng([seed, int(slots.uid[s.slot]), s.start, 1])
                      .random((len(s), ids.shape[1] - 1))) for s in segments]), segments).to(rows.device)
    logq = torch.empty(ids.shape, device=rows.device)
    for i in range(0, len(rows), chunk):
        part = slice(i, i + chunk)
        every = teacher_logq(head, rows[part], vocab)
        if support == "teacher_topk":
            ids[part, 1:] = every.topk(ids.shape[1] - 1).indices
        if support == "teacher_mc":
            ids[part, 1:] = draw(every, u[part])[0]
        logq[part] = every.gather(-1, ids[part])
    for s in segments:
        m = len(s.ids)
        slots.ids[s.slot, :m] = ids[at:at + m].int().cpu()
        slots.logq[s.slot, :m] = logq[at:at + m].cpu()
        if support == "full":
            slots.hidden[s.slot, :m] = rows[at:at + m].cpu()
        at += m


@torch.no_grad()
def complete(model, prompts: list[list[int]], max_new: int, stop: list[int],
             each_step: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Greedy answers through transformers' own generate; used once, for the teacher's accuracy."""
    from transformers import GenerationConfig
    ear = SimpleNamespace(put=lambda _: each_step(), end=lambda: None)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    plain = GenerationConfig(max_new_tokens=max_new, do_sample=False, eos_token_id=stop or None,      # and not the
                             pad_token_id=(stop or [0])[0])                # model's own, with penalties that shift it
    out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=plain, streamer=ear)
    return out[:, longest:].tolist()


# -- the worker ------------------------------------------------------------------------------------

class HFTeacher:
    """The teacher in transformers: every support, and the reference for `engines.vllm_teacher.VLLMTeacher`."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.model = load_model(cfg.teacher, device, dtype)
        self.support, self.vocab, self.seed = ESTIMATORS[cfg.estimator].support, vocab_size(cfg.student), cfg.seed
        self.side = oprd.Side(cfg, "teacher", self.model.device) if cfg.oprd_weight else None

    def score(self, segments: list[Segment], slots: Slots) -> None:
        score(self.model, segments, slots, self.support, self.vocab, seed=self.seed, side=self.side)

    def complete(self, prompts: list[list[int]], max_new: int, stop: list[int],
                 each_step: Callable[[], None] = lambda: None) -> list[list[int]]:
        return complete(self.model, prompts, max_new, stop, each_step)


def vllm_teacher(cfg: Config, device: str, dtype: torch.dtype):
    from engines import vllm_teacher  # and with it vLLM: only where it is asked for
    return vllm_teacher.VLLMTeacher(cfg, device, dtype)


TEACHERS = {"hf": HFTeacher, "vllm": vllm_teacher}       # --teacher-engine
VLLM_LACKS = {"teacher_mc": "the teacher's draws", "full": "the teacher's hidden states"}     # by support: refused


class Watch:
    """Notices a teacher that knows nothing: weights that never arrived give every word -ln V, and no error.

    Its mean entropy over at least a batch of responses, in nats, is sum w (-logq) / sum w with w = q / mu at the drawn
    columns: from the slots alone, whichever engine scored them. The two sums share their noise, so that equal
    log-probs give their -logq exactly, whatever mu drew.
    """

    def __init__(self, cfg: Config):
        self.row, self.enough, self.limit = ESTIMATORS[cfg.estimator], cfg.batch, math.log(vocab_size(cfg.teacher))
        self.responses, self.sums, self.warned = 0, torch.zeros(2, dtype=torch.float64), False

    def see(self, segments: list[Segment]) -> str:
        """What to warn of once, after these scored segments; else an empty string."""
        for s in segments:
            logq, logmu = (x[:, :self.row.drawn(x.shape[1])].double() for x in (s.logq, s.logmu))
            w = (logq - logmu).clamp(max=LOG_RATIO_MAX).exp()
            self.sums += torch.stack([(w * -logq.clamp(min=LOG_MIN)).sum(), w.sum()])
        self.responses += len(segments)
        if self.warned or self.responses < self.enough:
            return ""
        entropy = (self.sums[0] / self.sums[1]).item()
        self.responses, self.sums = 0, torch.zeros(2, dtype=torch.float64)
        self.warned = entropy > 0.9 * self.limit
        return (f"the teacher's entropy is {entropy:.2f} nats, and that of equal chances is ln V = {self.limit:.2f}: "
                f"are its weights there?") if self.warned else ""


def answers(teacher, cfg: Config, prompts: list[list[int]], beat: Callable[[], None]) -> list[list[int]]:
    """Greedy, as many at a time as memory has room for."""
    found, n, stops = [], 64, stop_ids(cfg.student, cfg.teacher)
    while len(found) < len(prompts):
        try:
            found += teacher.complete(prompts[len(found):len(found) + n], cfg.max_response, stops, beat)
            beat()
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            n //= 2
    return found


def teacher_worker(cfg: Config, link: Link, slots: Slots, eval_prompts: list[list[int]], device: str,
                   dtype: torch.dtype) -> None:
    teacher, watch = TEACHERS[cfg.teacher_engine](cfg, device, dtype), Watch(cfg)
    link.send("ready")
    while True:
        waiting: list[int] = []
        for order, body in link.orders(wait=True):
            if order == "stop":
                return link.send("stopped")
            if order == "evaluate":
                link.send("evaluated", answers=answers(teacher, cfg, eval_prompts, link.beat))
            waiting += body if order == "score" else []
        for group in by_length([slots.read(s) for s in waiting], cfg.micro_tokens):
            with link.span("score"):
                teacher.score(group, slots)
            if doubt := watch.see(group):
                link.send("warning", text=doubt)
            link.send("scored", slots=[s.slot for s in group])

"""
The teacher worker: fills in the scores of the slots that it is given.

The teacher is a plain transformers forward pass, and its log-probs are normalised over all of its
words. It always writes logq. Besides, it writes what the `support` of the estimator asks for (its
best words, words that it draws, its last hidden state) and, in the slot tensors of an extension,
what that one wants of its other layers. It reads token ids, so no text is tokenized twice.

What is left out: `score` and `complete` in vLLM (engines/vllm_teacher.py).
Shapes: M new tokens of a group of segments, m of them with stored scores; C columns of a slot.
Tests: tests/test_supports.py, tests/test_teacher.py
"""
from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor

from cache import Segment, Slots
from config import Config
from draws import DESIGNS
from engines.uniforms import TEACHER, uniforms
from estimators import ESTIMATORS, LOG_MIN, importance_weight
from extension import Extensions
from models.alignment import by_length, kept_rows, pad, response_rows
from models.head import teacher_logq
from models.loading import load_model, stop_ids, vocab_size
from models.sharding import last_hidden
from transport.link import Link
from transport.shared import SharedMemory

TEACHERS = {"hf": "teacher:HFTeacher", "vllm": "engines.vllm_teacher:VLLMTeacher"}
# The supports that --teacher-engine vllm refuses, and what vLLM does not return for them
VLLM_LACKS = {"teacher_mc": "the teacher's draws", "full": "the teacher's hidden states"}


def teacher_worker(cfg: Config, link: Link, shared: SharedMemory, device: str,
                   dtype: torch.dtype) -> None:
    """A teacher process: score slots, and answer the evaluation prompts if ordered to."""
    teacher = teacher_class(cfg.teacher_engine)(cfg, device, dtype)
    check = TeacherCheck(cfg)
    link.send("ready")
    while True:
        waiting: list[int] = []
        for order, body in link.orders(wait=True):
            if order == "stop":
                link.send("stopped")
                return
            if order == "evaluate":
                found = answers(teacher, cfg, shared.eval_prompts, link.beat)
                link.send("evaluated", answers=found)
            if order == "score":
                waiting += body
        segments = [shared.slots.read(s) for s in waiting]
        for group in by_length(segments, cfg.micro_tokens):
            with link.span("score"):
                teacher.score(group, shared.slots)
            warning = check.see(group)
            if warning:
                link.send("warning", text=warning)
            link.send("scored", slots=[s.slot for s in group])


def teacher_class(name: str) -> type:
    """The class behind --teacher-engine, imported only now, so that hf works without vLLM."""
    module, _, kind = TEACHERS[name].partition(":")
    return getattr(import_module(module), kind)


# -- the teacher in transformers -----------------------------------------------------------------

class HFTeacher:
    """Serves every support. `engines.vllm_teacher.VLLMTeacher` is tested against it."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.model = load_model(cfg.teacher, device, dtype)
        self.support = ESTIMATORS[cfg.estimator].support
        self.vocab = vocab_size(cfg.student)
        self.seed = cfg.seed
        self.design = cfg.draws
        self.extensions = Extensions.load(cfg)

    def score(self, segments: list[Segment], slots: Slots) -> None:
        """Write the teacher's log-probs, and what else is wanted, to the slots of `segments`."""
        score(self.model, segments, slots, self.support, self.vocab, seed=self.seed,
              design=self.design, extensions=self.extensions)

    def complete(self, prompts: list[list[int]], max_new: int, stop: list[int],
                 each_step: Callable[[], None] = lambda: None) -> list[list[int]]:
        return complete(self.model, prompts, max_new, stop, each_step)


@torch.no_grad()
def score(model, segments: list[Segment], slots: Slots, support: str, vocab: int, *,
          seed: int = 0, design: str = "iid", chunk: int = 1024,
          extensions: Extensions | None = None) -> None:
    """Write the teacher's log-probs, float32, into logq, and what else `support` asks for.

    `design`: how words of its own are drawn. `vocab`: the number of the student's words. `chunk`:
    positions whose logits exist at once.
    """
    tokens, _ = pad(segments, model.device)
    head = model.get_output_embeddings()
    layers = extensions.teacher_layers if extensions else []
    last, states = last_hidden(model, tokens, layers)
    if layers:
        extensions.record({layer: response_rows(x, segments) for layer, x in zip(layers, states)},
                          segments, slots)
    rows = response_rows(last, segments).to(head.weight.device)
    rows = kept_rows(rows, segments)                             # [m, H]
    ids = torch.cat([s.ids for s in segments]).long().to(rows.device)
    logpi = None
    if support == "teacher_mc":
        n = ids.shape[1] - 1
        u = numbers(segments, slots, seed, DESIGNS[design].numbers(n), rows.device)
        logpi = torch.cat([s.logpi for s in segments]).to(rows.device)
    logq = torch.empty(ids.shape, device=rows.device)
    for i in range(0, len(rows), chunk):
        part = slice(i, i + chunk)
        every = teacher_logq(head, rows[part], vocab)            # [chunk, vocab]
        if support == "teacher_topk":
            ids[part, 1:] = every.topk(ids.shape[1] - 1).indices
        if support == "teacher_mc":
            chosen = DESIGNS[design].choose(every, u[part], n)
            ids[part, 1:] = chosen.ids
            logpi[part, 1:] = chosen.logpi
        logq[part] = every.gather(-1, ids[part])
    write(segments, slots, ids=ids, logq=logq, logpi=logpi,
          hidden=rows if support == "full" else None)


def write(segments: list[Segment], slots: Slots, **found: Tensor | None) -> None:
    """Write rows [m, ..] of all segments, in their order, into the tensors of their slots."""
    at = 0
    for s in segments:
        m = len(s.ids)
        for name, rows in found.items():
            if rows is not None:
                getattr(slots, name)[s.slot, :m] = rows[at:at + m].cpu()
        at += m


def numbers(segments: list[Segment], slots: Slots, seed: int, n: int,
            device: torch.device) -> Tensor:
    """Random numbers [m, n] on [0, 1), float64: the teacher's draws at the stored positions.

    They follow from uid and position in the response, not from where a response was cut.
    """
    uids: list[int] = []
    positions: list[int] = []
    for s in segments:
        first = s.start - s.prompt
        uids += [int(slots.uid[s.slot])] * len(s)
        positions += range(first, first + len(s))
    return kept_rows(uniforms(seed, TEACHER, uids, positions, n, device), segments)


@torch.no_grad()
def complete(model, prompts: list[list[int]], max_new: int, stop: list[int],
             each_step: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Greedy answers by transformers' own `generate`, for --eval.teacher."""
    from transformers import GenerationConfig
    streamer = SimpleNamespace(put=lambda _: each_step(), end=lambda: None)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                        device=model.device)
    # not the model's own configuration, whose penalties would shift the distribution
    plain = GenerationConfig(max_new_tokens=max_new, do_sample=False, eos_token_id=stop or None,
                             pad_token_id=(stop or [0])[0])
    out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=plain,
                         streamer=streamer)
    return out[:, longest:].tolist()


def answers(teacher, cfg: Config, prompts: list[list[int]],
            beat: Callable[[], None]) -> list[list[int]]:
    """Greedy answers to all prompts, as many at a time as fit in memory."""
    found: list[list[int]] = []
    n = 64
    stop = stop_ids(cfg.student, cfg.teacher)
    while len(found) < len(prompts):
        try:
            found += teacher.complete(prompts[len(found):len(found) + n], cfg.max_response, stop,
                                      beat)
            beat()
        except torch.OutOfMemoryError:
            if n == 1:
                raise
            n //= 2
    return found


# -- is the teacher there? -----------------------------------------------------------------------

class TeacherCheck:
    """Notices a teacher that knows nothing: if its weights were never loaded, it gives all words
    the log-prob -ln V, and raises no error.

    Its mean entropy over at least a batch of responses is estimated in nats by
    sum w (-logq) / sum w with w = q / pi, over the words that mu drew. That needs only what the
    slots hold, whichever engine scored them. If all words have the same logq, the estimate is
    exactly -logq, whatever mu drew, because w cancels.
    """

    def __init__(self, cfg: Config):
        self.estimator = ESTIMATORS[cfg.estimator]
        self.enough = cfg.batch
        self.limit = math.log(vocab_size(cfg.teacher))
        self.warned = False
        self.responses = 0
        self.sums = torch.zeros(2, dtype=torch.float64)

    def see(self, segments: list[Segment]) -> str:
        """A warning, once, after these scored segments; else an empty string."""
        for s in segments:
            n = self.estimator.drawn(s.logq.shape[1])
            logq = s.logq[:, :n].double()
            w = importance_weight(logq, s.logpi[:, :n].double())
            self.sums += torch.stack([(w * -logq.clamp(min=LOG_MIN)).sum(), w.sum()])
        self.responses += len(segments)
        if self.warned or self.responses < self.enough:
            return ""
        entropy = (self.sums[0] / self.sums[1]).item()
        self.responses = 0
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.warned = entropy > 0.9 * self.limit
        if not self.warned:
            return ""
        return (f"the teacher's entropy is {entropy:.2f} nats, and a uniform distribution has "
                f"ln V = {self.limit:.2f}: were its weights loaded?")

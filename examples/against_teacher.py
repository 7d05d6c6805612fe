"""
How far a student is from its teacher, over all words: what `prune_and_distil.py evaluate` measures.

Both models answer the same prompts, by draws from their own softmax. At every token of these
answers both distributions are computed in full, so the divergences are exact there, not estimates
from a few words. Intervals are 95%, by resampling prompts.

What is left out: grades; a model of this size rarely answers right.
Names      p student, q teacher; logp, logq their log-probs
Shapes     M new tokens of a group of answers; V words. Tests: tests/test_prune.py
"""
from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from cache import Segment
from config import Config
from data.prompts import Row, encode
from engines.hf import HFEngine
from models.alignment import by_length, pad, response_rows

Sums = dict[str, list[float]]                    # by quantity, one sum over its tokens per answer
MICRO_TOKENS = 1024                              # in a forward pass: [M, V] in float64 is large
ROWS = (("KL(p || q), the student's answers", "student", "kl_pq"),
        ("KL(q || p), the student's answers", "student", "kl_qp"),
        ("KL(p || q), the teacher's answers", "teacher", "kl_pq"),
        ("KL(q || p), the teacher's answers", "teacher", "kl_qp"),
        ("same greedy word, the student's answers", "student", "agree"),
        ("same greedy word, the teacher's answers", "teacher", "agree"),
        ("perplexity of the teacher's answers", "teacher", "nll"),
        ("the teacher's own perplexity of them", "teacher", "nll_q"),
        ("entropy of p, the student's answers", "student", "entropy"))


def engine_of(folder: str) -> HFEngine:
    """An engine on the model in a folder. Evaluation sets its own temperature; N is not used."""
    return HFEngine(Config(student=folder, teacher=folder, estimator="reverse_mc", draws="iid"),
                    "cpu", torch.float32)


class Teacher:
    """The teacher, its answers to the held-out prompts, and what students are compared on."""

    def __init__(self, folder: str, rows: list[Row], max_new: int):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = encode(rows, self.tokenizer)
        self.max_new = max_new
        self.engine = engine_of(folder)
        self.answers = self.engine.complete(self.prompts, max_new, temperature=1.0)

    def compare(self, folder: str) -> dict[str, Sums]:
        """The student in a folder, on its own answers and on the teacher's: the `Sums` of each."""
        engine = engine_of(folder)
        own = engine.complete(self.prompts, self.max_new, temperature=1.0)
        return {"student": self.sums(engine.model, own),
                "teacher": self.sums(engine.model, self.answers)}

    def sums(self, student, answers: list[list[int]]) -> Sums:
        segments = [answered(i, p, a) for i, (p, a) in enumerate(zip(self.prompts, answers)) if a]
        found: dict[int, dict[str, float]] = {}
        for group in by_length(segments, MICRO_TOKENS):
            found |= zip((s.slot for s in group), compared(student, self.engine.model, group))
        return {name: [found[s.slot][name] for s in segments] for name in found[segments[0].slot]}

    def greedy(self, folder: str, numbers: list[int]) -> list[str]:
        """The greedy answers of a model to some of the prompts."""
        engine = engine_of(folder)
        answers = engine.complete([self.prompts[i] for i in numbers], self.max_new)
        return [text.strip()
                for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def answered(number: int, prompt: list[int], answer: list[int]) -> Segment:
    """A prompt and its answer, of which the answer is new. There are no candidates."""
    blank = torch.empty(len(answer), 0)
    return Segment(slot=number, tokens=torch.tensor([*prompt, *answer]), prompt=len(prompt),
                   start=len(prompt), version=torch.zeros(len(answer)), ids=blank, logpi=blank,
                   logmu=blank, logq=blank)


@torch.no_grad()
def compared(student, teacher, group: list[Segment]) -> Iterator[dict[str, float]]:
    """For each segment, sums over its new tokens."""
    logp = every_logp(student, group)
    logq = every_logp(teacher, group)
    y = torch.cat([s.new_tokens for s in group])[:, None]                               # [M, 1]
    values = {"tokens": torch.ones(len(y)),
              "kl_pq": (logp.exp() * (logp - logq)).sum(-1),
              "kl_qp": (logq.exp() * (logq - logp)).sum(-1),
              "agree": (logp.argmax(-1) == logq.argmax(-1)).double(),
              "nll": -logp.gather(-1, y)[:, 0],
              "nll_q": -logq.gather(-1, y)[:, 0],
              "entropy": -(logp.exp() * logp).sum(-1)}                                  # [M] each
    lengths = [len(s) for s in group]
    parts = {name: x.split(lengths) for name, x in values.items()}
    for i in range(len(group)):
        yield {name: part[i].sum().item() for name, part in parts.items()}


def every_logp(model, group: list[Segment]) -> Tensor:
    """[M, V], float64: the log-probs of all words at the new tokens."""
    tokens, mask = pad(group, model.device)
    hidden = model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return model.get_output_embeddings()(response_rows(hidden, group)).double().log_softmax(-1)


# -- numbers for a person -------------------------------------------------------------------------

def per_token(sums: Sums, name: str) -> float:
    return sum(sums[name]) / sum(sums["tokens"])


def interval(sums: Sums, name: str, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of `per_token` by resampling the answers."""
    rng = random.Random(0)
    n = len(sums["tokens"])
    means = []
    for _ in range(resamples):
        pick = rng.choices(range(n), k=n)
        means.append(sum(sums[name][i] for i in pick) / sum(sums["tokens"][i] for i in pick))
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def cell(found: dict[str, Sums], answers: str, name: str) -> str:
    """A number of the table with its interval; perplexity is exp of the mean of -log p."""
    values = [per_token(found[answers], name), *interval(found[answers], name)]
    if name.startswith("nll"):
        values = [math.exp(x) for x in values]
    if name == "agree":
        return "{:.0%} ({:.0%} to {:.0%})".format(*values)
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def table(students: dict[str, dict[str, Sums]]) -> list[list[str]]:
    """Cells: a row for each quantity of ROWS, a column for each student."""
    lines = [["per token, nats", *students]]
    for label, answers, name in ROWS:
        lines.append([label, *(cell(found, answers, name) for found in students.values())])
    return lines


def lowered(before: dict[str, Sums], after: dict[str, Sums]) -> float:
    """The share of KL(p || q), on the student's own answers, that distillation has removed."""
    return 1 - per_token(after["student"], "kl_pq") / per_token(before["student"], "kl_pq")


def sample_numbers(n: int, shown: int) -> list[int]:
    """Which of n prompts to show: evenly spread."""
    return [i * n // min(shown, n) for i in range(min(shown, n))]


def samples(teacher: Teacher, rows: list[Row], folders: dict[str, Path],
            shown: int) -> list[dict[str, str]]:
    """Greedy answers of each folder's model to some held-out prompts, with the prompt."""
    numbers = sample_numbers(len(rows), shown)
    answers = {name: teacher.greedy(str(folder), numbers) for name, folder in folders.items()}
    return [{"prompt": rows[number].prompt, **{name: answers[name][i] for name in folders}}
            for i, number in enumerate(numbers)]

"""
On-policy distillation in one process, from top to bottom: the lecture before the pipeline.

    .venv/bin/python examples/one_step.py

One train batch: the student answers prompts and keeps N candidate words per position, the teacher
scores them, the loss is the reverse KL per token, and one update follows. asyncopd.py does the
same with these steps in processes of their own, none of which waits for the others; with
`--schedule sync` it ends with the same weights, to the bit (tests/test_one_step.py).

Words      a word is an entry of the vocabulary, a token is a word at its place in a sequence;
           candidates are N words drawn at one place, of which the first becomes the token there
Names      p student now, mu student that generated, q teacher; logp, logmu, logq their log-probs;
           logpi the log of the expected number of copies of a word among the N, N mu or 1 at most
Shapes     M new tokens (those of the responses); N candidates; H width of a hidden state; V words
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from cache import Segment  # noqa: E402
from config import Config  # noqa: E402
from data.prompts import encode, prompt_number  # noqa: E402
from data.tasks import toy_task  # noqa: E402
from data.toy import toy_models  # noqa: E402
from engines.hf import HFEngine  # noqa: E402
from models.alignment import by_length, pad, response_rows  # noqa: E402
from models.head import head_backward, teacher_logq  # noqa: E402
from models.loading import load_model  # noqa: E402


def main(cfg: Config) -> dict[str, torch.Tensor]:
    """One update of the student on the toy's prompts; its new weights by name."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))      # as a role of a synchronous run
    segments = generate(cfg)
    score(cfg, segments)
    return update(cfg, segments)


def generate(cfg: Config) -> list[Segment]:
    """The student answers. At every position N words are chosen from its softmax (draws.py), and
    the first of them is emitted. In an asynchronous run these weights, mu, would be older than p."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.student)
    rows = toy_task(cfg.eval.n).train
    order = [prompt_number(i, len(rows), cfg.seed) for i in range(cfg.batch)]    # shuffled
    prompts = encode([rows[i] for i in order], tokenizer)

    # The engine is given responses to generate. Each step draws one token for all of them and
    # returns the keys i of those that have finished. uid and position seed the random numbers.
    engine = HFEngine(cfg, "cpu", torch.float32)
    for i, prompt in enumerate(prompts):
        engine.add(i, prompt, cfg.max_response, uid=i, position=0)
    drawn = {}
    while len(drawn) < cfg.batch:
        drawn |= engine.take(engine.step())

    # One response as the pipeline would store it (cache.py): prompt and response in one sequence,
    # of which the first `start` tokens are given and the rest is new. The teacher fills in logq.
    segments = []
    for i, (y, candidates, logpi, logmu, versions) in drawn.items():
        segments.append(Segment(
            slot=i, tokens=torch.cat([torch.tensor(prompts[i]), y]), prompt=len(prompts[i]),
            start=len(prompts[i]), version=versions, ids=candidates, logpi=logpi,
            logmu=logmu, logq=torch.full(logpi.shape, torch.nan)))
    first = segments[0]
    print(f"a prompt        {tokenizer.decode(first.tokens[:first.start])}")
    print(f"an answer       {tokenizer.decode(first.new_tokens)}")
    print(f"candidates of its first word {tokenizer.convert_ids_to_tokens(first.ids[0])}")
    return segments


@torch.no_grad()
def score(cfg: Config, segments: list[Segment]) -> None:
    """The teacher reads the same tokens and scores the candidates. Full logits, V words per
    position, would be too large to move between processes; N numbers are not."""
    teacher = load_model(cfg.teacher, "cpu", torch.float32)
    head = teacher.get_output_embeddings()
    for group in by_length(segments, cfg.micro_tokens):           # micro-batches
        tokens, _ = pad(group, "cpu")     # padded on the right, where a causal model never looks
        hidden = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        states = response_rows(hidden, group)      # [M, H]: the state that predicts each new token
        every = teacher_logq(head, states, len(head.weight))                             # [M, V]
        logq = every.gather(-1, torch.cat([s.ids for s in group]))                       # [M, N]
        for s, scores in zip(group, logq.split([len(s) for s in group])):
            s.logq.copy_(scores)


def update(cfg: Config, segments: list[Segment]) -> dict[str, torch.Tensor]:
    """The loss is the reverse KL, KL(p || q), at every position, from N words that mu drew. Its
    gradient is E[sum over the N words of (p / pi) (logp - logq) dlogp], where dlogp is the gradient
    of logp. Here p is mu. With answers older than the student it is not, and p / pi corrects for
    that: it is all that asynchrony changes."""
    student = load_model(cfg.student, "cpu", torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    count = sum(map(len, segments))                              # the mean is over all new tokens
    kl = 0.0
    for group in by_length(sorted(segments, key=lambda s: s.slot), cfg.micro_tokens):
        tokens, _ = pad(group, "cpu")     # padded on the right, where a causal model never looks
        hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        states = response_rows(hidden, group)                    # [M, H], as for the teacher
        ids = torch.cat([s.ids for s in group])                  # [M, N], like the next two
        logpi = torch.cat([s.logpi for s in group])
        logq = torch.cat([s.logq for s in group])

        # `at`: a slice of the M positions. `every`: all V words, for other losses; unused here
        def loss(at, logp, every, logpi=logpi, logq=logq):
            weight = (logp - logpi[at]).detach().clamp(max=20).exp()
            advantage = (logq[at] - logp).detach()
            return {"loss": -(weight * advantage * logp).sum(-1),    # only its gradient matters
                    "kl": (weight * -advantage).sum(-1)}             # unbiased, for the log

        # The LM head in chunks, so that the logits of all positions never exist at once. Hence a
        # backward pass in two parts: through the head to `states`, then through the model
        gradient, measured = head_backward(student.get_output_embeddings(), states.detach(), ids,
                                           loss, count=count, all_words=False, chunk=10_000,
                                           dtype=torch.float32)
        states.backward(gradient)
        kl += measured["kl"].sum().item() / count
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
    optimizer.step()
    print(f"{count} tokens      KL(p || q) {kl:.3f} nats per token")
    print(f"an update       norm of the gradient {norm:.2f}, learning rate {cfg.lr:g}")
    return {name: p.detach() for name, p in student.named_parameters()}


if __name__ == "__main__":
    student_folder, teacher_folder = toy_models(ROOT / "runs")
    main(Config(student=student_folder, teacher=teacher_folder, estimator="reverse_mc", draws="optimal",
                mc_samples=4, batch=16, lr=2e-4, max_prompt=8, max_response=64))

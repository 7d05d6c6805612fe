"""
On-policy distillation in one process, from top to bottom: the lecture before the pipeline.

    .venv/bin/python examples/one_step.py

One train batch: the student answers prompts and keeps N candidate words per position, the teacher
scores them, the loss is the reverse KL per token, and one update follows. asyncopd.py does the same
with these steps in processes of their own, none of which waits for the others; with
`--schedule sync` it ends with the same weights, to the bit (tests/test_one_step.py).

Names      p student now, mu student that generated, q teacher; logp, logmu, logq their log-probs
Shapes     B responses; M new tokens in all of them; N candidates; H width of a hidden state
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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

BATCH = 16
N = 4


def main(student_folder: str, teacher_folder: str, *, batch: int = BATCH, lr: float = 2e-4,
         max_response: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """One update of the student on the toy's prompts; its new weights by name."""
    torch.set_num_threads(1)
    cfg = Config(student=student_folder, teacher=teacher_folder, estimator="reverse_mc",
                 mc_samples=N, max_prompt=8, max_response=max_response, max_running=batch,
                 seed=seed)

    # 1. Prompts, as token ids. Every epoch is a permutation of its own.
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    rows = toy_task(cfg.eval.n).train
    order = [prompt_number(i, len(rows), seed) for i in range(batch)]
    prompts = encode([rows[i] for i in order], tokenizer)
    print(f"first prompt:   {rows[order[0]].prompt}")

    # 2. The student answers. At every position N words are drawn i.i.d. from its softmax; the first
    #    of them is emitted. In an asynchronous run these weights, mu, would be older than p.
    engine = HFEngine(cfg, "cpu", torch.float32)
    for i, prompt in enumerate(prompts):
        engine.add(i, prompt, max_response, uid=i, position=0)
    drawn = {}
    while len(drawn) < batch:
        drawn |= engine.take(engine.step())
    segments = {}
    for i, (y, candidates, logmu) in drawn.items():
        segments[i] = Segment(slot=i, tokens=torch.cat([torch.tensor(prompts[i]), y]),
                              prompt=len(prompts[i]), start=len(prompts[i]),
                              version=torch.zeros(len(y)), ids=candidates, logmu=logmu,
                              logq=torch.full(logmu.shape, torch.nan))
    print(f"first answer:   {tokenizer.decode(segments[0].new_tokens, skip_special_tokens=True)}")
    print(f"candidates of its first word: {tokenizer.convert_ids_to_tokens(segments[0].ids[0])}")

    # 3. The teacher reads the same tokens and scores the candidates. Full logits of V words per
    #    position would be too large to move between processes; N numbers are not.
    teacher = load_model(teacher_folder, "cpu", torch.float32)
    head = teacher.get_output_embeddings()
    with torch.no_grad():
        for group in by_length(list(segments.values()), cfg.micro_tokens):
            tokens, mask = pad(group, "cpu")
            hidden = teacher.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
            every = teacher_logq(head, response_rows(hidden, group), len(head.weight))   # [M, V]
            logq = every.gather(-1, torch.cat([s.ids for s in group]))                   # [M, N]
            for s, scores in zip(group, logq.split([len(s) for s in group])):
                s.logq.copy_(scores)

    # 4. The loss: the reverse KL, KL(p || q), at every position, from N words that mu drew. Its
    #    gradient is E_mu[w (logp - logq) dlogp] with w = p / mu; w and the advantage are constants.
    #    Here p is mu and w is 1: this is what changes when the answers are older than the student.
    student = load_model(student_folder, "cpu", torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    count = sum(map(len, segments.values()))                     # the mean is over all new tokens
    total = kl = 0.0
    for group in by_length([segments[i] for i in range(batch)], cfg.micro_tokens):
        tokens, _ = pad(group, "cpu")
        hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        states = response_rows(hidden, group)                    # [M, H]: the one shift
        ids, logmu, logq = (torch.cat([getattr(s, name) for s in group])
                            for name in ("ids", "logmu", "logq"))

        def loss(at, logp, every, logmu=logmu, logq=logq):
            w = (logp - logmu[at]).detach().clamp(-20, 20).exp()
            advantage = (logq[at] - logp).detach()
            return {"loss": -(w * advantage * logp).mean(-1),
                    "kl": (w * -advantage).mean(-1)}             # unbiased; the loss is no KL

        # The head in chunks: autograd never holds the logits of all positions at once
        gradient, found = head_backward(student.get_output_embeddings(), states.detach(), ids,
                                        loss, count=count, all_words=False, chunk=10_000,
                                        dtype=torch.float32)
        states.backward(gradient)
        total += found["loss"].sum().item() / count
        kl += found["kl"].sum().item() / count
    print(f"{count} tokens   KL(p || q) per token {kl:.3f} nats   loss {total:.3f}")

    # 5. The update.
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
    optimizer.step()
    print(f"norm of the gradient {norm:.3f}   learning rate {lr:g}")
    return {name: p.detach() for name, p in student.named_parameters()}


if __name__ == "__main__":
    main(*toy_models(Path(__file__).resolve().parent.parent / "runs"))

"""
What generating, scoring and learning cost without the project's code: transformers, vLLM and torch alone.

    python benchmarks/peers_bare.py '{"student": .., "teacher": .., "engine": "hf", "rows": 320, "core": 0, ..}'

peers.py starts it, to show the least that both sides of its race can take. One thread on the core that is named,
models in float32:

    generate   `rows` responses at a time, a prompt and then one token after the other; plain draws, nothing recorded
    score      the teacher's forward pass, as far as its head
    learn      both heads, the reverse KL over all words, the student's forward and backward pass, and AdamW

Score and learn have the same answers of the student, each `batch` of them padded to the longest. Under `generate` every
response has its greatest length, so that every token of every row counts: an estimate, since attention to longer
contexts costs more and a prompt is shared by more tokens.
Last line: one JSON object, {"cpu_s_per_1000": {"generate", "score", "learn"}, "began": when every response had its
first token, by time.monotonic()}.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]


def cpu_s(work: Callable[[], int], rounds: int = 3) -> float:
    """CPU seconds per 1,000 tokens, of the fastest round; `work` returns its number of tokens. A first round is not
    counted."""
    found = []
    for _ in range(rounds + 1):
        start = time.process_time()
        tokens = work()
        found.append(1000 * (time.process_time() - start) / tokens)
    return min(found[1:])


def generate_hf(student: str, prompts: list[list[int]]) -> Callable[[int], int]:
    """A function that generates so many tokens for each prompt and returns how many these are."""
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    length = min(map(len, prompts))
    first = torch.tensor([p[-length:] for p in prompts])         # as long as the shortest: no padding

    @torch.no_grad()
    def work(length: int) -> int:
        ids, cache = first, None
        for _ in range(length):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        return len(prompts) * length

    return work


def generate_vllm(student: str, prompts: list[list[int]], max_response: int) -> Callable[[int], int]:
    """The same. No response will be longer than `max_response`."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(min(os.sched_getaffinity(0)))      # one thread
    import engines.vllm_environment  # noqa: F401 - vLLM in this process
    from vllm import LLM, SamplingParams  # isort: skip
    llm = LLM(student, dtype="float32", max_model_len=max(map(len, prompts)) + max_response, max_num_seqs=len(prompts),
              skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True, enforce_eager=True)

    def work(length: int) -> int:
        params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return len(prompts) * length

    return work


def padded(prompts: list[list[int]], answers: list[list[int]], batch: int) -> Iterator[tuple]:
    """[B, T] tokens, and what comes next at each position, -100 where that is no token of the answer."""
    import torch
    for i in range(0, len(prompts), batch):
        rows = [p + a for p, a in zip(prompts[i:i + batch], answers[i:i + batch])]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        target = torch.full_like(tokens, -100)
        for row, (ids, prompt) in enumerate(zip(rows, prompts[i:i + batch])):
            tokens[row, :len(ids)] = torch.tensor(ids)
            target[row, len(prompt) - 1:len(ids) - 1] = torch.tensor(ids[len(prompt):])
        yield tokens, target


def score_and_learn(job: dict, prompts: list[list[int]]) -> dict[str, float]:
    """Without padding in the heads: they read the rows of the answers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.against_teacher import engine_of
    answers = engine_of(job["student"]).complete(prompts, job["max_response"], temperature=1.0)
    tokens = sum(map(len, answers))
    batches = list(padded(prompts, answers, job["batch"]))
    student, teacher = (AutoModelForCausalLM.from_pretrained(job[role], dtype=torch.float32)
                        for role in ("student", "teacher"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    scored: list[torch.Tensor] = []

    @torch.no_grad()
    def score() -> int:
        scored.clear()
        for ids, target in batches:
            scored.append(teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[target >= 0])
        return tokens

    def learn() -> int:
        for (ids, target), of_teacher in zip(batches, scored):
            rows = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[target >= 0]
            logp = student.get_output_embeddings()(rows).log_softmax(-1)
            with torch.no_grad():
                logq = teacher.get_output_embeddings()(of_teacher).log_softmax(-1)
            (logp.exp() * (logp - logq)).sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return tokens

    return {"score": cpu_s(score), "learn": cpu_s(learn)}


def main() -> None:
    import torch
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, [job["core"]])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prompts = (job["prompts"] * job["rows"])[:job["rows"]]
    if job["engine"] == "vllm":
        generate = generate_vllm(job["student"], prompts, job["max_response"])
    else:
        generate = generate_hf(job["student"], prompts)
    generate(1)
    began = time.monotonic()
    found = {"generate": cpu_s(lambda: generate(job["max_response"]))}
    print(json.dumps({"cpu_s_per_1000": found | score_and_learn(job, prompts), "began": began}))


if __name__ == "__main__":
    main()

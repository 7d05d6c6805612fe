"""
What the candidates of a position cost: tokens per second of one vLLM engine, without them and by each design.

    python benchmarks/draws.py                            # both models below; three minutes on one core

One engine per model, made as a rollout worker makes it (`engines.vllm.VLLMEngine`: one process, one thread, float32),
generates the same responses in some forms, in turns, the order rotating from round to round:

    plain           vLLM's own sampler at temperature 1; our logits processor has nothing to do
    N = n           our draw in its place: n independent candidates per position, recorded, the first one emitted
    N = n, optimal  the same with the optimal draws

    tok/s     tokens per second of CPU time, median over the rounds; with one thread and an idle core that is wall time
    head      share of the time in the output head, hidden states to logits
    sample    share of the time from logits to tokens, candidates and records
    cost      1 - (tok/s of the form / tok/s of the base) within a round: median, then the smallest and the largest.
              The base is the faster of plain and N = 1, so that a slow way to draw one token flatters nothing

The models are random Qwen3s with V = 151,936 words and logits of standard deviation 4 (a few nats of entropy). Few
layers make the draw look dear: in Qwen3-0.6B (28 layers of 1,024) the head does 26% of the multiplications, here 93%
and 76%. cost_wall is the same by the clock on the wall: of use on an idle machine only.
Raw rounds: benchmarks/draws.jsonl. The last line printed is one JSON object; cost_n4 and cost_n64 are the larger of
the two models' medians, and optimal_n4, optimal_n64 what the optimal draws cost against as many independent ones:
{"cost_n4", "cost_n64", "optimal_n4", "optimal_n64",
 "<model>": {"base", "optimal", "tok_s", "cost", "cost_wall", "head", "sample"}}
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from control.resolve import configure  # noqa: E402
from data import toy  # noqa: E402
from record.provenance import provenance  # noqa: E402
from record.report import table  # noqa: E402

V, PROMPT = 151_936, 16
FORMS = {"plain": (0, ""), "N = 1": (1, "iid"), "N = 4": (4, "iid"), "N = 64": (64, "iid"),
         "N = 4, optimal": (4, "optimal"), "N = 64, optimal": (64, "optimal")}       # how many words, how chosen
MODELS = {"hidden 256, 4 layers": (256, 4), "hidden 1024, 4 layers": (1024, 4)}


def save_model(folder: Path, hidden: int, layers: int) -> str:
    """Random weights, with logits of standard deviation 4; no word ends a response."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=512,
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=None, bos_token_id=None, dtype="float32"))
    torch.nn.init.normal_(model.lm_head.weight, std=4 / hidden ** 0.5)      # the last norm makes states of size 1
    model.save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    return str(folder)


class Bench:
    """An engine, and the CPU seconds that it has spent in its output head and in sampling."""

    def __init__(self, folder: str, responses: int, tokens: int):
        from engines.vllm import VLLMEngine
        self.tokens = tokens
        self.engine = VLLMEngine(configure([
            "--task=toy", f"--student={folder}", f"--teacher={folder}", "--gpus=0", "--engine=vllm",
            f"--max-prompt={PROMPT}", f"--max-response={tokens}", f"--max-running={responses}", "--micro-tokens=512"]),
            "cpu", torch.float32)
        self.engine.ends = []
        g = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(V, (responses, PROMPT), generator=g).tolist()
        self.spent = {"head": 0.0, "sample": 0.0}
        self.engine.llm.collective_rpc(self.watch)

    def watch(self, worker) -> None:
        runner = worker.model_runner
        runner.model.compute_logits = self.timed("head", runner.model.compute_logits)
        runner._sample = self.timed("sample", runner._sample)

    def timed(self, what: str, fn):
        def wrapped(*args, **kwargs):
            start = time.process_time()
            out = fn(*args, **kwargs)
            self.spent[what] += time.process_time() - start
            return out
        return wrapped

    def generate(self, form: str) -> dict:
        """Every response once, in one form."""
        from engines.vllm import RequestOutputKind, SamplingParams
        n, design = FORMS[form]
        self.spent.update(head=0.0, sample=0.0)
        engine, wall, cpu = self.engine, time.perf_counter(), time.process_time()
        if n:
            engine.drawing = replace(engine.drawing, n=n, design=design)
        for key, prompt in enumerate(self.prompts):
            if n:
                engine.add(key, prompt, self.tokens, uid=key, position=0)
            else:
                engine.names[key], engine.keys[f"{key}-plain"], engine.emitted[key] = f"{key}-plain", key, []
                engine.engine.add_request(f"{key}-plain", {"prompt_token_ids": prompt}, SamplingParams(
                    max_tokens=self.tokens, temperature=1.0, detokenize=False, output_kind=RequestOutputKind.DELTA))
        out = {}
        while len(out) < len(self.prompts):
            finished = engine.step()
            if n:
                out |= engine.take(finished)
            else:
                for key in finished:
                    del engine.keys[engine.names.pop(key)]
                    out[key] = [engine.emitted.pop(key)]
        seconds = dict(cpu_s=time.process_time() - cpu, wall_s=time.perf_counter() - wall)
        assert all(len(x[0]) == self.tokens for x in out.values()), "a response ended early"
        assert not n or all(x.logpi.shape == (self.tokens, n) for x in out.values())
        return dict(form=form, tokens=self.tokens * len(out), **seconds, **{f"{k}_s": s for k, s in self.spent.items()})


def summary(rows: list[dict]) -> dict:
    """Of one model's rounds. Costs are pairs: a form and the base in the same round."""
    of = {form: [r for r in rows if r["form"] == form] for form in FORMS}
    base = min(("plain", "N = 1"), key=lambda form: median(r["cpu_s"] for r in of[form]))

    def costs(form: str, clock: str = "cpu_s", against: str = base) -> list[float]:
        return sorted(1 - b[clock] / x[clock] for x, b in zip(of[form], of[against]))

    def share(what: str) -> dict:
        return {form: round(median(r[what] / r["cpu_s"] for r in x), 4) for form, x in of.items()}
    spread = {form: costs(form) for form in FORMS}
    optimal = {f"N = {n}": round(median(costs(f"N = {n}, optimal", against=f"N = {n}")), 4) for n in (4, 64)}
    return {"base": base, "optimal": optimal,
            "tok_s": {form: round(median(r["tokens"] / r["cpu_s"] for r in x), 1) for form, x in of.items()},
            "cost": {form: [round(f(c), 4) for f in (median, min, max)] for form, c in spread.items()},
            "cost_wall": {form: round(median(costs(form, "wall_s")), 4) for form in FORMS},
            "head": share("head_s"), "sample": share("sample_s")}


def show(title: str, s: dict) -> None:
    rows = [["", "tok/s", "head", "sample", "cost", "min", "max"]]
    for form in s["tok_s"]:
        rows.append([form + (" (base)" if form == s["base"] else ""), f"{s['tok_s'][form]:,.0f}",
                     *(f"{s[what][form]:.1%}" for what in ("head", "sample")), *(f"{c:.1%}" for c in s["cost"][form])])
    print(f"\n{title}\n{table(rows)}", flush=True)


def keep_freed_memory() -> None:
    """glibc may give 10 MB of freed logits back or keep them, and fresh pages cost a third of the time: keep them."""
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    assert libc.mallopt(M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--responses", type=int, default=16, help="generated at the same time")
    parser.add_argument("--tokens", type=int, default=32, help="per response")
    parser.add_argument("--model", choices=list(MODELS), help="only this one (default: all)")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")            # one thread, on the first core
    torch.set_num_threads(1)
    keep_freed_memory()
    told = provenance(vars(args), {})
    print(f"{told['hardware']['cpu']}, one core of {told['hardware']['cores']}; {args.responses} responses x "
          f"{args.tokens} tokens, {args.rounds} rounds; V = {V:,}, float32", flush=True)
    rows, found = [], {}
    for model in [args.model] if args.model else MODELS:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(save_model(Path(folder), *MODELS[model]), args.responses, args.tokens)
        for form in FORMS:
            bench.generate(form)                                       # the first time pays for compilation
        mine, order = [], list(FORMS)
        for i in range(args.rounds):
            at = i % len(order)
            mine += [{"type": "round", "model": model, "round": i, **bench.generate(form)}
                     for form in order[at:] + order[:at]]
        rows += mine
        found[model] = summary(mine)
        show(model, found[model])
    with open(HERE / "draws.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in [{"type": "run", **told}, *rows])
    worst = {f"cost_n{n}": max(s["cost"][f"N = {n}"][0] for s in found.values()) for n in (4, 64)}
    worst |= {f"optimal_n{n}": max(s["optimal"][f"N = {n}"] for s in found.values()) for n in (4, 64)}
    print(json.dumps({**worst, **found}))


if __name__ == "__main__":
    main()

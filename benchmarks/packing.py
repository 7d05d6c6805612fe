"""
Sequences of unequal length through one model: sorted by length and padded on the right, or packed end to end; and the
first of these through torch.compile.

    python benchmarks/packing.py           # a minute on two cores

sorted: by_length's micro-batches, no mask. packed: the same token budget filled with whole sequences, one after
the other, positions from 0 in each, and a block mask, as transformers makes it from such positions: no attention across
sequences. Forward and backward of one layer of Qwen3-0.6B's width, float32, 24 sequences of lognormal length (sigma
0.8), at most 512 tokens; rounds in turn. Both must give the same hidden states.
`padding`: the share of padded tokens, by counting alone, in batches of 256 such lengths of at most 18,432 tokens at the
default --micro-tokens, and of 64 (a minibatch of the paper's). Rows: benchmarks/packing.jsonl.
Last line: one JSON object: {"packed_vs_sorted" and "compiled_vs_sorted": in seconds, medians over rounds, "compile_s",
"padding_256", "padding_64", "gap": the largest difference of a hidden state}.
"""
import json
import random
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from cache import Segment  # noqa: E402
from models.alignment import by_length, pad  # noqa: E402
from record.provenance import provenance  # noqa: E402

BUDGET, LONGEST = 2048, 512


def segments(n: int, median: float, longest: int, seed: int = 0) -> list[Segment]:
    rng, blank = random.Random(seed), torch.empty(0)
    lengths = [max(8, min(longest, round(median * rng.lognormvariate(0, 0.8)))) for _ in range(n)]
    return [Segment(slot=i, tokens=torch.randint(0, 64, (m,)), prompt=1, start=1, version=blank, ids=blank,
                    logpi=blank, logmu=blank, logq=blank) for i, m in enumerate(lengths)]


def packs(given: list[Segment], budget: int) -> list[list[Segment]]:
    """First fit, longest first."""
    bins: list[list[Segment]] = []
    for s in sorted(given, key=lambda s: -len(s.tokens)):
        place = next((b for b in bins if sum(len(x.tokens) for x in b) + len(s.tokens) <= budget), None)
        bins.append([s]) if place is None else place.append(s)
    return bins


def by_sorting(model, given):
    for group in by_length(given, BUDGET):
        hidden = model(input_ids=pad(group, "cpu")[0], use_cache=False).last_hidden_state
        yield {s.slot: hidden[b, :len(s.tokens)] for b, s in enumerate(group)}


def by_packing(model, given):
    for group in packs(given, BUDGET):
        position = torch.cat([torch.arange(len(s.tokens)) for s in group])[None]
        tokens = torch.cat([s.tokens for s in group])[None]
        hidden = model(input_ids=tokens, position_ids=position, use_cache=False).last_hidden_state[0]
        yield {s.slot: x for s, x in zip(group, hidden.split([len(s.tokens) for s in group]))}


def run(model, how, given) -> tuple[float, dict[int, torch.Tensor]]:
    start, found = time.monotonic(), {}
    for part in how(model, given):
        sum(x.square().sum() for x in part.values()).backward()
        found |= {slot: x.detach() for slot, x in part.items()}
    return time.monotonic() - start, found


def padding(n: int) -> float:
    """Share of padded tokens over 20 batches of n responses, prompts included."""
    real = padded = 0
    for seed in range(20):
        for group in by_length(segments(n, 3400, 18_432, seed), 16_384):
            real += sum(len(s.tokens) for s in group)
            padded += len(group) * max(len(s.tokens) for s in group)
    return 1 - real / padded


def main():
    from transformers import Qwen3Config, Qwen3Model
    model = Qwen3Model(Qwen3Config(vocab_size=64, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1,
                                   num_attention_heads=16, num_key_value_heads=8, head_dim=128)).eval()
    given, compiled = segments(24, 150, LONGEST), torch.compile(model, dynamic=True)
    ways = {"sorted": (model, by_sorting), "packed": (model, by_packing), "compiled": (compiled, by_sorting)}
    rounds, gap = [], 0.0
    for _ in range(4):
        took, found = zip(*(run(m, how, given) for m, how in ways.values()))
        rounds.append(dict(zip(ways, took)))
        gap = max(gap, *((found[0][s.slot] - other[s.slot]).abs().max().item() for s in given for other in found[1:]))
    first, rounds = rounds[0], rounds[1:]                # the first one chooses kernels, and compiles
    row = dict(seconds=rounds, tokens=sum(len(s.tokens) for s in given), gap=gap, compile_s=first["compiled"],
               packed_vs_sorted=statistics.median(r["packed"] / r["sorted"] for r in rounds),
               compiled_vs_sorted=statistics.median(r["compiled"] / r["sorted"] for r in rounds),
               padding_256=padding(256), padding_64=padding(64), threads=torch.get_num_threads(),
               **provenance({}, {}))
    (HERE / "packing.jsonl").write_text(json.dumps(row) + "\n")
    print(json.dumps({k: row[k] for k in ("packed_vs_sorted", "compiled_vs_sorted", "compile_s", "padding_256",
                                          "padding_64", "gap")}))


if __name__ == "__main__":
    main()

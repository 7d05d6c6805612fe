"""
Seconds to score a padded micro-batch: without mask and cache, as teacher.py does, and with both, as transformers does
by default. In turn, in one process; the scores must agree.

    python benchmarks/teacher.py               # 4 x 2,048 tokens, a Qwen3 of 4 layers, 5 rounds; 3 minutes

Appends a row to benchmarks/teacher.jsonl. Last line: one JSON object, {"now", "before", "speedup", "apart"}: medians in
seconds, and the largest difference of a log-prob.
"""
import json
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import teacher  # noqa: E402
from cache import Slots  # noqa: E402
from models.alignment import pad  # noqa: E402
from record.provenance import provenance  # noqa: E402

ROWS = HERE / "teacher.jsonl"
LENGTHS = (2048, 1700, 1200, 700)
MODEL = dict(vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=2048)
ROUNDS = 5


def filled() -> Slots:
    slots, g = Slots(len(LENGTHS), 1, max(LENGTHS), 4), torch.Generator().manual_seed(0)
    for s, n in enumerate(LENGTHS):
        slots.open(s, s, [1], 1, version=0)
        ids = torch.randint(MODEL["vocab_size"], (n - 1, 4), generator=g)
        slots.append(s, ids[:, 0], ids, torch.zeros(ids.shape), torch.zeros(n - 1), torch.zeros(n - 1))
    return slots


@contextmanager
def masked(segments):
    """teacher.py with the forward pass that it had: a mask, and a cache that nobody reads."""
    def last_hidden(model, tokens, layers):
        mask = pad(segments, model.device)[1]
        return model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state, []
    now, teacher.last_hidden = teacher.last_hidden, last_hidden
    try:
        yield
    finally:
        teacher.last_hidden = now


def main():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL)).eval()
    slots = filled()
    segments = [slots.read(s) for s in range(len(LENGTHS))]

    def timed() -> float:
        start = time.perf_counter()
        teacher.score(model, segments, slots, "candidates", MODEL["vocab_size"])
        return time.perf_counter() - start
    timed()
    seconds = {"now": [], "before": []}
    for _ in range(ROUNDS):
        seconds["now"].append(timed())
        now = slots.logq.clone()
        with masked(segments):
            seconds["before"].append(timed())
        apart = (slots.logq - now).nan_to_num().abs().max().item()
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    row = dict(tokens=[len(LENGTHS), max(LENGTHS)], model=MODEL, threads=torch.get_num_threads(), seconds=seconds,
               apart=apart, **medians)
    with ROWS.open("a") as f:
        f.write(json.dumps(row | provenance({}, {})) + "\n")
    print(json.dumps(medians | dict(speedup=medians["before"] / medians["now"], apart=apart)))


if __name__ == "__main__":
    main()

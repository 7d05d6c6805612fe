"""
A learner's step against the bare model, and against the step as it was before head.py.

    python benchmarks/step.py              # Qwen3-0.6B's shape, 4 x 512 tokens, float32 on the CPU: a round, 5 minutes
    python benchmarks/step.py toy          # the toy's student, 64 x 48 tokens, in pairs; half a minute
    python benchmarks/step.py full         # one whole step at that shape: update, publish; peak memory against plan.py
    python benchmarks/step.py --gpu        # Qwen3-1.7B's shape, bf16, 4 x 4,096 tokens: model FLOPs utilisation

Random weights. Of 512 tokens 32 are the prompt; N = 4 candidates, `reverse_mc`. A round runs, one after the other:
    body         forward and backward of the layers alone, from a fixed gradient of the last hidden states
    model        the same with the head at the response positions, from a fixed gradient of their logits: no loss
    ours         Learner.backward
    before       the same before head.py: autograd through log_softmax in chunks of 1,024, a mask, a key-value cache
    ce           on a GPU instead: cross-entropy on all logits, as a plain training step has it

Every call adds a round to benchmarks/step.jsonl; ratios are taken within rounds, and their medians reported. Last line:
{"step_vs_model": ours / model in seconds, "step_vs_body": ours / body, "speedup": before / ours, "tokens_s": response
tokens per second of ours} and of `full` {"step_s", "update_s", "publish_s", "peak_gb", "plan_gb"}; of --gpu
{"mfu", "mfu_ce", "peak_gb", "peak_gb_ce"}.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import learner  # noqa: E402
from cache import Slots  # noqa: E402
from config import Config  # noqa: E402
from control import plan  # noqa: E402
from estimators import importance_weight, reverse_mc, reverse_value  # noqa: E402
from models import footprint, student  # noqa: E402
from models.alignment import pad, response_rows  # noqa: E402
from record.provenance import provenance  # noqa: E402
from transport.weights import Weights  # noqa: E402

ROWS, N, PROMPT = HERE / "step.jsonl", 4, 32
SHAPES = {      # responses, tokens of each, and the model
    "0.6B": (4, 512, dict(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                          num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "1.7B": (4, 4096, dict(vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "toy": (64, 48, dict(vocab_size=32, hidden_size=96, intermediate_size=288, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=3, head_dim=32, tie_word_embeddings=False))}


class Before(learner.Learner):
    """The step as it was: what head.py replaced."""

    def backward(self, group, count, *_):
        student = self.student
        tokens, mask = pad(group, student.device)
        with student.compute():
            hidden = student.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
        rows = response_rows(hidden, group)
        slot = {name: self.cached(group, name) for name in ("ids", "logpi", "logq")}
        leaf, parts = rows.detach().requires_grad_(), []
        for i in range(0, len(rows), 1024):
            at = slice(i, i + 1024)
            ids, logpi, logq = (slot[name][at] for name in ("ids", "logpi", "logq"))
            with student.compute():
                logits = student.head(leaf[at])
            logp = logits.float().log_softmax(-1).gather(-1, ids.long())
            loss = reverse_mc(logp, logq, logpi)
            (loss.sum() / count).backward()
            drawn = logp.detach()
            w = importance_weight(drawn, logpi)
            distinct = ids.sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
            parts.append({"loss": loss.detach(), "kl": reverse_value(drawn, logq, logpi), "w": w[:, 0],
                          "entropy": -(w * drawn).sum(-1), "duplicates": 1 - distinct / N, "y": ids[:, 0]})
        rows.backward(leaf.grad)
        nothing = {name: torch.zeros(len(rows)) for name in learner.MEASURED}
        return nothing | {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def ready(shape: str, kind=learner.Learner, **flags):
    """A learner with random weights, and scored slots for it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    B, T, size = SHAPES[shape]
    gpu = torch.cuda.is_available() and shape == "1.7B"
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=T, **size)).eval()
    student.load_model = lambda folder, device, dtype: model
    prompt = min(PROMPT, T // 6)
    cfg = Config(gpus=int(gpu), estimator="reverse_mc", mc_samples=N, batch=B, max_prompt=prompt, student="random",
                 max_response=T - prompt, micro_tokens=B * T, steps=1, rollouts=1, teachers=1, learners=1,
                 engine="hf", **flags)
    slots, g = Slots(B, prompt, T - prompt, N), torch.Generator().manual_seed(1)
    for s in range(B):
        n = T - prompt
        ids = torch.randint(0, size["vocab_size"], (n, N), generator=g)
        slots.open(s, s, torch.randint(0, size["vocab_size"], (prompt,), generator=g), prompt, 0)
        logpi = -torch.rand(n, N, generator=g) * 3 - 10
        slots.append(s, ids[:, 0], ids, logpi, logpi[:, 0], torch.zeros(n))
        slots.logq[s, :n] = -torch.rand(n, N, generator=g) * 3 - 10
    dtype = torch.bfloat16 if gpu else torch.float32
    return kind(cfg, "cuda" if gpu else "cpu", dtype), [slots.read(s) for s in range(B)], slots


def cross_entropy(one: student.Student, segments) -> None:
    """Forward and backward pass of a plain training step: cross-entropy on all logits."""
    tokens, _ = pad(segments, one.device)
    with one.compute():
        logits = one.model(input_ids=tokens, use_cache=False).logits
    following = tokens.roll(-1, dims=1).flatten()
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), following).backward()


def timed(work) -> float:
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    sync()
    start = time.monotonic()
    work()
    sync()
    return time.monotonic() - start


def round_of(shape: str, methods: list[str]) -> dict[str, float]:
    """Seconds of each method."""
    ours, segments, _ = ready(shape)
    count = sum(map(len, segments))
    before = Before.__new__(Before)
    before.__dict__ = ours.__dict__
    model = ours.student
    grad_rows = torch.randn(count, model.head.weight.shape[1], device=model.device)

    def bare(with_head: bool):
        rows = model.rows(segments)
        if with_head:
            with model.compute():
                logits = model.head(rows)
            logits.backward(torch.ones((), device=model.device, dtype=logits.dtype).expand_as(logits) / count)
        else:
            rows.backward(grad_rows.to(rows.dtype))

    work = {"body": lambda: bare(False), "model": lambda: bare(True), "ours": lambda: ours.backward(segments, count),
            "before": lambda: before.backward(segments, count), "ce": lambda: cross_entropy(model, segments)}
    seconds, peak = {}, {}
    work[methods[0]]()                                   # gradients exist from here on, and kernels are chosen
    for m in methods:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds[m] = timed(work[m])
        peak[m] = torch.cuda.max_memory_allocated() / 1e9 if model.device.type == "cuda" else 0.0
        print(f"{shape} {m:8} {seconds[m]:8.3f} s", file=sys.stderr, flush=True)
    return dict(shape=shape, tokens=count, seconds=seconds, peak_gb=peak)


def toy(pairs: int) -> dict[str, float]:
    """Whole steps of the toy, update included, in turn; medians."""
    new, segments, _ = ready("toy")
    old, _, _ = ready("toy", Before)
    seconds = {"before": [], "ours": []}
    for i in range(pairs + 3):
        for name, one in (("before", old), ("ours", new)):
            s = timed(lambda: one.step(segments, 0))
            if i >= 3:
                seconds[name].append(s)
    return dict(shape="toy", tokens=sum(map(len, segments)), pairs=pairs,
                seconds={name: statistics.median(s) for name, s in seconds.items()})


def full() -> dict:
    """One learner's whole step at the 0.6B shape in a process of its own, and what plan.py said it would take."""
    one, segments, _ = ready("0.6B")
    model = one.student.model
    shape = footprint.Shape.of(model.config)
    need = next(n for n in plan.memory(one.cfg, shape, shape) if n.worker == "learner")
    weights = Weights({n: p.shape for n, p in model.named_parameters()}, list(range(64)), torch.float32)
    seconds = {"first step": timed(lambda: one.step(segments, 0))}
    update = timed(lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()]
                   and one.optimizer.step())
    one.optimizer.zero_grad()
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 / 1e9
    publish = [timed(lambda v=v: one.publish(weights, v)) for v in (0, 2, 4)]
    return dict(shape="0.6B full", tokens=sum(map(len, segments)), step_s=seconds["first step"], update_s=update,
                publish_s=statistics.median(publish), push_bytes=weights.flat[0].nbytes, peak_gb=peak, plan_gb=need.gb,
                plan=need.parts)


def flops(shape: str, head_tokens: int) -> float:
    """Of a forward and backward pass: 6 per parameter and token, and attention's 12 L A T^2 B, halved: causal."""
    from transformers import Qwen3Config
    B, T, size = SHAPES[shape]
    x = footprint.Shape.of(Qwen3Config(**size))
    return 6 * ((x.P - x.V * x.H) * B * T + x.V * x.H * head_tokens) + 6 * x.L * x.A * T * T * B


def rows(shape: str) -> list[dict]:
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return [r for r in found if r["shape"] == shape]


def ratio(found: list[dict], a: str, b: str) -> float:
    return statistics.median(r["seconds"][a] / r["seconds"][b] for r in found)


def table() -> str:
    """Markdown, from step.jsonl."""
    lines = ["| shape | response tokens/s | before | × | of the model with its head | of the layers alone | rounds |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for shape in ("toy", "0.6B"):
        if found := rows(shape):
            tok_s = [statistics.median(r["tokens"] / r["seconds"][m] for r in found) for m in ("ours", "before")]
            bare = [f"{ratio(found, 'ours', m):.2f}" if m in found[0]["seconds"] else "" for m in ("model", "body")]
            lines.append(f"| {shape} | {tok_s[0]:,.1f} | {tok_s[1]:,.1f} | {ratio(found, 'before', 'ours'):.2f} | "
                         f"{bare[0]} | {bare[1]} | {sum(r.get('pairs', 1) for r in found)} |")
    if found := rows("0.6B full"):
        r = found[-1]
        lines += ["", f"Of a whole step at the 0.6B shape ({r['step_s']:.0f} s) the update takes "
                  f"{r['update_s'] / r['step_s']:.1%} and publishing {r['push_bytes'] / 1e9:.1f} GB "
                  f"{r['publish_s'] / r['step_s']:.1%}; the process took {r['peak_gb']:.1f} GB where the plan said "
                  f"{r['plan_gb']:.1f}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=("rounds", "toy", "full"), default="rounds")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU, dense bf16 (H100, H200: 989)")
    args = parser.parse_args()
    shape = "1.7B" if args.gpu else "0.6B"
    row = (toy(30) if args.what == "toy" else full() if args.what == "full" else
           round_of(shape, ["ours", "model", "ce"] if args.gpu else ["ours", "model", "body", "before"]))
    with ROWS.open("a") as f:
        f.write(json.dumps(row | dict(threads=torch.get_num_threads()) | provenance({}, {})) + "\n")
    found = rows(row["shape"])
    if args.what == "full":
        print(json.dumps({k: row[k] for k in ("step_s", "update_s", "publish_s", "push_bytes", "peak_gb", "plan_gb")}))
    elif args.gpu:
        B, T, _ = SHAPES[shape]
        said = {"mfu": flops(shape, row["tokens"]) / row["seconds"]["ours"], "mfu_ce":
                flops(shape, B * T) / row["seconds"]["ce"]}
        print(json.dumps({k: v / args.peak_tflops / 1e12 for k, v in said.items()} | {
            "step_vs_model": ratio(found, "ours", "model"), "peak_gb": row["peak_gb"]["ours"],
            "peak_gb_ce": row["peak_gb"]["ce"]}))
    else:
        said = {"speedup": ratio(found, "before", "ours"), "rounds": len(found),
                "tokens_s": statistics.median(r["tokens"] / r["seconds"]["ours"] for r in found),
                "tokens_s_before": statistics.median(r["tokens"] / r["seconds"]["before"] for r in found)}
        if args.what == "rounds":
            said = {"step_vs_model": ratio(found, "ours", "model"), "step_vs_body": ratio(found, "ours", "body")} | said
        print(json.dumps(said))


if __name__ == "__main__":
    main()

"""
Seconds to publish a student and to push it into an engine, through shared memory, at the layout of a real model.

    python benchmarks/push.py                               # a quarter of Qwen3-1.7B's layers, bf16: 8 GB
    python benchmarks/push.py --layers 28                   # all of them: 21 GB
    python benchmarks/push.py --root ../other-checkout      # the code of another checkout, or of an earlier commit
    python benchmarks/push.py --model 8B --layers 4 --dtype float32

    publish  Weights.publish, from float32 parameters; with its checksums, where the code has them
    push     Weights.read, Engine.load and, where there are any, the engine's checksums, all of which must be right;
             without the forward pass on the probe, which is the same in all of them

The engine is the one in transformers. With a GPU, learner and engine are on it; --cpu leaves it alone. The first two
rounds, in which memory is touched for the first time, do not count. The measurement is a process of its own, which
takes the code under --root; a round takes turns between publish and push. Appends a record to benchmarks/push.jsonl.
Last line: {"publish_s", "push_s", "gb"}, medians of the rounds, and the size of a version.
"""
import argparse
import importlib
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECORDS = HERE / "push.jsonl"
PROBE = [i % 30 for i in range(64)]
QWEN3 = dict(vocab_size=151_936, head_dim=128, num_key_value_heads=8, tie_word_embeddings=True)
MODELS = {
    "0.6B": QWEN3 | dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16),
    "1.7B": QWEN3 | dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16),
    "8B": QWEN3 | dict(hidden_size=4096, intermediate_size=12_288, num_attention_heads=32, tie_word_embeddings=False)}
LAYERS = 7                       # a quarter of those of 1.7B
# Where the classes are, in the newest code and in that of earlier commits
PLACES = {"Weights": ("transport.weights", "cache"), "HFEngine": ("engines.hf", "rollout")}
UNCOUNTED = 2


def found(name: str):
    """A class of the checkout that is measured."""
    for module in PLACES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"no {name} in {' or '.join(PLACES[name])}")


def make_engine(model: str, layers: int, dtype, device: str):
    """An engine whose weights are yet to come."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    with torch.device("meta"):
        student = Qwen3ForCausalLM(Qwen3Config(**MODELS[model], num_hidden_layers=layers)).to(dtype)
    student = student.to_empty(device=device)
    student.tie_weights()
    kind = found("HFEngine")
    engine = kind.__new__(kind)
    engine.model = student
    engine.rows = []
    engine.drawn = SimpleNamespace(version=0)            # where it notes the version that it holds
    return engine


def push(weights, engine, version: int) -> None:
    """What a rollout worker does between two steps of its engine."""
    published = weights.read(version)
    if isinstance(published, tuple):                     # of earlier commits: version, tensors, log-probs
        engine.load(published[1])
        return
    if "version" in inspect.signature(engine.load).parameters:
        engine.load(published.tensors, version)
    else:
        engine.load(published.tensors)
    for x in engine.checksums({name: p.shape for name, p in published.tensors.items()}, version):
        assert x.checksum == published.checksum_like(x), f"{x.name} did not arrive"


def measure(model: str, layers: int, dtype_name: str, rounds: int, cpu: bool) -> dict:
    """In the process that has the code to be measured on its path."""
    import torch
    device = "cuda:0" if torch.cuda.is_available() and not cpu else "cpu"
    dtype = getattr(torch, dtype_name)
    engine = make_engine(model, layers, dtype, device)
    parameters = {name: torch.rand(p.shape, device=device) for name, p in engine.model.named_parameters()}
    weights = found("Weights")({name: p.shape for name, p in parameters.items()}, PROBE, dtype)
    if hasattr(weights, "attach"):
        weights.attach(device)
    seconds: dict[str, list[float]] = {"publish_s": [], "push_s": []}
    for version in range(rounds + UNCOUNTED):
        works = {"publish_s": lambda v=version: weights.publish(parameters, v, torch.zeros(len(PROBE) - 1)),
                 "push_s": lambda v=version: push(weights, engine, v)}
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            if version >= UNCOUNTED:
                seconds[name].append(time.perf_counter() - start)
    gb = sum(p.numel() for p in parameters.values()) * dtype.itemsize / 1e9
    return {"gb": gb, "device": device, "threads": torch.get_num_threads(), "seconds": seconds,
            "proved": hasattr(engine, "checksums")}


def table() -> str:
    """Markdown: with each number of threads the newest record of code that proves the bits of a push, and of code that
    does not."""
    from record.report import markdown
    lines = [["threads", "code", "layers, GB of a version", "publish, s", "push, s"]]
    newest = {(r["threads"], r["proved"]): r for r in records()}
    for (threads, proved), r in sorted(newest.items()):
        label = "this one, all bits proved" if proved else "earlier, nothing proved"
        seconds = {name: f"{statistics.median(s):.2f}" for name, s in r["seconds"].items()}
        lines.append([str(threads), label, f"{r['layers']}, {r['gb']:.1f}", seconds["publish_s"], seconds["push_s"]])
    return markdown(lines)


def records() -> list[dict]:
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def commit_of(root: Path) -> str:
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="1.7B")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of what is published")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose code is measured")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    what = (args.model, args.layers, args.dtype, args.rounds, args.cpu)
    if args.measure:
        sys.path[0] = str(args.root)
        print(json.dumps(measure(*what)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", f"--root={args.root.resolve()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    got = json.loads(done.stdout.splitlines()[-1])
    sys.path[0] = str(ROOT)
    from record.provenance import provenance
    made = provenance({}, {})
    record = {"model": args.model, "layers": args.layers, "dtype": args.dtype, "commit": commit_of(args.root), **got}
    record |= {name: made[name] for name in ("versions", "hardware")}
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    for name, seconds in got["seconds"].items():
        print(f"{name[:-2]:8}" + "".join(f"{s:9.3f}" for s in seconds))
    print(json.dumps({name: statistics.median(s) for name, s in got["seconds"].items()} | {"gb": got["gb"]}))


if __name__ == "__main__":
    main()

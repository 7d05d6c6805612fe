"""
What the logits processor costs the host in one step of vLLM with 256 responses: Python, beside the arithmetic.

    python benchmarks/apply.py                              # a minute on one core
    python benchmarks/apply.py --root ../other-checkout     # the code of another checkout, or of an earlier commit

Milliseconds of one call of `Draws.apply` (engines/vllm.py) with N = 4 independent draws per row, at V = 151,936 and
with 32 words. With 32 words the arithmetic takes next to nothing: what is left is Python and the calls of torch, which
are the same for every V, and during which a GPU has nothing to do. The measurement is a process of its own, which takes
the code under --root. Appends a record to benchmarks/apply.jsonl.
Last line: one JSON object, {"python_ms", "all_ms"}: medians of the calls with 32 and with 151,936 words.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECORDS = HERE / "apply.jsonl"
ROWS, N, V, FEW = 256, 4, 151_936, 32
CALLS = {FEW: 200, V: 10}


def make_draws():
    """The processor, and what tells it of a response: its number and its output, a list that vLLM appends to."""
    if importlib.util.find_spec("engines"):
        from engines.sampling import Drawing
        from engines.vllm import Draws, Request
        drawing = Drawing(n=N, design="iid", k=0, temperature=1.0, top_p=1.0, seed=0)
        requests: list = [Request(str(i), drawing, uid=i, position=0) for i in range(ROWS)]
    else:                                        # earlier commits
        from engine_vllm import Draws
        requests = [dict(key=i, uid=i, position=0, seed=0, stream=0, n=N, k=0, temperature=1.0, top_p=1.0)
                    for i in range(ROWS)]
    draws = Draws(None, "cpu", False)
    outputs: list[list[int]] = [[] for _ in range(ROWS)]
    added = [(i, SimpleNamespace(extra_args={"asyncopd": request}), None, outputs[i])
             for i, request in enumerate(requests)]
    draws.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    return draws, outputs


def measure() -> dict[str, list[float]]:
    """Milliseconds of every call, in the process that has the code to be measured on its path."""
    import torch
    torch.set_num_threads(1)
    found = {}
    for words, calls in CALLS.items():
        draws, outputs = make_draws()
        logits = torch.randn(ROWS, words, generator=torch.Generator().manual_seed(0))
        ms = []
        for _ in range(calls + 2):               # two that do not count
            given = logits.clone()
            start = time.perf_counter()
            draws.apply(given)
            ms.append(1000 * (time.perf_counter() - start))
            for row, word in zip(outputs, given.argmax(1).tolist()):
                row.append(word)
        found[str(words)] = ms[2:]
    return found


def table() -> str:
    """Markdown: the newest record of every commit, medians."""
    from record.report import markdown
    found = {}
    if RECORDS.exists():
        for line in RECORDS.read_text().splitlines():
            r = json.loads(line)
            found[r["commit"][:7]] = [f"{statistics.median(ms):.1f}" for ms in r["ms"].values()]
    return markdown([["commit", f"V = {FEW}, ms", f"V = {V:,}, ms"], *([commit, *ms] for commit, ms in found.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose code is measured")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        sys.path[0] = str(args.root)
        print(json.dumps(measure()))
        return
    sys.path[:1] = [str(ROOT), str(HERE)]
    from push import commit_of

    from record.provenance import provenance
    command = [sys.executable, __file__, "--measure", f"--root={args.root.resolve()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    ms = json.loads(done.stdout.splitlines()[-1])
    made = provenance({}, {})
    record = {"commit": commit_of(args.root), "ms": ms, "versions": made["versions"], "hardware": made["hardware"]}
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({"python_ms": statistics.median(ms[str(FEW)]), "all_ms": statistics.median(ms[str(V)])}))


if __name__ == "__main__":
    main()

"""
The LM head and the loss on it, alone: time and memory of head.py against the ways that autograd offers.

    python benchmarks/head.py              # every shape, float32 on the CPU; about 20 minutes on two cores, 10 GB
    python benchmarks/head.py 1024 4       # one shape: width H and candidates N
    python benchmarks/head.py --gpu        # every shape, bf16 on a GPU; Liger-Kernel too, if it is installed

2,048 positions, 151,936 words, the estimator `reverse_mc`; gradients of the hidden states and of the head.
    naive        all logits, log_softmax, gather, backward
    checkpoint   torch.utils.checkpoint around the same, chunk by chunk: the logits are computed twice
    ours         head.head_backward, its default chunk
    liger, jsd   on a GPU: Liger's fused linear JSD, and ours for the same divergence, `jsd_dense`

Every round runs them one after the other in one process. Seconds are of a whole forward and backward; a ratio of times
is the median over rounds. Extra memory is the peak above the weight, the inputs and the gradients of both, which exist
before: on a CPU the resident set's high-water mark (set back by /proc/self/clear_refs), on a GPU the allocator's.
Rows: benchmarks/head.jsonl, one per shape and device. Last line: one JSON object, the worst over the shapes of this
device: {"peak_ratio_naive", "time_ratio_best", "grad_rel_err"}: ours / naive in extra memory; ours / the fastest of the
others in time; |gradient - naive's| / |naive's|, the larger of rows and weight.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from config import Config  # noqa: E402
from estimators import jsd_dense, reverse_mc  # noqa: E402
from models.footprint import chunk_size  # noqa: E402
from models.head import head_backward  # noqa: E402
from record.provenance import provenance  # noqa: E402

M, V, SHAPES, ROWS = 2048, 151_936, [(1024, 4), (1024, 64), (2048, 4), (2048, 64)], HERE / "head.jsonl"


class Problem:
    """Weights, inputs and their gradients; each method adds to the gradients, none keeps anything else."""

    def __init__(self, H: int, N: int, gpu: bool):
        self.device, self.dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        torch.manual_seed(0)
        self.head = torch.nn.Linear(H, V, bias=False, device=self.device)
        self.rows = torch.randn(M, H, device=self.device)
        self.ids = torch.randint(0, V, (M, N), device=self.device)
        self.logpi, self.logq = (-torch.rand(2, M, N, device=self.device) * 3 - 10).unbind()
        self.chunk = chunk_size(Config(gpus=int(gpu), estimator="reverse_mc"), V)
        self.head.weight.grad, self.rows.grad = torch.zeros_like(self.head.weight), torch.zeros_like(self.rows)
        self.teacher = (torch.randn(M, H, device=self.device), torch.randn(V, H, device=self.device) / H ** 0.5
                        ) if gpu else None

    def by_autograd(self, x, at):
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.head(x)
        logp = logits.float().log_softmax(-1).gather(-1, self.ids[at])
        return reverse_mc(logp, self.logq[at], self.logpi[at]).sum() / M

    def naive(self):
        self.by_autograd(self.rows.requires_grad_(), slice(None)).backward()

    def checkpoint(self):
        leaf = self.rows.requires_grad_()
        parts = [slice(i, i + self.chunk) for i in range(0, M, self.chunk)]
        sum(checkpoint(self.by_autograd, leaf[at], at, use_reentrant=False) for at in parts).backward()

    def ours(self):
        loss = lambda at, logp, every: {"loss": reverse_mc(logp, self.logq[at], self.logpi[at])}
        self.rows.grad += self.by_hand(loss, False, self.chunk)

    def jsd(self):
        def loss(at, logp, every):
            x, weight = (t[at] if t is self.teacher[0] else t for t in self.teacher)
            logq = (x.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1)
            return {"loss": jsd_dense(every, logq, logq)}
        self.rows.grad += self.by_hand(loss, True, max(16, self.chunk // 7))

    def by_hand(self, loss, whole, chunk):
        return head_backward(self.head, self.rows.detach(), self.ids, loss, all_words=whole, count=M,
                             chunk=chunk, dtype=self.dtype)[0]

    def liger(self):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
        x, weight = (t.bfloat16() for t in self.teacher)
        LigerFusedLinearJSD(jsd_beta=0.5)(self.rows.requires_grad_().bfloat16(), self.head.weight.bfloat16(), x, weight,
                                          None).backward()

    def gradients(self):
        """Copies of rows' and head's gradients, which are set to zero."""
        found = self.rows.grad.clone(), self.head.weight.grad.clone()
        self.rows.grad.zero_(), self.head.weight.grad.zero_()
        return found


def measure(problem, method) -> tuple[float, int]:
    """Seconds and bytes above what was there before."""
    if problem.device == "cuda":
        torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.monotonic()
        getattr(problem, method)()
        torch.cuda.synchronize()
        return time.monotonic() - start, torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.monotonic()
    getattr(problem, method)()
    return time.monotonic() - start, status("VmHWM") - before


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def one(H: int, N: int, gpu: bool, rounds: int) -> dict:
    problem, methods = Problem(H, N, gpu), ["naive", "checkpoint", "ours"]
    if gpu:
        import importlib.util
        methods += ["jsd"] + ["liger"] * (importlib.util.find_spec("liger_kernel") is not None)
    seconds, peak, error = {m: [] for m in methods}, dict.fromkeys(methods, 0), 0.0
    for _ in range(rounds):
        wanted = None
        for method in methods:
            s, extra = measure(problem, method)
            seconds[method].append(s)
            peak[method] = max(peak[method], extra)
            got = problem.gradients()
            if method == "ours":
                error = max(error, *(((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted)))
            wanted = got if method == "naive" else wanted
            del got
            print(f"H {H} N {N} {method:10} {s:6.2f} s  {extra / 2**20:7,.0f} MiB", file=sys.stderr, flush=True)
    others = [min(x) for x in zip(seconds["naive"], seconds["checkpoint"])]
    return dict(H=H, N=N, M=M, V=V, gpu=gpu, dtype=str(problem.dtype), chunk=problem.chunk, seconds=seconds, peak=peak,
                peak_ratio_naive=peak["ours"] / peak["naive"], grad_rel_err=error,
                time_ratio_best=statistics.median(a / b for a, b in zip(seconds["ours"], others)),
                threads=torch.get_num_threads(), **provenance({}, {}))


def rows() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> str:
    """Markdown, from head.jsonl."""
    lines = ["| width, N | device | all logits | in checkpointed chunks | head.py | seconds, of the faster | extra "
             "memory, of all logits |", "|---|---|--:|--:|--:|--:|--:|"]
    for r in sorted(rows(), key=lambda r: (r["gpu"], r["H"], r["N"])):
        cells = [f"{statistics.median(r['seconds'][m]):.1f} s, {r['peak'][m] / 1e9:.2f} GB"
                 for m in ("naive", "checkpoint", "ours")]
        lines.append(f"| {r['H']:,}, {r['N']} | {'GPU, bf16' if r['gpu'] else 'CPU, float32'} | {' | '.join(cells)} | "
                     f"{r['time_ratio_best']:.2f} | {r['peak_ratio_naive']:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", nargs="*", type=int, metavar="H N")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.shape:
        row = one(*args.shape, args.gpu, args.rounds)
        kept = [r for r in rows() if (r["H"], r["N"], r["gpu"]) != (row["H"], row["N"], row["gpu"])]
        ROWS.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]))
    else:       # a process for each: what one leaves to the allocator is not the next one's
        for shape in SHAPES:
            subprocess.run([sys.executable, __file__, *map(str, shape), f"--rounds={args.rounds}",
                            *["--gpu"] * args.gpu], check=True, stdout=subprocess.DEVNULL)
    mine = [r for r in rows() if r["gpu"] == args.gpu]
    print(json.dumps({key: max(r[key] for r in mine) for key in ("peak_ratio_naive", "time_ratio_best",
                                                                 "grad_rel_err")}))


if __name__ == "__main__":
    main()

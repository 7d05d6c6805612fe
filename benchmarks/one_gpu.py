"""
What one GPU does with all roles on it: 20 steps at the shapes of Qwen3-0.6B (student) and Qwen3-1.7B (teacher), bf16,
responses of 1,024 tokens, random weights. Speed and memory do not depend on what the weights know, but the engine's gap
does: random models are close to uniform, and a trained one has more to differ in.

    python benchmarks/one_gpu.py                        # one GPU, vLLM, minutes; ~10 GB of disk in runs/
    python benchmarks/one_gpu.py --engine=hf --batch=32 # more flags of asyncopd.py
    python benchmarks/one_gpu.py --tiny                 # the same script on a CPU with models of a few thousand weights

Not yet measured on a GPU: there is no row of one in one_gpu.jsonl. A row holds command, commit, versions, hardware.
Last line: one JSON object with, per role, tokens per second of wall clock and of its busy time; push_s and
engine_gap_p95 (median over steps), engine_gap_max (largest), peak_gb (largest memory in use on the GPU, all processes,
by nvidia-smi twice a second; null without one).
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RAW = HERE / "one_gpu.jsonl"
QWEN3 = dict(vocab_size=151_936, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             max_position_embeddings=40_960, rope_theta=1e6, tie_word_embeddings=True)
SHAPES = {"student": QWEN3 | dict(hidden_size=1024, intermediate_size=3072),
          "teacher": QWEN3 | dict(hidden_size=2048, intermediate_size=6144)}
TINY = dict(vocab_size=512, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            max_position_embeddings=512, hidden_size=64, intermediate_size=192, tie_word_embeddings=True)
FLAGS = ["--gpus=1", "--steps=20", "--batch=64", "--max-ahead=1", "--max-prompt=256", "--max-response=1024",
         "--max-running=128", "--micro-tokens=8192"]
TINY_FLAGS = ["--gpus=0", "--steps=5", "--batch=8", "--max-ahead=1", "--max-prompt=64", "--max-response=32",
              "--max-running=16"]


def make(root: Path, tiny: bool) -> dict[str, str]:
    """Folders of the two models and a file of prompts that are as long as --max-prompt allows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data.toy import SYMBOLS, toy_tokenizer
    tokenizer, length = toy_tokenizer(), 64 if tiny else 256
    for seed, (name, shape) in enumerate(SHAPES.items()):
        if not (root / name / "config.json").exists():
            torch.manual_seed(seed)
            config = Qwen3Config(**TINY if tiny else shape, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                                 pad_token_id=tokenizer.pad_token_id, dtype="float32" if tiny else "bfloat16")
            Qwen3ForCausalLM(config).to(config.dtype).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    prompts, rng = root / "prompts.jsonl", random.Random(0)
    prompts.write_text("".join(json.dumps({"prompt": "".join(rng.choices(SYMBOLS, k=length))}) + "\n"
                               for _ in range(2000)))
    return dict(student=str(root / "student"), teacher=str(root / "teacher"), task=str(prompts))


class Memory(threading.Thread):
    """The largest memory in use on the first GPU, GB, while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.peak = threading.Event(), None

    def run(self) -> None:
        asked = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which("nvidia-smi") and not self.ended.wait(0.5):
            said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
            if said.isdigit():
                self.peak = max(self.peak or 0.0, int(said) * 2 ** 20 / 1e9)


def result(log: list[dict], peak_gb: float | None) -> dict:
    done, steps = log[-1], [x for x in log if x["type"] == "step"]
    speed = {"rollout": done["gen_tok_s"], "teacher": done["train_tok_s"], "learner": done["train_tok_s"]}
    return dict(tok_s={role: round(x) for role, x in speed.items()},
                busy_tok_s={role: round(x / done["busy"][role]) for role, x in speed.items()},
                push_s=median(s["push_s"] for s in steps), engine_gap_p95=median(s["engine_gap_p95"] for s in steps),
                engine_gap_max=max(s["engine_gap_max"] for s in steps), peak_gb=peak_gb, steps=len(steps),
                tokens=done["tokens_trained"], wall_s=done["wall_s"], overlap=done["overlap"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with tiny models; not recorded")
    args, more = parser.parse_known_args()       # flags of asyncopd.py
    root = Path("runs") / ("one-gpu-tiny" if args.tiny else "one-gpu")
    there, out = make(HERE.parent / root, args.tiny), HERE.parent / root / "run"
    command = [sys.executable, "asyncopd.py", *(f"--{k}={v}" for k, v in there.items()), f"--out={out}", "--overwrite",
               "--eval.n=0", *(TINY_FLAGS if args.tiny else FLAGS), *more]
    memory = Memory()
    memory.start()
    done = subprocess.run(command, cwd=HERE.parent)
    memory.ended.set()
    if done.returncode:
        sys.exit(f"exit code {done.returncode}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found, run = result(log, memory.peak), log[0]
    if not args.tiny:
        with RAW.open("a") as f:
            f.write(json.dumps({k: run[k] for k in ("argv", "commit", "hardware", "versions")} | found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

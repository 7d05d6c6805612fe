"""
Distillation of a real language model, small enough for two CPU cores: GSM8K's problems in English, 4,096 words.

A teacher is trained as a language model on the problems and solutions of train.jsonl; a smaller student of the same
tokenizer is trained on them for a shorter time. Then the shipped command distils, asynchronously. Measured is the exact
KL(p || q), over the whole vocabulary, at every token that the student itself writes to held-out problems (of
test.jsonl, the same ones before and after), with a 95% interval over problems.

    python benchmarks/gsm8k_lm.py run --data FOLDER       # of train.jsonl and test.jsonl; the models are kept in runs/
    python benchmarks/gsm8k_lm.py figure                  # figures/gsm8k_lm.png, from gsm8k_lm.jsonl alone

Last line of `run`: one JSON object with kl_before, kl_after, minutes (of the command, from its start to its end).
"""
import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
RAW = HERE / "gsm8k_lm.jsonl"
MODELS = {
    "words": 4096,
    "teacher": dict(layers=3, hidden=192, epochs=1.7, lr=3e-3, seed=1),
    "student": dict(layers=2, hidden=128, epochs=0.25, lr=3e-3, seed=2),
}
FLAGS = ["--gpus=0", "--data.prompt-key=question", "--data.answer-key=answer", "--steps=100", "--batch=64", "--lr=2e-3",
         "--lr-schedule=cosine", "--warmup=10", "--max-ahead=1", "--max-prompt=200", "--max-response=160",
         "--max-running=128", "--micro-tokens=4096", "--eval.n=50", "--save-every=20", "--faults.keep=0"]
HELD_OUT = 200                      # problems
OUT = Path("runs") / "bench-gsm8k-lm"

CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# -- the two models --------------------------------------------------------------------------------

def problems(path: Path) -> list[dict]:
    """Rows of question and answer; the solutions without the annotations of a calculator."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [dict(question=r["question"], answer=re.sub(r"<<.*?>>", "", r["answer"])) for r in rows]


def bpe_tokenizer(texts: list[str], words: int):
    """A byte-level BPE of so many words with a chat template, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=words, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT)


def batches(examples: list[list[int]], size: int, rng: random.Random):
    """One epoch in random order; a batch holds texts of similar length."""
    order = rng.sample(examples, len(examples))
    for i in range(0, len(order), 16 * size):
        near = sorted(order[i:i + 16 * size], key=len)
        groups = [near[j:j + size] for j in range(0, len(near), size)]
        yield from rng.sample(groups, len(groups))


def train(tokenizer, rows: list[dict], *, layers: int, hidden: int, epochs: float, lr: float, seed: int):
    """Plain language modelling on question and answer, every token."""
    from data.toy import small_model
    model = small_model(tokenizer, layers=layers, hidden=hidden, seed=seed, tied=True, vocab=MODELS["words"])
    examples = [tokenizer.apply_chat_template([dict(role="user", content=r["question"]),
                                               dict(role="assistant", content=r["answer"])], return_dict=False)
                for r in rows]
    rng, size = random.Random(seed), 16
    total = int(epochs * len(examples) / size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    done, start = 0, time.monotonic()
    while done < total:
        for group in batches(examples, size, rng):
            if done == total:
                break
            longest = max(map(len, group))
            tokens = torch.tensor([e + [0] * (longest - len(e)) for e in group])
            mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in group])
            loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0 or done == total:
                print(f"  {done}/{total} batches, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return model


def models(root: Path, rows: list[dict]) -> dict[str, str]:
    """Folders of the two models under root, trained if they are not there; the name is a hash of how they are made."""
    recipe = hashlib.sha256(json.dumps(MODELS).encode()).hexdigest()[:8]
    folders = {name: root / f"gsm8k-lm-{recipe}" / name for name in ("teacher", "student")}
    tokenizer = bpe_tokenizer([text for r in rows for text in r.values()], MODELS["words"])
    for name, folder in folders.items():
        if not (folder / "config.json").exists():
            print(f"training the {name}: {MODELS[name]}", flush=True)
            train(tokenizer, rows, **MODELS[name]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


# -- the measurement -------------------------------------------------------------------------------

@torch.no_grad()
def held_out(cfg, folder: str, rows: list[dict]) -> dict[str, list[float]]:
    """One sample of the student in `folder` to each problem: KL(p || q) and entropy summed over its tokens, their
    number; and the -log p of the written solution, summed, and its length."""
    from transformers import AutoTokenizer

    from data.prompts import Row, encode
    from engines.hf import HFEngine
    from models.loading import load_model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = encode([Row(r["question"]) for r in rows], tokenizer)
    solutions = [tokenizer(r["answer"] + "<|im_end|>")["input_ids"] for r in rows]
    engine = HFEngine(replace(cfg, student=folder), "cpu", torch.float32)
    q = load_model(cfg.teacher, "cpu", torch.float32)
    for i, prompt in enumerate(prompts):
        engine.add(i, prompt, cfg.max_response, uid=10 ** 9 + i, position=0)
    drawn: dict[int, list[int]] = {}
    while len(drawn) < len(prompts):
        drawn |= {i: x[0].tolist() for i, x in engine.take(engine.step()).items()}
    found = {name: [] for name in ("kl", "entropy", "tokens", "nll", "solution")}
    for i, prompt in enumerate(prompts):
        logp, logq = (every_logp(m, prompt, drawn[i]) for m in (engine.model, q))
        written = every_logp(engine.model, prompt, solutions[i]).gather(1, torch.tensor(solutions[i])[:, None])
        for name, x in dict(kl=(logp.exp() * (logp - logq)).sum(), entropy=-(logp.exp() * logp).sum(),
                            tokens=len(drawn[i]), nll=-written.sum(), solution=len(solutions[i])).items():
            found[name].append(float(x))
    return found


def every_logp(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probs [len(answer), V] of all words at each token of the answer: the head's own rows, here one at a time."""
    return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].float().log_softmax(-1)


def per_token(sums: dict[str, list[float]], what: str = "kl", by: str = "tokens") -> tuple[float, float, float]:
    """Mean of `what` per token with a 95% interval: 2,000 resamples of the problems."""
    x, n = np.array(sums[what]), np.array(sums[by])
    pick = np.random.default_rng(0).integers(len(x), size=(2000, len(x)))
    low, high = np.quantile(x[pick].sum(1) / n[pick].sum(1), [0.025, 0.975])
    return float(x.sum() / n.sum()), float(low), float(high)


# -- the run ---------------------------------------------------------------------------------------

def run(data: Path, more: list[str]) -> None:
    from control.resolve import configure
    folders = models(OUT.parent, problems(data / "train.jsonl"))
    rows = [r for r in problems(data / "test.jsonl") if len(r["question"]) < 500][:HELD_OUT]
    command = ["asyncopd.py", f"--task={data / 'train.jsonl'}", f"--data.eval-task={data / 'test.jsonl'}",
               f"--out={OUT}",
               "--overwrite", f"--student={folders['student']}", f"--teacher={folders['teacher']}", *FLAGS, *more]
    start = time.monotonic()
    done = subprocess.run([sys.executable, *command])
    minutes = (time.monotonic() - start) / 60
    if done.returncode:
        sys.exit(f"exit code {done.returncode}")
    measure(configure(command[1:]), OUT, rows, minutes)


def measure(cfg, out: Path, rows: list[dict], minutes: float) -> None:
    """Every saved student of the run in `out` on the same problems: gsm8k_lm.jsonl."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    saved = {int(p.name.split("-")[1]): str(p) for p in (out / "checkpoints").iterdir()}
    lines = [log[0] | dict(minutes=minutes, models=MODELS), *(x for x in log if x["type"] == "done")]
    lines += [{k: v for k, v in x.items() if k != "trained"} for x in log if x["type"] == "step"]
    for step, folder in sorted({0: cfg.student, **saved, cfg.steps: str(out / "student")}.items()):
        found = {k: [round(x, 4) for x in v] for k, v in held_out(cfg, folder, rows).items()}
        lines.append(dict(type="held-out", step=step) | found)
        print(f"step {step}: KL(p || q) {per_token(found)[0]:.3f} per token", flush=True)
    RAW.write_text("".join(json.dumps(x) + "\n" for x in lines))


def raw(kind: str) -> list[dict]:
    """The lines of gsm8k_lm.jsonl of one type: run (the first of the log, and minutes), step, done, held-out."""
    return [x for x in (json.loads(line) for line in RAW.read_text().splitlines()) if x["type"] == kind]


def result() -> dict[str, float]:
    before, after = (per_token(m)[0] for m in (raw("held-out")[0], raw("held-out")[-1]))
    return dict(kl_before=round(before, 4), kl_after=round(after, 4), minutes=round(raw("run")[0]["minutes"], 2),
                lowered=round(1 - after / before, 3), problems=len(raw("held-out")[0]["kl"]), steps=len(raw("step")))


def table() -> str:
    """Markdown for docs/results.md: the student before and after, on the held-out problems."""
    first, last = raw("held-out")[0], raw("held-out")[-1]
    rows = ["| held-out problems, 95% interval | before | after |", "|---|--:|--:|"]
    for label, what, by in (("KL(p \\|\\| q) per token, the student's own samples, nats", "kl", "tokens"),
                            ("entropy of the student there, nats", "entropy", "tokens"),
                            ("-log p per token of the written solution, nats", "nll", "solution")):
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*per_token(m, what, by)) for m in (first, last)]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    rows.append(f"| tokens per sample | {np.mean(first['tokens']):.0f} | {np.mean(last['tokens']):.0f} |")
    return "\n".join(rows)


def figure() -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps, measured = raw("step"), raw("held-out")
    at = {0: 0.0} | {s["step"]: s["wall_s"] / 60 for s in steps}
    fig, ax = plt.subplots(figsize=(7, 3.4))
    ax.plot([at[s["step"]] for s in steps], [s["kl"] for s in steps], color="#9ec3e6", lw=1,
            label="in training: estimate from each batch")
    mean, low, high = zip(*(per_token(m) for m in measured))
    ax.errorbar([at[m["step"]] for m in measured], mean, [np.subtract(mean, low), np.subtract(high, mean)],
                color="#d9822b", marker="o", ms=5, lw=0, elinewidth=1.5, capsize=3,
                label=f"held-out: exact, {len(measured[0]['kl'])} problems, 95% interval")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.set_xlabel("minutes of asynchronous distillation, two CPU cores")
    ax.set_ylabel("KL(p || q) per token, nats")
    ax.set_title(f"{mean[0]:.2f} to {mean[-1]:.2f} nats on held-out problems of GSM8K", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(HERE / "figures" / "gsm8k_lm.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("run", "figure"))
    parser.add_argument("--data", type=Path, default=Path("gsm8k"), help="folder of train.jsonl and test.jsonl")
    args, more = parser.parse_known_args()       # flags of asyncopd.py
    if args.what == "run":
        data = Path(os.path.relpath(args.data, HERE.parent))
        os.chdir(HERE.parent)                    # the record holds paths from there
        run(data, more)
    figure()
    print(table())
    print(json.dumps(result()))


if __name__ == "__main__":
    main()

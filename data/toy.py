"""
The toy: a task small enough to learn on a laptop, with a student and a teacher that are ordinary Hugging Face folders.

Additions of 2 and 3 digits with the carries written out. The two models are trained on first use and kept. What is left
out: the split into rows to train on and to evaluate on (data/tasks.py). Tests: tests/test_tasks.py
"""
from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch

from data.prompts import Row

SYMBOLS = "0123456789+=,;"
DIGITS = (2, 3)                            # shortest and longest operand
TOY = {      # how the two models are made; the folder's name is a hash of it. Without smoothing the teacher is so sure
             # of itself that a single wrong digit costs 15 nats: no teacher that one would learn from is
    "teacher": dict(layers=3, hidden=128, steps=400, lr=3e-3, seed=1, smoothing=0.01),
    "student": dict(layers=2, hidden=96, steps=132, lr=2e-3, seed=2, smoothing=0.0),
    "batch": 64,
}


def toy_row(rng: random.Random) -> tuple[Row, str]:
    """A row and its worked solution: `58+67=` -> `8+7=15,5+6+1=12,1;125`: column by column, then the sum."""
    digits = rng.randint(*DIGITS)
    a, b = (rng.randrange(10 ** (digits - 1), 10 ** digits) for _ in range(2))
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return Row(f"{a}+{b}=", str(a + b)), ",".join(steps) + f";{a + b}"


def toy_grade(text: str, answer: str) -> bool:
    return text.rsplit(";", 1)[-1].strip() == answer


def toy_tokenizer():
    """One token per character, plus the end and the padding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def small_model(tokenizer, *, layers: int, hidden: int, seed: int, tied: bool = False, vocab: int = 32):
    """A randomly initialised Qwen3 that fits in a cache; `vocab` rows, of which the tokenizer uses the first."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, dtype="float32"))


def train_toy(name: str, tokenizer, *, layers, hidden, steps, lr, seed, smoothing, batch, bar):
    """What turns random weights into a teacher, or half a student."""
    model = small_model(tokenizer, layers=layers, hidden=hidden, seed=seed)
    teach_toy(name, model, tokenizer, steps=steps, lr=lr, seed=seed, smoothing=smoothing, batch=batch, bar=bar)
    return model


def teach_toy(name, model, tokenizer, *, steps, lr, seed, smoothing, batch, bar):
    """Plain language modelling on worked solutions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    for _ in range(steps):
        examples = [toy_row(rng) for _ in range(batch)]
        texts = tokenizer([row.prompt + solution + "<eos>" for row, solution in examples],
                          padding=True, padding_side="right", return_tensors="pt")
        asked = torch.tensor([[len(row.prompt)] for row, _ in examples])
        answer = texts["attention_mask"].bool() & (torch.arange(texts["input_ids"].shape[1]) >= asked)
        # what comes next at each position: the first column, a prompt's, comes around to the end and does not count
        following = texts["input_ids"].masked_fill(~answer, -100).roll(-1, dims=1)
        logits = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), label_smoothing=smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix_str(f"{name}, loss {loss.item():.3f}")


def toy_models(root: Path) -> tuple[str, str]:
    """Folders of the toy's student and teacher under `root`; trained on first use, kept for the next run."""
    import hashlib

    from tqdm import tqdm
    recipe = hashlib.sha256(json.dumps([TOY, DIGITS, SYMBOLS]).encode()).hexdigest()[:8]
    folders = {name: root / f"toy-{recipe}" / name for name in ("student", "teacher")}
    missing = [name for name in ("teacher", "student") if not (folders[name] / "config.json").exists()]
    if missing:
        tokenizer = toy_tokenizer()
        with tqdm(total=sum(TOY[name]["steps"] for name in missing), unit="step", desc="making the toy models") as bar:
            for name in missing:
                model = train_toy(name, tokenizer, **TOY[name], batch=TOY["batch"], bar=bar)
                partial = folders[name].with_name(f".{name}-{os.getpid()}")      # renamed whole, so never half there
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                shutil.rmtree(folders[name], ignore_errors=True)
                partial.rename(folders[name])
    return str(folders["student"]), str(folders["teacher"])

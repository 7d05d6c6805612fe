"""
The toy: a task that a laptop can learn, with a student and a teacher in ordinary Hugging Face
folders.

Additions of two numbers of 2 or 3 digits, with the carries written out. Both models are trained
on first use and kept for later runs. Left out: the split into rows to train on and rows to
evaluate on (data/tasks.py). Tests: tests/test_tasks.py
"""
from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch

from data.prompts import Row

# -- rows ----------------------------------------------------------------------------------------

SYMBOLS = "0123456789+=,;"
DIGITS = (2, 3)                            # shortest and longest operand


def toy_row(rng: random.Random) -> tuple[Row, str]:
    """A row and its worked solution, which goes column by column and ends with the sum.

    For `58+67=` the solution is `8+7+0=15,5+6+1=12;125`: two digits, the carry, and their total.
    """
    digits = rng.randint(*DIGITS)
    a = rng.randrange(10 ** (digits - 1), 10 ** digits)
    b = rng.randrange(10 ** (digits - 1), 10 ** digits)
    steps = []
    carry = 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return Row(f"{a}+{b}=", str(a + b)), ",".join(steps) + f";{a + b}"


def toy_grade(text: str, answer: str) -> bool:
    return text.rsplit(";", 1)[-1].strip() == answer


# -- models --------------------------------------------------------------------------------------

# How the two models are made; their folder is named by a hash of this recipe. Without label
# smoothing the teacher is so certain that one wrong digit costs 15 nats, unlike any teacher that
# one would learn from.
TOY = {
    "teacher": dict(layers=3, hidden=128, steps=400, lr=3e-3, seed=1, smoothing=0.01),
    "student": dict(layers=2, hidden=96, steps=132, lr=2e-3, seed=2, smoothing=0.0),
    "batch": 64,
}


def toy_models(root: Path) -> tuple[str, str]:
    """Folders of the toy's student and teacher under `root`, each trained if it is missing."""
    from tqdm import tqdm
    recipe = hashlib.sha256(json.dumps([TOY, DIGITS, SYMBOLS]).encode()).hexdigest()[:8]
    folders = {role: root / f"toy-{recipe}" / role for role in ("student", "teacher")}
    missing = [role for role in ("teacher", "student")
               if not (folders[role] / "config.json").exists()]
    if missing:
        tokenizer = toy_tokenizer()
        steps = sum(TOY[role]["steps"] for role in missing)
        with tqdm(total=steps, unit="step", desc="making the toy models") as bar:
            for role in missing:
                model = train_toy(role, tokenizer, **TOY[role], batch=TOY["batch"], bar=bar)
                save_whole(folders[role], model, tokenizer)
    return str(folders["student"]), str(folders["teacher"])


def save_whole(folder: Path, model, tokenizer) -> None:
    """Saves under a temporary name and renames, so that `folder` is never half written."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def toy_tokenizer():
    """One token per character, plus padding, end and unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                                   pad_token="<pad>", unk_token="<unk>")


def small_model(tokenizer, *, layers: int, hidden: int, seed: int, tied: bool = False,
                vocab: int = 32):
    """A randomly initialised Qwen3, small enough for a processor's cache.

    `vocab` is the number of rows of its embedding, which may exceed the number of tokens.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, dtype="float32"))


# -- training ------------------------------------------------------------------------------------

def train_toy(name: str, tokenizer, *, layers: int, hidden: int, steps: int, lr: float, seed: int,
              smoothing: float, batch: int, bar):
    """A new model after `steps` steps of training; `name` is for the progress bar only."""
    model = small_model(tokenizer, layers=layers, hidden=hidden, seed=seed)
    teach_toy(name, model, tokenizer, steps=steps, lr=lr, seed=seed, smoothing=smoothing,
              batch=batch, bar=bar)
    return model


def teach_toy(name: str, model, tokenizer, *, steps: int, lr: float, seed: int, smoothing: float,
              batch: int, bar) -> None:
    """Trains the model in place to continue a prompt with its worked solution (cross-entropy)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    for _ in range(steps):
        tokens, mask, targets = toy_batch(tokenizer, rng, batch)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix_str(f"{name}, loss {loss.item():.3f}")


def toy_batch(tokenizer, rng: random.Random, size: int):
    """Tokens, attention mask and targets of `size` solved rows, each [size, longest].

    A target is the token that follows a position, or -100 where that token is not part of a
    solution.
    """
    examples = [toy_row(rng) for _ in range(size)]
    texts = tokenizer([row.prompt + solution + "<eos>" for row, solution in examples],
                      padding=True, padding_side="right", return_tensors="pt")
    tokens, mask = texts["input_ids"], texts["attention_mask"]
    prompt_length = torch.tensor([[len(row.prompt)] for row, _ in examples])
    in_solution = mask.bool() & (torch.arange(tokens.shape[1]) >= prompt_length)
    # roll moves the first column to the end; it belongs to the prompts, so it is -100 there too
    targets = tokens.masked_fill(~in_solution, -100).roll(-1, dims=1)
    return tokens, mask, targets

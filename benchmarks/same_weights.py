"""
Do two checkouts train the same weights? Short synchronous runs on the CPU, and a hash of what each of them saves.

    python benchmarks/same_weights.py CHECKOUT            the hashes of one
    python benchmarks/same_weights.py BEFORE AFTER        both, and whether they are equal; exit code 1 if not

A change that is meant to move code and nothing else is held to this. The hashes depend on the processor, so they are
made and compared on one machine and are no constants to keep. The models are made here, so that both checkouts start
from the same files. What is left out: vLLM, whose rounding depends on what runs side by side.
Ends with one JSON object: {"equal": true or false or null, "hashes": {checkout: {run: hash}}}.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ["--gpus=0", "--engine=hf", "--schedule=sync", "--steps=6", "--batch=12", "--max-prompt=8",
          "--max-response=24", "--max-running=16", "--lr=1e-3", "--seed=3", "--task=toy"]
RUNS = {      # name -> (flags, the same flags before extensions had flags of their own)
    "reverse": (["--kl=reverse", "--mc-samples=4", "--minibatches=2"],) * 2,
    "forward": (["--kl=forward", "--top-k=6"],) * 2,
    "jsd": (["--estimator=jsd_dense", "--beta=0.25"],) * 2,
    "m2po": (["--estimator=m2po", "--minibatches=2"],) * 2,
    "lora": (["--lora-rank=4"],) * 2,
    "two learners": (["--learners=2", "--micro-tokens=64"],) * 2,
    "oprd": (["--extend=oprd", "--oprd.weight=2", "--oprd.rank=8"], ["--oprd-weight=2", "--oprd-rank=8"]),
    "oprd alone": (["--estimator=none", "--extend=oprd"], ["--estimator=oprd"]),
    "effopd": (["--extend=effopd", "--effopd.gate=kl", "--lr=1e-4"], ["--effopd=kl", "--lr=1e-4"]),
    "effopd accuracy": (["--extend=effopd", "--effopd.gate=accuracy", "--lr=1e-4"],
                        ["--effopd=accuracy", "--lr=1e-4"]),
    "rock": (["--extend=rock", "--rock.weight=0.3", "--rock.k=4", "--rock.every=2", "--steps=9"],
             ["--rock=0.3,4,2", "--steps=9"]),
    "rock, bypassed": (["--extend=rock", "--rock.weight=0", "--rock.k=4", "--rock.every=2", "--steps=9"],
                       ["--rock=0,4,2", "--steps=9"]),
}


def make_tokenizer():
    """One token a character, as the toy's: made here, so that it does not follow a change of the toy."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+=,;"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def make_models(folder: Path) -> list[str]:
    """A student and a teacher of the toy's kind, from random weights; the teacher's head is sharpened."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer, flags = make_tokenizer(), []
    for role, seed, layers, sharp in (("student", 5, 2, 2.0), ("teacher", 5, 2, 6.0)):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=32, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            dtype="float32"))
        model.lm_head.weight.data *= sharp
        if role == "teacher":              # close to the student, as OPRD wants it, and another function
            for p in model.model.layers.parameters():
                p.data += 0.003 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        flags.append(f"--{role}={folder / role}")
    return flags


def hashes(checkout: Path, names: list[str], models: list[str], folder: Path) -> dict[str, str]:
    """By run, a hash of the weights that it saves, or how it failed."""
    has_extensions = (checkout / "config.py").exists()
    held_out = "--eval.n=4" if has_extensions else "--eval-n=4"
    found = {}
    for name in names:
        flags, before = RUNS[name]
        out = folder / name.replace(" ", "-").replace(",", "")
        command = [sys.executable, str(checkout / "asyncopd.py"), *models, *COMMON, held_out,
                   *(flags if has_extensions else before), f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=checkout,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            print(f"{name}: exit code {done.returncode}\n{done.stderr}", file=sys.stderr)
            found[name] = f"exit code {done.returncode}"
            continue
        weights = b"".join(p.read_bytes() for p in sorted((out / "student").glob("*.safetensors")))
        found[name] = hashlib.sha256(weights).hexdigest()[:16]
        print(f"{found[name]}  {checkout.name}  {name}", file=sys.stderr, flush=True)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkouts", nargs="+", metavar="CHECKOUT", help="one or two folders")
    parser.add_argument("--only", default=",".join(key.replace(", ", " ") for key in RUNS),
                        help="runs, separated by commas: %(default)s")
    given = parser.parse_args(argv)
    by_name = {key.replace(", ", " "): key for key in RUNS}
    names = [by_name[name] for name in given.only.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        found = {name: hashes(Path(name).resolve(), names, models, Path(folder) / str(i))
                 for i, name in enumerate(given.checkouts)}
    one = found[given.checkouts[0]]
    other = found[given.checkouts[-1]]
    equal = one == other if len(given.checkouts) == 2 else None
    for name in names:
        if one[name] != other[name]:
            print(f"{name}: {one[name]} before, {other[name]} after", file=sys.stderr)
    print(json.dumps({"equal": equal, "hashes": found}))
    return 1 if equal is False else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

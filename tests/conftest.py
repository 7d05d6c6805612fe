"""Fixtures: a pair of tiny random models in Hugging Face folders, and a Config that names them."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"      # a name that is no folder is refused at once


def save_tiny(folder: Path, *, seed: int, layers: int = 1, tied: bool = False, sharp: float = 1.0,
              vocab: int = 32) -> str:
    """`sharp` scales the output head: random weights are close to uniform, and so is every student to every teacher."""
    from data import toy
    tokenizer = toy.toy_tokenizer()
    model = toy.small_model(tokenizer, layers=layers, hidden=64, seed=seed, tied=tied, vocab=vocab)
    model.lm_head.weight.data *= sharp
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {"student": save_tiny(root / "student", seed=0),
            "teacher": save_tiny(root / "teacher", seed=1, layers=2, sharp=8.0),
            "tied": save_tiny(root / "tied", seed=2, tied=True)}


@pytest.fixture
def config(models, tmp_path):
    """config(**flags) -> Config for the tiny pair on the toy's prompts; eval__n=8 is --eval.n=8."""
    from control.command_line import as_flag
    from control.resolve import configure

    def make(**flags):
        given = dict(task="toy", student=models["student"], teacher=models["teacher"], gpus=0, engine="hf", batch=4,
                     max_prompt=16, max_response=12, max_running=16, steps=3, lr=1e-3, eval__n=8,
                     out=str(tmp_path / "run")) | flags
        return configure([as_flag(k.replace("__", "."), v) for k, v in given.items()])
    return make


@pytest.fixture
def flags(models, tmp_path):
    return dict(task="toy", student=models["student"], teacher=models["teacher"], gpus=0, engine="hf", batch=8,
                max_prompt=8, max_response=16, max_running=64, lr=1e-3, eval__n=8, eval__every=0, warmup=0,
                out=str(tmp_path / "run"))


def pytest_collection_modifyitems(items):
    """Tests that wait longest come first, so that no process is left with them alone at the end."""
    slow = ("test_faults", "test_qwen3", "test_rock", "test_pipeline")
    items.sort(key=lambda item: not item.module.__name__.endswith(slow))

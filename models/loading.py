"""
Models by folder or hub name, through transformers; no remote code is run.

What is left out: the student's own life (student.py). Tests: tests/test_job.py,
tests/test_teacher.py
"""
from __future__ import annotations

import json
from pathlib import Path

import torch


def load_model(folder: str, device: str, dtype: torch.dtype):
    """A transformers causal LM in eval mode, in which dropout is off.

    A device such as cuda:4,5 spreads the layers over several GPUs, through accelerate.
    """
    import transformers
    transformers.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    if "," in device:
        return load(folder, dtype=dtype, device_map="auto").eval()
    return load(folder, dtype=dtype).to(device).eval()


def load_head(folder: str, device: str, dtype: torch.dtype) -> torch.nn.Linear:
    """The LM head of a model; the rest of the model is released."""
    return load_model(folder, "cpu", dtype).get_output_embeddings().to(device)


def correct_dtype(config: Path, dtype: torch.dtype) -> None:
    """Let the config.json of a saved model name the dtype of its tensors. `save_pretrained` names
    that of the model, even where it is given other tensors."""
    content = json.loads(config.read_text())
    content["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def text_config(folder: str):
    """The configuration of the language model in a folder or on the hub."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(folder).get_text_config()


def vocab_size(folder: str) -> int:
    """The number of rows of a model's head."""
    return text_config(folder).vocab_size


def stop_ids(*folders: str) -> list[int]:
    """The tokens that end a response: those of the generation configs and of the tokenizers.

    Student and teacher are both asked: a word that ends the teacher's responses and not the
    student's would otherwise go on for ever.
    """
    from transformers import AutoTokenizer, GenerationConfig
    found: set[int | None] = set()
    for folder in folders:
        try:
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:                                  # a folder without a generation config
            ends = None
        if not isinstance(ends, list):
            ends = [ends]
        found.update(ends)
        found.add(AutoTokenizer.from_pretrained(folder).eos_token_id)
    return sorted(found - {None})

"""
models.loading
"""
from __future__ import annotations

import torch


def load_model(folder: str, device: str, dtype: torch.dtype):
    """A transformers causal LM and its tokenizer's folder, ready to be called; no remote code."""
    import transformers
    transformers.logging.disable_progress_bar()
    if "," in device:                                    # several GPUs: accelerate deals its layers out to them
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="auto").eval()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def stop_ids(*folders: str) -> list[int]:
    """The tokens that end a response: those of the generation configs, and the tokenizers' own.

    Of student and teacher: a word that ends the teacher's responses and not the student's would go on for ever.
    """
    from transformers import AutoTokenizer, GenerationConfig
    found = set()
    for folder in folders:
        try:
            eos = GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:                                  # a folder without one
            eos = None
        found |= {*(eos if isinstance(eos, list) else [eos]), AutoTokenizer.from_pretrained(folder).eos_token_id}
    return sorted(found - {None})


def vocab_size(folder: str) -> int:
    """Rows of a model's head."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(folder).get_text_config().vocab_size

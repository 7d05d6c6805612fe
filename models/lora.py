"""
LoRA: the student's linear layers stay as they are, and two thin matrices per layer learn.

Their product is added to the layer. All of it goes through peft, which is imported only here. To
everything but the optimizer the student is still one model: `Merged` shows its parameters with the
products added, in float32. That is what is published, checked on the probe and saved; the thin
matrices are saved separately, in the format that peft loads.

What is left out: several learners; a base in less than float32. Tests: tests/test_lora.py
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

ADAPTER = "default"              # peft's name for the only one


def with_lora(model, rank: int, seed: int):
    """Give every linear layer but the head an adapter of that rank, scale 2; only these learn.

    The model is changed in place and returned. The second matrix of an adapter starts at 0, so
    that the function is unchanged at first.
    """
    from peft import LoraConfig, inject_adapter_in_model
    torch.manual_seed(seed)
    how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                     task_type="CAUSAL_LM")
    return inject_adapter_in_model(how, model, ADAPTER).eval()


class Merged(Mapping):
    """The parameters by name, as if there were no adapters; a sum is computed when it is read."""

    def __init__(self, model):
        self.layers = {name: layer for name, layer in model.named_modules()
                       if hasattr(layer, "get_delta_weight")}
        self.plain = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()
                      if ".lora_" not in name}

    def __getitem__(self, name: str) -> Tensor:
        layer = self.layers.get(name.removesuffix(".weight"))
        if layer is None:
            return self.plain[name].detach()
        return self.plain[name].detach().float() + layer.get_delta_weight(ADAPTER).detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


def merged_state(model) -> Iterator[tuple[str, Tensor]]:
    """`Merged`, and what else belongs to a saved model: buffers, a head tied to the embedding."""
    merged = Merged(model)
    yield from merged.items()
    yield from ((name, x) for name, x in model.state_dict().items()
                if name not in merged and ".lora_" not in name and ".base_layer." not in name)


def save_adapter(model, base: str, folder: Path) -> None:
    """The thin matrices in a folder that `peft.PeftModel.from_pretrained(base, folder)` loads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": x.detach().cpu().contiguous()
               for name, x in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    how = model.peft_config[ADAPTER]
    how.base_model_name_or_path = base
    how.inference_mode = True
    how.save_pretrained(folder)

"""
The engine in plain transformers: continuous batching over one key-value cache.

Slower than vLLM, exact, and available everywhere: the reference for what an engine does. The cache
is padded on the left; rows join and leave between two steps.
What is left out: sliding windows (refused), paged memory. Shapes: R rows, L cached positions.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from config import Config
from engines.base import Engine
from engines.drawn import Drawn, DrawnTable
from engines.sampling import draw_rows, training_drawing
from models.head import float32_logits, sequence_logp
from models.loading import load_model, stop_ids
from transport.checksum import Shown, copy_and_sum


@dataclass
class Response:
    """A response in the making."""
    key: int
    tokens: list[int]                            # what it continues
    budget: int                                  # most new tokens
    uid: int
    position: int                                # of its first new token, in the response
    length: int = 0                              # new tokens so far
    last: int = -1                               # the token emitted last


class HFEngine(Engine):
    """The engine on a model of its own, loaded from --student."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.use(cfg, load_model(cfg.student, device, dtype))

    def use(self, cfg: Config, model) -> None:
        """Generate with this model. Raises RuntimeError for one with a sliding window."""
        if getattr(model.config, "sliding_window", None):
            raise RuntimeError(f"--engine hf: {cfg.student} has a sliding window, which the cache "
                               "of this engine ignores (--engine vllm)")
        self.model = model
        self.drawing = training_drawing(cfg)
        self.keeps = cfg.inflight == "keep"      # responses may be here while weights change
        self.max_running = cfg.max_running
        self.ends = set(stop_ids(cfg.student, cfg.teacher))
        self.rows: list[Response] = []           # in the order of the cache's batch dimension
        self.new: list[Response] = []            # not in the cache yet
        self.drawn = DrawnTable(model.device)
        self.cache = None                        # transformers' DynamicCache
        self.mask: Tensor | None = None          # [R, L], bool
        self.sums: dict[str, Tensor] = {}        # checksums of the parameters, by name

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        assert not self.rows or self.keeps, "weights may only change between responses"
        own = dict(self.model.named_parameters())        # of a tied head only the embedding
        missing = own.keys() - tensors.keys()
        assert not missing, f"weights that were not published: {missing}"
        self.sums = {name: copy_and_sum(own[name].detach(), x) for name, x in tensors.items()
                     if name in own}
        self.drawn.version = version

    def checksums(self, layout: Mapping[str, torch.Size], version: int) -> list[Shown]:
        """Of the parameters, summed up right after each piece of them was written."""
        return [Shown(name, int(total)) for name, total in self.sums.items() if name in layout]

    def logp(self, tokens: list[int]) -> Tensor:
        return sequence_logp(self.model, tokens).detach().cpu()

    def add(self, key: int, tokens: list[int], budget: int, *, uid: int, position: int) -> None:
        self.new.append(Response(key, tokens, budget, uid, position))

    @torch.no_grad()
    def step(self) -> list[int]:
        room = self.max_running - len(self.rows)
        if self.new and room > 0:
            rows = self.new[:room]
            self.new = self.new[room:]
            logits = self.prefill([r.tokens for r in rows])
            self.rows = self.rows + rows
        elif self.rows:
            rows = self.rows
            logits = self.decode([r.last for r in rows])
        else:
            return []
        chosen = draw_rows(logits, [r.uid for r in rows], [r.position + r.length for r in rows],
                           self.drawing)
        self.drawn.write([r.key for r in rows], [r.length for r in rows], chosen)
        for row, token in zip(rows, chosen.ids[:, 0].tolist()):
            row.last = token
            row.length += 1
        return [r.key for r in rows if r.length == r.budget or r.last in self.ends]

    def take(self, keys: list[int]) -> dict[int, Drawn]:
        found = {r.key: self.drawn.take(r.key, r.length)
                 for r in self.rows + self.new if r.key in keys}
        self.new = [r for r in self.new if r.key not in keys]
        stay = [i for i, r in enumerate(self.rows) if r.key not in keys]
        if len(stay) < len(self.rows):
            self.keep_rows(stay)
        return found

    def not_begun(self) -> list[int]:
        return [r.key for r in self.rows + self.new if r.length == 0]

    # -- the cache

    def keep_rows(self, stay: list[int]) -> None:
        """Remove all other rows from the cache, and the columns that now only pad."""
        self.rows = [self.rows[i] for i in stay]
        self.mask = self.mask[stay]
        lead = 0
        if stay:
            lead = int((~self.mask.any(0)).int().cumprod(0).sum())
        self.mask = self.mask[:, lead:]
        for layer in self.cache.layers:
            layer.keys = layer.keys[stay][:, :, lead:]
            layer.values = layer.values[stay][:, :, lead:]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Read new rows into the cache; logits [len(prompts), V] of what follows each."""
        from transformers import DynamicCache
        L = max(map(len, prompts))
        device = self.model.device
        tokens = torch.tensor([[0] * (L - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[False] * (L - len(p)) + [True] * len(p) for p in prompts],
                            device=device)
        cache = DynamicCache(config=self.model.config)
        logits = self.forward(tokens, mask, cache)
        if self.rows:
            self.join(cache, mask)
        else:
            self.cache = cache
            self.mask = mask
        return logits

    def join(self, cache, mask: Tensor) -> None:
        """Append rows to the cache, both padded on the left to the same length."""
        L = max(mask.shape[1], self.mask.shape[1])
        self.mask = torch.cat([pad(m, (L - m.shape[1], 0)) for m in (self.mask, mask)])

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([pad(x, (0, 0, L - x.shape[2], 0)) for x in (a, b)])

        for ours, new in zip(self.cache.layers, cache.layers):
            ours.keys = joined(ours.keys, new.keys)
            ours.values = joined(ours.values, new.values)

    def decode(self, last: list[int]) -> Tensor:
        """One more token for every row; logits [R, V] of what follows it."""
        self.mask = pad(self.mask, (0, 1), value=True)
        tokens = torch.tensor(last, device=self.model.device)[:, None]
        return self.forward(tokens, self.mask, self.cache)

    def forward(self, tokens: Tensor, mask: Tensor, cache) -> Tensor:
        position = mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -tokens.shape[1]:]
        out = self.model.base_model(input_ids=tokens, attention_mask=mask, position_ids=position,
                                    past_key_values=cache, use_cache=True)
        # The model's own head would round its logits to bf16
        return float32_logits(self.model.get_output_embeddings(), out.last_hidden_state[:, -1])

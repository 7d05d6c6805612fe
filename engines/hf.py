"""
The engine in plain transformers: continuous batching over one key-value cache.

Exact, and available everywhere: the reference for what an engine does. Rows of the cache
(kv_cache.py) join and leave between two steps.
What is left out: sliding windows (refused), paged memory. Shapes: R rows.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config, most_running
from engines.base import Engine
from engines.drawn import Drawn, DrawnTable
from engines.kv_cache import KVCache
from engines.sampling import draw_rows, training_drawing
from engines.to_device import to_device
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

    @property
    def column(self) -> int:
        """Of the token emitted last, in the cache."""
        return len(self.tokens) + self.length - 1


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
        self.rows: list[Response] = []           # in the order of the cache's rows
        self.new: list[Response] = []            # not in the cache yet
        self.drawn = DrawnTable(model.device)
        self.cache = KVCache(most_running(cfg), cfg.max_prompt + cfg.max_response)
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
            logits = self.read([r.tokens for r in rows])
            self.rows = self.rows + rows
        elif self.rows:
            rows = self.rows
            logits = self.extend(rows)
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
        gone = [i for i, r in enumerate(self.rows) if r.key in keys]
        self.rows = [self.rows[i] for i in self.cache.remove(gone)]
        return found

    def not_begun(self) -> list[int]:
        return [r.key for r in self.rows + self.new if r.length == 0]

    # -- the model

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Read new rows into the cache; logits [len(prompts), V] of what follows each."""
        device = self.model.device
        T = max(map(len, prompts))
        self.cache.read(len(prompts), T)
        tokens = to_device([p + [0] * (T - len(p)) for p in prompts], device)
        hidden = self.forward(tokens, torch.arange(T, device=device)[None], mask=None)
        rows, ends = to_device([list(range(len(prompts))), [len(p) - 1 for p in prompts]], device)
        return self.logits(hidden[rows, ends])

    def extend(self, rows: list[Response]) -> Tensor:
        """One more token for every row; logits [R, V] of what follows it."""
        device = self.model.device
        self.cache.extend([r.column for r in rows])
        tokens = to_device([r.last for r in rows], device)
        _, columns = self.cache.places(device)
        hidden = self.forward(tokens[:, None], columns[:, None], self.cache.mask(device))
        return self.logits(hidden[:, 0])

    def forward(self, tokens: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states [R, T, hidden]. Without a mask a token sees all to its left."""
        out = self.model.base_model(input_ids=tokens, attention_mask=mask, position_ids=position,
                                    past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """In float32: the model's own head would round them to bf16."""
        return float32_logits(self.model.get_output_embeddings(), hidden)

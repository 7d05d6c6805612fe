"""
engines.hf
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from engines.base import Engine
from engines.sampling import DRAW, Sampler, draw_rows, draws
from models.head import sequence_logp
from models.loading import load_model, stop_ids

if TYPE_CHECKING:
    from config import Config


class HFEngine(Engine):
    """Continuous batching in plain transformers: one key-value cache, left-padded; rows join and leave between steps.

    Slower than vLLM, exact, and everywhere at hand: the cross-check. Full attention only (no sliding windows).
    """

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.drive(cfg, load_model(cfg.student, device, dtype))

    def drive(self, cfg: Config, model) -> None:
        self.model = model
        if getattr(self.model.config, "sliding_window", None):
            raise RuntimeError(f"--engine hf: {cfg.student} has a sliding window, which this engine's cache ignores")
        self.how, self.max_running = draws(cfg), cfg.max_running
        self.ends = set(stop_ids(cfg.student, cfg.teacher))
        self.rows: list[Row] = []          # in the order of the cache's batch dimension
        self.new: list[Row] = []           # not yet in the cache
        self.cache, self.mask = None, None                  # mask [R, L], bool

    def load(self, tensors: dict[str, Tensor]) -> None:
        missing = self.model.load_state_dict(tensors, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, f"weights not published: {missing}"     # tied: it is the embedding
        assert not self.rows, "weights may only change between responses"

    def logp(self, tokens: list[int]) -> Tensor:
        return sequence_logp(self.model, tokens).detach().cpu()

    def add(self, key: int, tokens: list[int], budget: int, *, uid: int, position: int) -> None:
        self.new.append(Row(key, tokens, budget, Sampler(self.how["seed"], uid, position, self.how["stream"])))

    @torch.no_grad()
    def step(self) -> list[int]:
        """One token for every response; the keys that finished."""
        room = self.max_running - len(self.rows)
        if self.new and room > 0:
            rows, self.new = self.new[:room], self.new[room:]
            logits = self.prefill([r.tokens for r in rows])
        elif self.rows:
            rows = self.rows
            logits = self.decode([r.drawn[-1][0][0] for r in rows])
        else:
            return []
        ids, logmu = draw_rows(logits, [r.sampler for r in rows], *(self.how[x] for x in DRAW))
        for row, a, b in zip(rows, ids.cpu(), logmu.cpu()):
            row.drawn.append((a, b))
        self.rows = self.rows if rows is self.rows else self.rows + rows
        return [r.key for r in rows if len(r.drawn) == r.budget or int(r.drawn[-1][0][0]) in self.ends]

    def take(self, keys: list[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Remove responses; per key the tokens [L], recorded ids [L, n + k] and their log-probs."""
        out = {}
        for row in self.rows + self.new:
            if row.key in keys:
                empty = torch.empty(0, self.how["n"] + self.how["k"])
                ids = torch.stack([a for a, _ in row.drawn]) if row.drawn else empty.long()
                out[row.key] = ids[:, 0], ids, torch.stack([b for _, b in row.drawn]) if row.drawn else empty
        self.new = [r for r in self.new if r.key not in keys]
        keep = [i for i, r in enumerate(self.rows) if r.key not in keys]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[i] for i in keep]
            self.mask = self.mask[keep]
            lead = int((~self.mask.any(0)).int().cumprod(0).sum()) if keep else 0      # columns that pad every row
            self.mask = self.mask[:, lead:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[keep][:, :, lead:], layer.values[keep][:, :, lead:]
        return out

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        from transformers import DynamicCache
        L = max(map(len, prompts))
        tokens = torch.tensor([[0] * (L - len(p)) + list(p) for p in prompts], device=self.model.device)
        mask = torch.tensor([[False] * (L - len(p)) + [True] * len(p) for p in prompts], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        logits = self.forward(tokens, mask, cache)
        if self.rows:
            L = max(L, self.mask.shape[1])
            self.mask = torch.cat([pad(m, (L - m.shape[1], 0)) for m in (self.mask, mask)])
            for layer, new in zip(self.cache.layers, cache.layers):
                layer.keys, layer.values = (torch.cat([pad(x, (0, 0, L - x.shape[2], 0)) for x in pair]) for pair in
                                            ((layer.keys, new.keys), (layer.values, new.values)))
        else:
            self.cache, self.mask = cache, mask
        return logits

    def decode(self, last: list[int]) -> Tensor:
        self.mask = pad(self.mask, (0, 1), value=True)
        return self.forward(torch.tensor(last, device=self.model.device)[:, None], self.mask, self.cache)

    def forward(self, tokens: Tensor, mask: Tensor, cache) -> Tensor:
        position = mask.long().cumsum(-1).sub(1).clamp(min=0)[:, -tokens.shape[1]:]
        return self.model(input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache,
                          use_cache=True, logits_to_keep=1).logits[:, -1]


class Row:
    """A response in the making."""

    def __init__(self, key: int, tokens: list[int], budget: int, sampler: Sampler):
        self.key, self.tokens, self.budget, self.sampler = key, tokens, budget, sampler
        self.drawn: list[tuple[Tensor, Tensor]] = []        # per new token: ids [n + k], the first one emitted; logmu

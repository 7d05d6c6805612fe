"""
The rollout worker, and its engine in plain transformers; engine_vllm.py holds the same few methods in vLLM.

The worker takes tickets, generates, and hands slots over. It loads newly published weights between two engine steps,
without waiting for what is running: running responses are flushed to their slots, the weights are replaced, and the
responses go on from their tokens so far, whose context is computed anew. Every token carries the version that drew it.

Sampling is ours in both engines (`draw_rows`): N tokens per position, i.i.d. from the softmax that is really sampled,
the first one emitted. vLLM runs it through its public logits-processor interface. What is left out: beam search, tool
calls, penalties, speculative decoding; distillation wants samples of the plain distribution.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from cache import Incurable, Slots, Weights
from estimators import ESTIMATORS, draw, shaped
from teacher import load_model, sequence_logp, stop_ids

if TYPE_CHECKING:
    from asyncopd import Config
    from workers import Link


# -- the draw --------------------------------------------------------------------------------------

TRAINING, EVALUATION, VALIDATION = 0, 2, 3       # streams of random numbers; 1 is the teacher's


class Sampler:
    """One response's random numbers, by (seed, prompt, position it starts from): the same on every machine."""

    def __init__(self, seed: int, uid: int, position: int, stream: int = TRAINING):
        self.random = np.random.default_rng([seed, uid, position, stream]).random


def draw_rows(logits: Tensor, samplers: list[Sampler], n: int, k: int, temperature: float, top_p: float):
    """Ids [R, n + k] and their log-probs: n i.i.d. draws, the first one to emit; then the k best words.

    Temperature 0 is for evaluations: the best word, certain.
    """
    if temperature == 0:
        return (best := logits.argmax(-1, keepdim=True)), torch.zeros(best.shape, device=best.device)
    u = torch.from_numpy(np.stack([s.random(n) for s in samplers])).to(logits.device)
    ids, logmu = draw(logits, u, temperature, top_p)
    if k:
        x = shaped(logits, temperature, top_p)
        best = x.topk(k)
        log_norm = x.gather(1, ids[:, :1]) - logmu[:, :1]
        ids, logmu = torch.cat([ids, best.indices], 1), torch.cat([logmu, best.values - log_norm], 1)
    return ids, logmu


DRAW = ("n", "k", "temperature", "top_p")      # arguments of draw_rows


def draws(cfg: Config) -> dict:
    """How an engine draws a position: n times, then its k best words, from which distribution, with which numbers."""
    estimator = ESTIMATORS[cfg.estimator]
    return dict(n=estimator.drawn(cfg.mc_samples), k=estimator.top(cfg.top_k), temperature=cfg.temperature,
                top_p=cfg.top_p, seed=cfg.seed, stream=TRAINING)


# -- the worker ------------------------------------------------------------------------------------

def rollout_worker(cfg: Config, link: Link, slots: Slots, weights: Weights, eval_prompts: list[list[int]],
                   device: str, dtype: torch.dtype) -> None:
    worker = Worker(cfg, link, slots, weights, ENGINES[cfg.engine](cfg, device, dtype), eval_prompts)
    link.send("ready")
    while not worker.stopped:
        for order, body in link.orders(wait=worker.idle):
            getattr(worker, order)(body)       # take, cut, drop, evaluate, stop: each appends to or ends something
        if not worker.stopped:
            worker.turn()


class Worker:
    """What a rollout worker does between two engine steps, and the promises that it keeps there:

    no ticket is begun under weights older than the newest there are; a token's version is that of the weights that
    drew it; what is overdue is handed over at once, and only if it really is.
    """

    def __init__(self, cfg: Config, link: Link, slots: Slots, weights: Weights, engine, eval_prompts=()):
        self.link, self.slots, self.weights, self.engine = link, slots, weights, engine
        self.eval_prompts, self.asked = eval_prompts, False        # asked: for answers to them
        self.eval_k, self.eval_temperature = cfg.eval_k, cfg.eval_temperature
        self.max_response, self.tolerance = cfg.max_response, cfg.gap_max
        self.in_flight = cfg.schedule == "async" and cfg.inflight == "recompute"    # load beside running responses
        self.version, self.tokens, self.stopped = -1, 0, False
        self.waiting: deque[tuple[int | None, int]] = deque()      # (version to draw under, None: the newest; slot)
        self.running: set[int] = set()                             # slots

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting or self.asked)

    def turn(self) -> None:
        """New weights if there are any, new tickets, one engine step, finished responses out."""
        if self.in_flight or not self.running:
            if self.asked:
                self.answer()
            if self.in_flight:
                self.load(None)
        while self.waiting and not (self.running and self.behind(self.due(self.waiting[0][0]))):
            version, s = self.waiting.popleft()
            self.load(self.due(version))
            self.start(s)
        with self.link.span("generate"):
            finished = self.engine.step()
        if finished:
            self.flush(finished)
            self.link.send("generated", slots=finished, finished=True, tokens=self.tokens)

    def due(self, version: int | None) -> int | None:
        """Exactly that version while it is still there; after a restart it may not be, and the newest has to do."""
        return None if version is not None and self.weights.clock[0] >= version + 2 else version

    def behind(self, version: int | None) -> bool:
        return self.version != (self.weights.version if version is None else version)

    # -- orders

    def take(self, body: list[tuple[int | None, int]]) -> None:
        self.waiting += body

    def evaluate(self, body: None) -> None:
        self.asked = True

    def cut(self, body: tuple[int, list[int]]) -> None:
        """Hand over what these responses have so far."""
        self.link.send("generated", slots=self.overdue(*body), finished=False, tokens=self.tokens)

    def drop(self, body: tuple[int, list[int]]) -> None:
        """Throw these responses away."""
        self.link.send("dropped", slots=self.overdue(*body), tokens=self.tokens)

    def overdue(self, floor: int, slots: list[int]) -> list[int]:
        """Those of `slots` whose first token is of version `floor` or older, flushed.

        The parent cannot know better than `born`: a response may have had no token when the weights were replaced,
        and have begun under the new ones since. One that has none even now begins anew, under the newest.
        """
        held = [s for s in slots if s in self.running and self.slots.born[s] <= floor]
        self.flush(held)
        self.waiting += [(None, s) for s in held if self.slots.length[s] == 0]
        for _, s in self.waiting:
            self.slots.born[s] = self.weights.version              # at least: it is taken under the newest
        return [s for s in held if self.slots.length[s] > 0]

    def stop(self, body: None) -> None:
        """The last order: what was asked is answered, what runs is handed in."""
        self.flush(sorted(self.running))
        if self.asked:
            self.answer()
        self.link.send("stopped", tokens=self.tokens)
        self.stopped = True

    # -- what they are made of

    def load(self, version: int | None) -> None:
        """Replace the engine's weights by the newest (or exactly `version`) and let it prove that they arrived."""
        if not self.behind(version):
            return
        with self.paused(), self.link.span("push"):
            start = time.monotonic()
            self.version, tensors, probe_logp = self.weights.read(version)
            self.engine.load(tensors)
            gap = (self.engine.logp(self.weights.probe) - probe_logp).abs()
        if not gap.max() <= self.tolerance:                        # `not <=` so that nan counts as wrong
            raise Incurable(f"weights of version {self.version} did not arrive in the engine: its log-probs are up "
                               f"to {gap.max():.3g} from the learner's on the probe (tolerance {self.tolerance:g})")
        self.link.send("pushed", version=self.version, seconds=time.monotonic() - start,
                       gap=[gap.mean().item(), gap.quantile(0.95).item(), gap.max().item()])

    def answer(self) -> None:
        """Answers under the newest weights. Training responses wait meanwhile: a long evaluation is paid in lag."""
        self.load(None)
        with self.paused(), self.link.span("evaluate"):
            answers = self.engine.complete(self.eval_prompts, self.max_response, self.eval_k, self.eval_temperature,
                                           self.link.beat)
        self.asked = False
        self.link.send("evaluated", version=self.version, answers=answers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in the engine: what runs is flushed to its slots, and goes on from there afterwards."""
        going_on = sorted(self.running)
        self.flush(going_on)
        yield
        for s in going_on:
            self.start(s)

    def start(self, s: int) -> None:
        """Let the engine go on with slot s, from whatever tokens it holds."""
        start, length, prompt = int(self.slots.start[s]), int(self.slots.length[s]), int(self.slots.prompt[s])
        if length == 0:
            self.slots.born[s] = self.version
        so_far = start + length - prompt
        self.engine.add(s, self.slots.tokens[s, :start + length].tolist(), self.max_response - so_far,
                        uid=int(self.slots.uid[s]), position=so_far)
        self.running.add(s)

    def flush(self, keys: list[int]) -> None:
        """Take responses out of the engine and write what they have into their slots."""
        for s, (tokens, ids, logmu) in self.engine.take(keys).items():
            self.slots.append(s, tokens, ids, logmu, self.version)
            self.running.discard(s)
            self.tokens += len(tokens)


# -- the engine in transformers --------------------------------------------------------------------

class Engine:
    """What both engines have in common: `how` a position is drawn (see `draws`), and evaluation in the same way."""

    how: dict

    def complete(self, prompts: list[list[int]], max_new: int, k: int = 1, temperature: float = 0.0,
                 each_step: Callable[[], None] = lambda: None, *, stream: int = EVALUATION) -> list[list[int]]:
        """k answers to each prompt, all of the first prompt's first; temperature 0 is greedy. Nothing else may run.

        Their random numbers are a stream of their own, so that training draws what it would have drawn without them.
        """
        training, answers = self.how, {}
        self.how = training | dict(n=1, k=0, temperature=temperature, top_p=1.0, stream=stream)
        for i in range(len(prompts) * k):
            self.add(i, prompts[i // k], max_new, uid=i // k, position=i % k)
        while len(answers) < len(prompts) * k:
            answers |= self.take(self.step())
            each_step()
        self.how = training
        return [answers[i][0].tolist() for i in range(len(answers))]


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


def vllm_engine(cfg: Config, device: str, dtype: torch.dtype):
    import engine_vllm  # and with it vLLM: only where it is asked for
    return engine_vllm.VLLMEngine(cfg, device, dtype)


ENGINES = {"hf": HFEngine, "vllm": vllm_engine}          # --engine

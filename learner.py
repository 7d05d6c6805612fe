"""
The learner: one training step, what it measures, publishing, saving.

A step reads its slots in place, recomputes log p at the cached tokens under the current student, and back-propagates
the estimator's loss: the sum over all valid positions of the optimizer batch divided by their number, whatever the
micro-batching. The logits are head.py's, a chunk at a time, and only at response positions. Where the estimator sees
the whole vocabulary, the slot holds the teacher's last hidden state and the teacher's head is here.

Master weights, optimizer state, log-softmax and every log-prob are float32; on a GPU the matrix products run in
bf16. A bf16 master copy would lose 96% of a step of size 3e-6: most updates round to nothing.
With several learners each works on its share of a batch and on its shards of the model (shards.py).
What is left out: sequence parallelism. Tests: tests/test_learner.py
"""
from __future__ import annotations

import math
import os
import shutil
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cache import Segment, Slots
from estimators import DENSE, ESTIMATORS, VALUE, importance_weight
from extensions import oprd
from extensions.effopd import Jumps
from extensions.rock import Rocks
from models.alignment import kept_rows, one_segment, pad, response_rows
from models.footprint import chunk_size, free_gb
from models.head import head_backward, head_logp, teacher_logq
from models.loading import load_model, stop_ids
from models.lora import Merged, merged_state, save_adapter, with_lora
from models.sharding import Ranks, concatenated, recompute
from record.checkpoint import UNWRITABLE, read_training, replace, trained, write_training
from transport.weights import Weights

if TYPE_CHECKING:
    from config import Config
    from transport.link import Link


def learner_worker(cfg: Config, link: Link, slots: Slots, weights: Weights, resume: str, version: int, rank: int,
                   device: str, dtype: torch.dtype) -> None:
    """`resume`: the checkpoint to go on from, of that version; "" begins with the student as it is, version 0."""
    ranks = Ranks(rank, cfg.learners, f"{cfg.out}/.learners")
    learner = Learner(cfg, device, dtype, resume, ranks)
    learner.publish(weights, version)
    learner.rocks and rank == 0 and learner.rocks.publish(slots)
    link.send("ready")
    idle_since = time.monotonic()
    while True:
        for order, body in link.orders(wait=True):
            if order == "stop":
                link.send("stopped")
                return ranks.leave()
            if order in ("checkpoint", "export"):
                try:
                    learner.checkpoint(Path(body)) if order == "checkpoint" else learner.save(Path(body))
                    why = ""
                except UNWRITABLE as e:
                    why = str(e)
                if rank == 0:
                    link.send("saved", folder=body, version=version, why=why)
                idle_since = time.monotonic()
            if order == "validate":
                learner.jumps.prompts = body
            if order == "weigh":
                ess = learner.jumps.weigh([slots.read(s) for s in body], link)
                if rank == 0:
                    link.send("weighed", ess=ess)
                idle_since = time.monotonic()
            if order == "train":
                start = time.monotonic()
                with link.span("step"):
                    metrics = learner.step([slots.read(s) for s in body], version, link)
                if metrics is None:                      # interrupted: what is saved now is the version before
                    continue
                version += 1
                with link.span("publish"):
                    publish_s = learner.publish(weights, version)
                    learner.rocks and rank == 0 and learner.rocks.publish(slots)
                seconds = time.monotonic() - start
                link.send("trained" if rank == 0 else "trained along", metrics=metrics | {
                    "step": version, "version": version, "publish_s": publish_s, "push_bytes": weights.flat[0].nbytes,
                    "wait_s": start - idle_since, "train_tok_s": metrics["tokens"] / seconds})
                idle_since = time.monotonic()


# -- one step --------------------------------------------------------------------------------------

class Learner:
    def __init__(self, cfg: Config, device: str, dtype: torch.dtype, resume: str = "", ranks: Ranks | None = None):
        self.cfg, self.device, self.dtype, self.ranks = cfg, torch.device(device), dtype, ranks or Ranks()
        self.estimator = ESTIMATORS[cfg.estimator]
        self.loss = self.estimator.bind(cfg)
        self.known: dict[int, dict[str, Tensor]] = {}        # slot -> what `prepass` found for its tokens
        self.teacher_head = None
        if self.estimator.support == "full":                 # the rest of the teacher is let go
            self.teacher_head = load_model(cfg.teacher, "cpu", dtype).get_output_embeddings().to(device)
        base = cfg.student if cfg.lora_rank else resume or cfg.student     # a checkpoint has the adapters merged
        self.model = load_model(base, "cpu", torch.float32)                # in eval mode: dropout would part it from mu
        if cfg.lora_rank:
            with_lora(self.model, cfg.lora_rank, cfg.seed)
        self.head = self.model.get_output_embeddings()
        self.side = oprd.Side(cfg, "student", device) if cfg.oprd_weight else None
        if self.side and not resume and oprd.gives_head(cfg):              # and so does version 0
            theirs = self.teacher_head or load_model(cfg.teacher, "cpu", dtype).get_output_embeddings()
            self.head.load_state_dict(theirs.state_dict())
        self.chunk = chunk_size(cfg, self.head.weight.shape[0], free_gb().get("cpu", math.inf) if device == "cpu" else
                                torch.cuda.mem_get_info(device)[0] / 1e9)
        if cfg.gradient_checkpointing:
            recompute(self.model)
        self.ranks.shard(self.model, self.device, dtype)
        self.optimizer = torch.optim.AdamW([p for _, p in trained(self.model)], lr=cfg.lr,
                                           weight_decay=cfg.weight_decay, fused=self.device.type == "cuda" or None)
        self.updates, extra = (read_training(Path(resume), self.model, self.optimizer, self.ranks.part) if resume else
                               (0, {}))
        self.rocks = Rocks(cfg, self.head.weight.shape[0], extra) if cfg.rock else None
        self.jumps = Jumps(self, extra) if cfg.effopd else None

    def step(self, segments: list[Segment], version: int, link: Link | None = None) -> dict[str, float] | None:
        """Train on every token of the segments once; the metrics of the step. The segments are not changed.

        An update whose loss or gradient is not finite is not made. Told over the link to hurry before the first update,
        the step is abandoned: None, and the weights are those of `version` still.
        """
        m, n, measured, skipped = min(self.cfg.minibatches, len(segments)), len(segments), [], []
        norm, lr = torch.tensor(torch.nan), self.cfg.lr * rate(self.updates, self.cfg)
        self.known = self.prepass(segments, link)
        for i in range(m):
            minibatch = segments[i * n // m:(i + 1) * n // m]
            count, compared = max(1, sum(map(len, minibatch))), max(1, sum(len(s.states) for s in minibatch))
            if fault := unusable(minibatch):
                skipped.append(fault)
                of_all = count if self.ranks.rank == 0 else 0
                measured.append({name: torch.full((of_all,), torch.nan) for name in MEASURED})
                continue
            for group in self.ranks.groups(minibatch, self.cfg.micro_tokens):
                if link and i == 0 and self.ranks.any(link.hurried):
                    self.optimizer.zero_grad()
                    return None
                measured.append(self.backward(group, count, compared))
                if link:
                    link.beat()
            norm = self.ranks.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip))
            lr = self.cfg.lr * rate(self.updates, self.cfg)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if norm.isfinite():
                self.optimizer.step()
            else:
                skipped.append({"slots": [s.slot for s in minibatch], "why": f"the gradient's norm is {norm.item()}"})
            self.updates += 1
            self.optimizer.zero_grad()
        lags = torch.cat([version - s.version for s in segments]).float()
        if self.cfg.schedule == "async" and self.cfg.overdue != "keep" and lags.max() > self.cfg.max_lag:
            raise RuntimeError(f"a token of lag {int(lags.max())} was trained, --max-lag {self.cfg.max_lag} broken")
        events = self.jumps.after(segments, version + 1, link) if self.jumps else []
        return self.of_all(segments, self.ranks.all(concatenated(measured)), version, events) | {
            "lag_min": int(lags.min()), "lag_mean": lags.mean().item(), "lag_max": int(lags.max()),
            "sequences": len(segments), "context": sum(s.start - s.prompt for s in segments),
            "grad_norm": norm.item(), "lr": lr, "skipped": skipped}

    def of_all(self, segments: list[Segment], measured: list[dict[str, Tensor]], version: int,
               events: list[dict]) -> dict:
        """The step's numbers, per position of the batch where a bypassed one counts as well; what becomes of rocks."""
        found, tokens = summarize(measured), sum(map(len, segments))
        stored, rock = sum(len(s.ids) for s in segments) / tokens, 0.0
        if self.rocks:
            rock, choice = self.rocks.share(segments), self.rocks.see(segments, measured, version)
            choice and self.ranks.rank == 0 and self.rocks.write()
            events = events + choice
        return found | {"loss": found["loss"] * stored, "tokens": tokens, "stored": stored, "rock": rock,
                        "events": events}

    @torch.no_grad()
    def prepass(self, segments: list[Segment], link: Link | None = None) -> dict[int, dict[str, Tensor]]:
        """By slot, per token: what the estimator wants to know about the whole train batch before its first update."""
        if self.estimator.batch is None:
            return {}
        mine, logp = self.ranks.groups(segments, self.cfg.micro_tokens), []
        for group in mine:
            logp.append(head_logp(self.head, self.rows(group), self.cached(group, "ids").long(), chunk=self.chunk,
                                  dtype=self.dtype).cpu())
            link and link.beat()
        self.ranks.settle(self.model)
        by_slot = {s.slot: s for s in segments}
        order, logp = zip(*self.ranks.all(([s.slot for group in mine for s in group if len(s)], torch.cat(logp))))
        segments = [by_slot[slot] for part in order for slot in part]
        columns = [self.estimator.scored(x.to(self.device)) for x in
                   (torch.cat(logp), self.cached(segments, "logq"), self.cached(segments, "logmu"))]
        found = {name: x.expand(len(columns[0]), -1).split([len(s.ids) for s in segments])
                 for name, x in self.estimator.batch(*columns).items()}
        return {s.slot: {name: parts[i] for name, parts in found.items()} for i, s in enumerate(segments)}

    def backward(self, group: list[Segment], count: int, compared: int = 1) -> dict[str, Tensor]:
        """Add the gradient of (loss of these segments) / count, and with OPRD of its weight * (distances) / compared;
        per-token measurements [M], of distances [m]."""
        rows, states = self.hidden(group)
        slot = {name: self.cached(group, name) for name in ("ids", "logmu", "logq", "hidden")}
        known = {name: torch.cat([self.known[s.slot][name][:len(s.ids)] for s in group])
                 for name in (self.known[group[0].slot] if self.known else ())}

        def loss(at: slice, logp: Tensor, every: Tensor | None) -> dict[str, Tensor]:
            return self.measure(logp, every, {name: x[at] for name, x in slot.items()},
                                {name: x[at] for name, x in known.items()})
        of_all, ids, how = 1 / self.ranks.size, slot["ids"].long(), dict(chunk=self.chunk, dtype=self.dtype)
        if self.estimator.head:                               # FSDP averages over the learners: count is its part
            gradient, measured = head_backward(self.head, rows.detach(), ids, loss, count=count * of_all,
                                               whole=self.teacher_head is not None, **how)
            roots = [(rows, gradient)]
        else:                                                 # not even a gradient of 0, by which AdamW would decay
            measured, roots = self.measure(head_logp(self.head, rows, ids, **how), None, slot, known), []
        measured["oprd"] = torch.zeros(len(rows))
        if self.side:
            distance = self.side.distance(states, self.cached(group, "states"))
            measured["oprd"] = distance.detach()
            roots.append((self.cfg.oprd_weight * distance.sum() / (compared * of_all), None))
        torch.autograd.backward(*zip(*roots))
        return measured

    def measure(self, logp: Tensor, every: Tensor | None, slot: dict[str, Tensor],
                known: dict[str, Tensor]) -> dict[str, Tensor]:
        """The estimator's loss [m] and what is logged, from logp [m, C] or, where it sees all words, every [m, V]."""
        ids, logq, logmu = slot["ids"], slot["logq"], slot["logmu"]
        n = self.estimator.drawn(ids.shape[1])                      # so many columns came from mu
        drawn = logp.detach()[:, :n], logq[:, :n], logmu[:, :n]
        if every is None:
            loss = self.loss(*(self.estimator.scored(x) for x in (logp, logq, logmu)), **known)
            kl = VALUE[self.cfg.kl](*drawn)
        else:
            with torch.no_grad():
                every_q = teacher_logq(self.teacher_head, slot["hidden"], every.shape[1])
            loss = self.loss(every, every_q, every_q, **known)
            kl = DENSE[self.cfg.kl](every.detach(), every_q, every_q)
        if self.rocks:
            loss = loss * self.rocks.weight(ids[:, 0])
        w = importance_weight(drawn[0], drawn[2])
        distinct = ids[:, :n].sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
        return {"loss": loss, "kl": kl, "w": w[:, 0], "entropy": -(w * drawn[0]).mean(-1),
                "duplicates": 1 - distinct / n, "y": ids[:, 0]}

    def rows(self, group: list[Segment]) -> Tensor:
        """The student's hidden states [M, H] that predict the new tokens whose scores are cached."""
        with self.compute():
            return kept_rows(response_rows(self.model.last_hidden(pad(group, self.device)[0])[0], group), group)

    def hidden(self, group: list[Segment]) -> tuple[Tensor, list[Tensor]]:
        """The same, and of every layer that OPRD compares those [m, H] at the positions where it does."""
        with self.compute():
            last, states = self.model.last_hidden(pad(group, self.device)[0], self.side.layers if self.side else ())
        return (kept_rows(response_rows(last, group), group),
                [self.side.pick(response_rows(x, group), group) for x in states])

    def cached(self, group: list[Segment], name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in group]).to(self.device)

    def compute(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # -- publishing and saving ---------------------------------------------------------------------

    @torch.no_grad()
    def publish(self, weights: Weights, version: int) -> float:
        """Seconds. Rollout and teacher go on meanwhile; the learner does not: it would gain 1% (benchmarks/step.py)."""
        start = time.monotonic()
        probe, parameters = one_segment(weights.probe), Merged(self.model)
        logp = head_logp(self.head, self.rows([probe]), probe.tokens[1:, None].to(self.device), chunk=self.chunk,
                         dtype=self.dtype)
        self.ranks.settle(self.model)
        if self.ranks.rank == 0:
            weights.publish(parameters, version, logp.squeeze(-1).cpu(), self.ranks.whole)
        else:
            self.ranks.collect(parameters.items())
        return time.monotonic() - start

    def save(self, folder: Path) -> None:
        """A Hugging Face folder, written beside its place and renamed, so that it is whole or absent."""
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        self.write(partial)
        if self.cfg.lora_rank:
            save_adapter(self.model, self.cfg.student, partial / "adapter")
        if self.ranks.rank == 0:
            replace(partial, folder)

    def checkpoint(self, folder: Path) -> None:
        """The learner's part of a checkpoint."""
        fault = None
        try:
            self.write(folder)
        except UNWRITABLE as e:                          # the other ranks do not know, and gather what comes next
            fault = e
        extra = chain(*(part.state() for part in (self.rocks, self.jumps) if part))
        write_training(folder, self.model, self.optimizer, self.updates, extra=extra, collect=self.ranks.collect,
                       masters=self.dtype != torch.float32 or self.cfg.lora_rank > 0, rank=self.ranks.rank)
        if fault:
            raise fault

    def write(self, folder: Path) -> None:
        from transformers import AutoTokenizer
        state = self.ranks.collect(merged_state(self.model))
        if self.ranks.rank == 0:
            self.model.generation_config.eos_token_id = stop_ids(self.cfg.student, self.cfg.teacher)     # as trained
            self.model.save_pretrained(folder, state_dict={name: x.to(self.dtype) for name, x in state.items()})
            AutoTokenizer.from_pretrained(self.cfg.student).save_pretrained(folder)


def rate(update: int, cfg: Config) -> float:
    """Share of --lr at an optimizer update: a linear rise over --warmup, then constant or half a cosine down to 0."""
    if update < cfg.warmup:
        return (update + 1) / cfg.warmup
    if cfg.lr_schedule == "constant":
        return 1.0
    total = cfg.steps * cfg.minibatches
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (update - cfg.warmup) / max(1, total - cfg.warmup)))


MEASURED = ("loss", "kl", "w", "entropy", "duplicates", "y", "oprd")      # per cached token, by `backward`
NAN = {"logmu": "the engine sampled from nan", "logq": "the teacher has not scored it, or scored nan",
       "hidden": "the teacher's last state is nan", "states": "one of the teacher's states is nan"}


def unusable(segments: list[Segment]) -> dict | None:
    """The slots whose cached numbers no update can be made of, and why; None if there are none."""
    for name, why in NAN.items():
        values = [(s.slot, getattr(s, name)) for s in segments]
        if bad := [slot for slot, x in values if (x.isnan() | (x == torch.inf)).any()]:
            return {"slots": bad, "why": f"{name}: {why}"}
    return None


def summarize(measured: list[dict[str, Tensor]]) -> dict[str, float]:
    """Per-token measurements of all micro-batches -> the step's numbers (METRICS)."""
    x = {name: torch.cat([m[name] for m in measured]).float() for name in measured[0] if name != "y"}
    x = {name: v if len(v) else v.new_tensor([torch.nan]) for name, v in x.items()}      # every position was bypassed
    w = x.pop("w")
    return {name: v.mean().item() for name, v in x.items()} | {
        "tokens": len(w), "w_max": w.max().item(), "w_p99": w.kthvalue(math.ceil(0.99 * len(w))).values.item(),
        "ess": (w.sum() ** 2 / (w ** 2).sum() / len(w)).item()}

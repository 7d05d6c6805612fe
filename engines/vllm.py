"""
The engine in vLLM, through its extension points: `LLMEngine.step`, a logits processor, a worker extension.

Imported only by who asks for `--engine vllm`: importing it imports vLLM. The same methods as hf.HFEngine, which is
the reference for what they do. What is left out: tensor parallelism, prefix caching, vLLM's own transfer of weights.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

import os
from typing import TYPE_CHECKING

# One process, the worker's own; the runner that custom logits processors work in; no calls home
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_NO_USAGE_STATS="1",
                  VLLM_DO_NOT_TRACK="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality  # noqa: E402

from engines.base import Engine  # noqa: E402
from engines.sampling import DRAW, Sampler, draw_rows, draws  # noqa: E402
from models.loading import stop_ids  # noqa: E402

if TYPE_CHECKING:
    from config import Config


class VLLMEngine(Engine):
    """vLLM inside this very process: no child processes, so a kill leaves no orphan; nothing is patched.

    Tokens are drawn by `Draws`, a logits processor: it draws N ids per row with our own `draw_rows`, keeps them, and
    raises the one to emit above all others. Prefix caching is off: it would answer with keys and values of
    weights that are gone, and one response per prompt has nothing to share.
    """

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.ends, self.how = stop_ids(cfg.student, cfg.teacher), draws(cfg)
        length = cfg.max_prompt + cfg.max_response + 1
        self.llm = LLM(cfg.student, dtype=str(dtype).removeprefix("torch."), max_model_len=length, seed=cfg.seed,
                       max_num_seqs=cfg.max_running, max_num_batched_tokens=max(length, cfg.micro_tokens),
                       gpu_memory_utilization=cfg.gpu_share, enforce_eager=device == "cpu",
                       enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True,
                       distributed_executor_backend="uni", logits_processors=["engines.vllm:Draws"],
                       worker_extension_cls="engines.vllm.Extension")
        self.engine = self.llm.llm_engine
        self.request: dict[int, str] = {}        # key -> vLLM's name for it
        self.emitted: dict[int, list[int]] = {}
        self.serial = 0

    def load(self, tensors: dict[str, Tensor]) -> None:
        assert not self.request, "weights may only change between responses"
        self.llm.collective_rpc("load_published", args=(list(tensors.items()),))

    def logp(self, tokens: list[int]) -> Tensor:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        out = self.llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0].prompt_logprobs
        return torch.tensor([one[t].logprob for one, t in zip(out, tokens) if one is not None])

    def add(self, key: int, tokens: list[int], budget: int, *, uid: int, position: int) -> None:
        self.serial += 1
        name = f"{key}-{self.serial}"
        sampling = dict(self.how, key=name, uid=uid, position=position)
        params = SamplingParams(max_tokens=budget, temperature=0, stop_token_ids=self.ends, detokenize=False,
                             output_kind=RequestOutputKind.DELTA, extra_args={"asyncopd": sampling})
        self.request[key], self.emitted[key] = name, []
        self.engine.add_request(name, {"prompt_token_ids": tokens}, params)

    def step(self) -> list[int]:
        if not self.request:
            return []
        finished = []
        for out in self.engine.step():
            key = int(out.request_id.split("-")[0])
            self.emitted[key] += out.outputs[0].token_ids
            if out.finished:
                finished.append(key)
        return finished

    def take(self, keys: list[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        if not keys:
            return {}
        names = [self.request.pop(k) for k in keys]
        self.engine.abort_request(names)
        drawn = self.llm.collective_rpc("take_draws", args=(names,))[0]
        out = {}
        for key, (ids, logmu) in zip(keys, drawn):
            tokens = torch.tensor(self.emitted.pop(key), dtype=torch.long)
            ids, logmu = ids[:len(tokens)], logmu[:len(tokens)]
            assert torch.equal(ids[:, 0], tokens), f"emitted {tokens.tolist()}, drawn {ids[:, 0].tolist()}"
            out[key] = tokens, ids, logmu
        return out


# -- inside vLLM -----------------------------------------------------------------------------------

DRAWN: dict[str, list[tuple[Tensor, Tensor]]] = {}      # request -> per token (ids [n + k], logmu), on the device


class Extension:
    """Methods that vLLM gives to its worker (`worker_extension_cls`), called through `collective_rpc`."""

    def load_published(self, items: list[tuple[str, Tensor]]) -> None:
        """Reload by layer: on a CPU linear weights are packed, so that a plain load_weights has nowhere to write."""
        model = self.model_runner.model
        initialize_layerwise_reload(model)
        model.load_weights(iter(items))
        finalize_layerwise_reload(model, self.model_runner.model_config)
        if model.config.tie_word_embeddings:     # its packed copy is not refreshed: wrong by half a nat, and silent
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    def take_draws(self, names: list[str]) -> list[tuple[Tensor, Tensor]]:
        none = torch.empty(0, 1)
        taken = [DRAWN.pop(name, []) for name in names]
        return [(torch.stack([a for a, _ in rows]).cpu(), torch.stack([b for _, b in rows]).cpu()) if rows
                else (none.long(), none) for rows in taken]


class Draws(LogitsProcessor):
    """Draws each row's N candidates and raises the first above all others: the word that the engine emits."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.rows: dict[int, tuple[dict, Sampler, list[int]]] = {}     # batch index -> settings, numbers, output

    def is_argmax_invariant(self) -> bool:
        return False                     # so it runs for greedy requests: ours are, and emit the word raised

    def update_state(self, update) -> None:
        if update is None:
            return
        for i in update.removed:
            self.rows.pop(i, None)
        for i, params, _, output in update.added:
            self.rows.pop(i, None)
            if how := (params.extra_args or {}).get("asyncopd"):
                self.rows[i] = how, Sampler(how["seed"], how["uid"], how["position"], how["stream"]), output
        for a, b, direction in update.moved:
            row_a, row_b = self.rows.pop(a, None), self.rows.pop(b, None)
            if row_a is not None:
                self.rows[b] = row_a
            if row_b is not None and direction == MoveDirectionality.SWAP:
                self.rows[a] = row_b

    def apply(self, logits: Tensor) -> Tensor:
        if not self.rows:
            return logits
        at, rows = zip(*sorted(self.rows.items()))
        how, index = rows[0][0], torch.tensor(at, device=logits.device)
        ours = logits if len(at) == len(logits) else logits[index]
        ids, logmu = draw_rows(ours, [r[1] for r in rows], *(how[x] for x in DRAW))
        for (settings, _, output), a, b in zip(rows, ids, logmu):
            drawn = DRAWN.setdefault(settings["key"], [])
            del drawn[len(output):]      # a step that the engine threw away and repeats
            drawn.append((a, b))
        logits[index, ids[:, 0]] = torch.inf             # the engine is greedy; no second pass over the vocabulary
        return logits

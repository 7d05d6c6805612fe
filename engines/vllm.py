"""
The engine in vLLM, through its public extension points: `LLMEngine.step`, a logits processor, a
worker extension. Nothing is patched.

Importing this file imports vLLM, so engines/table.py imports it only for `--engine vllm`. It has
the methods of engines.base.Engine; engines/hf.py is the reference for what they do.
What is left out: tensor parallelism, prefix caching, vLLM's own transfer of weights.
Tests: tests/test_rollout.py
"""
from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import engines.vllm_environment  # noqa: F401

os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"     # in the other one logits processors do not work

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import LLM, RequestOutput, SamplingParams  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402
from vllm.model_executor.model_loader.reload import (  # noqa: E402
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality  # noqa: E402

from config import Config  # noqa: E402
from engines.base import Engine  # noqa: E402
from engines.drawn import Drawn, DrawnTable  # noqa: E402
from engines.sampling import Drawing, draw_rows, training_drawing  # noqa: E402
from engines.to_device import to_device  # noqa: E402
from models.footprint import gpu_share  # noqa: E402
from models.loading import stop_ids  # noqa: E402
from transport.checksum import Shown, checksum, some_columns  # noqa: E402


def plain_arguments(cfg: Config, device: str, dtype: torch.dtype) -> dict[str, object]:
    """The arguments for vLLM, except our own extensions of it.

    There is one place more than responses run, and there are priorities: the request of `logp` has
    a place at once, and the first memory that comes free.
    """
    length = cfg.max_prompt + cfg.max_response
    return dict(model=cfg.student, dtype=str(dtype).removeprefix("torch."), seed=cfg.seed,
                max_model_len=length, max_num_seqs=cfg.max_running + 1,
                scheduling_policy="priority",
                max_num_batched_tokens=max(length, cfg.micro_tokens, cfg.max_running + 1),
                gpu_memory_utilization=gpu_share(cfg, "rollout"), enforce_eager=device == "cpu",
                hf_overrides={"head_dtype": "float32"},      # logits are not rounded
                enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True,
                distributed_executor_backend="uni")


@dataclass(frozen=True)
class Request:
    """What `Draws` has to know of a response; it travels in `SamplingParams.extra_args`."""
    name: str                                # vLLM's name for it
    drawing: Drawing
    uid: int
    position: int                            # of its first new token, in the response

    def __deepcopy__(self, memo: dict) -> Request:
        """vLLM copies every request's parameters; this part of them never changes."""
        return self


class VLLMEngine(Engine):
    """vLLM inside the worker's own process: it has no children, so that a kill leaves no orphan.

    `Draws`, a logits processor, draws the tokens: N ids per row with the `draw_rows` that every
    engine uses. It keeps them and raises the one to emit above all others. Prefix caching is off:
    it would answer with keys and values of weights that are gone, and with one response per prompt
    there is nothing to share. The head's products are not rounded to the dtype of the weights: a
    logit of 20 would be off by up to 0.06.

    On a GPU vLLM returns the tokens of a step after it has begun the next one (asynchronous
    scheduling; on a CPU there is none). So weights may be replaced while a step is under way.
    `Draws` has then marked the tokens of this step with the older version, which is right: the
    GPU does its work in order, and computes the step before it copies the new weights.

    With `--inflight keep`, a response that vLLM puts aside for want of memory is read again under
    the weights of that time. Its further tokens are drawn, and recorded, from what these compute.
    """

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.ends = stop_ids(cfg.student, cfg.teacher)
        self.drawing = training_drawing(cfg)
        if device == "cpu":      # or the first `logp` compiles the ranks of its log-probs, in seconds
            torch.compiler.set_stance("force_eager")
        self.llm = LLM(**plain_arguments(cfg, device, dtype), logits_processors=["engines.vllm:Draws"],
                       worker_extension_cls="engines.vllm.Extension")
        self.engine = self.llm.llm_engine
        self.keeps = cfg.inflight == "keep"  # responses may be here while weights change
        self.max_running = cfg.max_running
        # Not in vLLM yet, which would give them the place that is left for `logp`
        self.waiting: deque[tuple[str, list[int], SamplingParams]] = deque()
        self.finished: list[int] = []        # keys that `step` has not returned yet
        self.answer: RequestOutput | None = None                 # to the request of `logp`
        self.names: dict[int, str] = {}      # key -> vLLM's name for the response
        self.keys: dict[str, int] = {}       # and back
        self.emitted: dict[int, list[int]] = {}
        self.serial = 0                      # a key may come again: names do not

    def load(self, tensors: Mapping[str, Tensor], version: int) -> None:
        assert not self.names or self.keeps, "weights may only change between responses"
        self.llm.collective_rpc("load_published", args=(tensors, version))

    def checksums(self, layout: Mapping[str, torch.Size], version: int) -> list[Shown]:
        return self.llm.collective_rpc("checksums", args=(dict(layout), version))[0]

    def logp(self, tokens: list[int]) -> Tensor:
        """By a request of its own. `LLM.generate` would make steps too, and throw away what the
        running responses draw in them."""
        self.serial += 1
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False,
                                output_kind=RequestOutputKind.FINAL_ONLY)
        self.engine.add_request(f"probe-{self.serial}", {"prompt_token_ids": tokens}, params,
                                priority=-1)     # responses have 0; the lowest comes first
        self.answer = None
        while self.answer is None:
            self.advance()
        out = self.answer.prompt_logprobs
        return torch.tensor([at[t].logprob for at, t in zip(out, tokens) if at is not None])

    def add(self, key: int, tokens: list[int], budget: int, *, uid: int, position: int) -> None:
        self.serial += 1
        name = f"{key}-{self.serial}"
        request = Request(name, self.drawing, uid, position)
        # `ignore_eos`: the ends are those of both models, the same in every engine, and not also
        # what vLLM finds in the student's folder
        params = SamplingParams(max_tokens=budget, temperature=0, stop_token_ids=self.ends,
                                ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
                                extra_args={"asyncopd": request})
        self.names[key] = name
        self.keys[name] = key
        self.emitted[key] = []
        self.waiting.append((name, tokens, params))

    def step(self) -> list[int]:
        while self.waiting and len(self.names) - len(self.waiting) < self.max_running:
            name, tokens, params = self.waiting.popleft()
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
        if self.names:
            self.advance()
        finished = self.finished
        self.finished = []
        return finished

    def advance(self) -> None:
        """One step of vLLM, for the responses and for the request of `logp`."""
        for out in self.engine.step():
            if out.request_id not in self.keys:
                self.answer = out
                continue
            key = self.keys[out.request_id]
            self.emitted[key] += out.outputs[0].token_ids
            if out.finished:
                self.finished.append(key)

    def take(self, keys: list[int]) -> dict[int, Drawn]:
        if not keys:
            return {}
        self.finished = [key for key in self.finished if key not in keys]
        names = [self.names.pop(key) for key in keys]
        gone = set(names)
        self.waiting = deque(request for request in self.waiting if request[0] not in gone)
        self.engine.abort_request(names)
        emitted = [self.emitted.pop(key) for key in keys]
        lengths = [len(tokens) for tokens in emitted]
        taken = self.llm.collective_rpc("take_draws", args=(names, lengths))[0]
        found = {}
        for key, name, tokens, (drawn, preempted) in zip(keys, names, emitted, taken):
            self.preempted += preempted
            del self.keys[name]
            assert drawn.tokens.tolist() == tokens, (
                f"emitted {tokens}, drawn {drawn.tokens.tolist()}")
            found[key] = drawn
        return found

    def not_begun(self) -> list[int]:
        """Those that `Draws` has not seen, not even in a step that is still under way."""
        names = self.llm.collective_rpc("not_begun", args=(list(self.keys),))[0]
        return [self.keys[name] for name in names]


# -- inside vLLM ---------------------------------------------------------------------------------

# By the name of a request; `Draws` puts it on its device
DRAWN = DrawnTable("cpu")
# By the name of a request, how often vLLM has put it aside for want of memory and added it again
PREEMPTED: Counter[str] = Counter()


class Extension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), for `collective_rpc`."""

    def load_published(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Reload layer by layer.

        On a CPU linear weights are packed, so that a plain load_weights has nowhere to write. The
        packed copy of a tied head is not refreshed by the reload: without the last line its
        log-probs would be wrong by half a nat, without any error.
        """
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):          # kernels are chosen by it
            initialize_layerwise_reload(model)
            model.load_weights(iter(tensors.items()))
            finalize_layerwise_reload(model, self.model_runner.model_config)
        if model.config.tie_word_embeddings:
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        DRAWN.version = version

    def checksums(self, layout: dict[str, torch.Size], version: int) -> list[Shown]:
        """Of what the model computes with; see engines.base.Engine.checksums."""
        return list(shown(self.model_runner.get_model(), layout, version))

    def not_begun(self, names: list[str]) -> list[str]:
        """Those of these requests for which nothing has been drawn."""
        return [name for name in names if name not in DRAWN.row]

    def take_draws(self, names: list[str], lengths: list[int]) -> list[tuple[Drawn, int]]:
        """What was drawn for each request, and how often it was put aside; forgotten here."""
        return [(DRAWN.take(name, length), PREEMPTED.pop(name, 0))
                for name, length in zip(names, lengths)]


def shown(model, layout: Mapping[str, torch.Size], version: int) -> Iterator[Shown]:
    """What a vLLM model computes with. It holds q, k and v in one tensor, one below the other, and
    gate and up in another; a head or an embedding may have more rows than were published; a tied
    head is the embedding. Of what is packed, some columns."""
    fused = getattr(model, "packed_modules_mapping", {})
    names: dict[int, list[str]] = {}             # by id of a parameter, what was published for it
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        for kind, p in module.named_parameters(recurse=False):
            parts = [f"{above}.{part}.{kind}".lstrip(".") for part in fused.get(last, [last])]
            known = [name for name in parts if name in layout] or names.get(id(p), [])
            names[id(p)] = known
            x = p
            whole = not (known and is_packed(module, kind))
            if not whole:
                x = unpacked_columns(module, p, version)
            first = 0
            for name in known:
                end = first + layout[name][0]
                shape = layout[name] if whole else (layout[name][0], x.shape[1])
                if x[first:end].shape == shape:
                    yield Shown(name, checksum(x[first:end]), whole)
                first = end


def is_packed(module, kind: str) -> bool:
    """Whether the module computes with a packed copy of this parameter: a linear layer on a CPU
    does, and holds no other. An embedding has one too, but looks its rows up in the parameter."""
    looked_up = hasattr(module, "num_embeddings") and not isinstance(module, ParallelLMHead)
    return hasattr(module, "cpu_linear") and kind == "weight" and not looked_up


@torch.no_grad()
def unpacked_columns(module, parameter: Tensor, version: int) -> Tensor:
    """[outputs, COLUMNS]: some columns of a packed matrix, `some_columns` of its inputs.

    They are its product with rows of the identity, exactly: each sum has one term that is not 0.
    -0 becomes 0.
    """
    width = getattr(module, "input_size", None) or parameter.shape[-1]
    columns = some_columns(width, version)
    one = torch.nn.functional.one_hot(columns, width).to(parameter.dtype)
    return module.cpu_linear(one, parameter, None).T + 0


@dataclass
class Row:
    """A row of vLLM's batch that we draw for."""
    request: Request
    output: list[int]                        # the tokens emitted so far; vLLM's own list

    @property
    def next_position(self) -> int:
        """Where in the response the next token will stand, whatever happened to the row."""
        return self.request.position + len(self.output)


class Draws(LogitsProcessor):
    """Draws the N candidates of each row and raises the first of them above all other words, so
    that vLLM emits it."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.rows: dict[int, Row] = {}       # by their index in the batch
        DRAWN.device = device

    def is_argmax_invariant(self) -> bool:
        """False, so that vLLM runs it for greedy requests: ours are, and emit the raised word."""
        return False

    def update_state(self, update) -> None:
        """Follow what vLLM has removed from its batch, added to it, and moved in it."""
        if update is None:
            return
        for i in update.removed:
            self.rows.pop(i, None)
        for i, params, _, output in update.added:
            self.rows.pop(i, None)
            request = (params.extra_args or {}).get("asyncopd")
            if request is not None:
                self.rows[i] = Row(request, output)
                PREEMPTED[request.name] += len(output) > 0       # it had been in a batch before
        for a, b, direction in update.moved:
            row_a = self.rows.pop(a, None)
            row_b = self.rows.pop(b, None)
            if row_a is not None:
                self.rows[b] = row_a
            if row_b is not None and direction == MoveDirectionality.SWAP:
                self.rows[a] = row_b

    def apply(self, logits: Tensor) -> Tensor:
        """logits [batch, V], changed in place."""
        if not self.rows:
            return logits
        at = sorted(self.rows)
        rows = [self.rows[i] for i in at]
        index = to_device(at, logits.device)
        ours = logits if len(at) == len(logits) else logits[index]
        chosen = draw_rows(ours, [row.request.uid for row in rows],
                           [row.next_position for row in rows], rows[0].request.drawing)
        # A step that vLLM threw away and repeats is written again, to the same place
        DRAWN.write([row.request.name for row in rows], [len(row.output) for row in rows], chosen)
        logits[index, chosen.ids[:, 0]] = torch.inf     # no second pass over the vocabulary
        return logits

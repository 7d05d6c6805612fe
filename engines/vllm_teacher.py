"""
The teacher in vLLM: log-probs of the words of a prompt, which is the student's whole sequence.

Imported only by who asks for `--teacher-engine vllm`: importing it imports vLLM. The same methods as teacher.HFTeacher,
the reference for what they do; nothing is patched. A GPU is asked for the cached words alone: what it is asked is
tested, its answer has not been seen yet. On a CPU vLLM knows only the best words of a position: where other ones are
cached it must be asked for all V, as Python numbers (5 tokens a second at Qwen3's 151,936, 270 at 4,096).

What is left out: hidden states and draws of the teacher's own (teacher.VLLM_LACKS), several GPUs.
Tests: tests/test_teacher.py
"""
from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

# One process, the worker's own; on a GPU the runner that scores chosen words; on a CPU a core the rollouts leave free
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER=str(int(torch.cuda.is_available())),
                  VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(max(os.sched_getaffinity(0))))

import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from cache import Segment, Slots  # noqa: E402
from estimators import ESTIMATORS  # noqa: E402
from models.alignment import kept_rows  # noqa: E402
from models.loading import vocab_size  # noqa: E402

if TYPE_CHECKING:
    from config import Config


class VLLMTeacher:
    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.support, self.on_gpu = ESTIMATORS[cfg.estimator].support, device != "cpu"
        self.vocab, self.rows = vocab_size(cfg.student), vocab_size(cfg.teacher)       # of the heads
        length = cfg.max_prompt + cfg.max_response + 1                                 # one is always generated
        self.llm = LLM(cfg.teacher, dtype=str(dtype).removeprefix("torch."), max_model_len=length, max_logprobs=-1,
                       max_num_batched_tokens=max(length, cfg.micro_tokens), gpu_memory_utilization=cfg.gpu_share,
                       enforce_eager=True, enable_prefix_caching=False, skip_tokenizer_init=True,
                       disable_log_stats=True, distributed_executor_backend="uni")

    def score(self, segments: list[Segment], slots: Slots) -> None:
        """Write the teacher's log-probs, float32, into logq, and its best words into ids if the support is theirs."""
        outs = self.llm.generate([{"prompt_token_ids": s.tokens.tolist()} for s in segments],
                                 [self.question(s) for s in segments], use_tqdm=False)
        for s, out in zip(segments, outs):
            ids, logq = self.answer(s, out)
            slots.ids[s.slot, :len(ids)], slots.logq[s.slot, :len(ids)] = ids.int(), logq

    def question(self, s: Segment) -> SamplingParams:
        """What to ask of a segment's sequence. A prompt's log-probs at index t are those of its token t, given what
        is before it; the rows of `prompt_logprob_token_ids` begin at the token after `prompt_logprob_start`."""
        common = dict(max_tokens=1, temperature=0, detokenize=False)
        if self.support == "teacher_topk":       # rows that only the teacher's head has may be among its best
            best = s.ids.shape[1] - 1 + max(0, self.rows - self.vocab)
            return SamplingParams(prompt_logprobs=best, flat_logprobs=True, **common)
        if self.on_gpu:
            ids = s.ids.masked_fill(s.ids >= self.rows, -1)                           # -1 scores -inf
            if s.kept is not None:                                                    # vLLM wants a row per token
                ids = torch.full((len(s), ids.shape[1]), -1, dtype=ids.dtype).masked_scatter_(s.kept[:, None], ids)
            return SamplingParams(prompt_logprob_token_ids=ids.numpy(), prompt_logprob_start=s.start - 1, **common)
        return SamplingParams(prompt_logprobs=0 if self.support == "sampled" else -1, flat_logprobs=True, **common)

    def answer(self, s: Segment, out) -> tuple[Tensor, Tensor]:
        """Ids [m, C] of the cached rows and their log-probs from what vLLM returned for `question`."""
        if self.on_gpu and self.support != "teacher_topk":
            return s.ids, kept_rows(torch.from_numpy(out.prompt_token_id_logprobs), [s])
        flat = out.prompt_logprobs               # per token of the prompt but the first: itself, then the best words
        a = flat.start_indices[s.start]
        words, logq = (kept_rows(torch.from_numpy(np.array(x[a:], dtype=kind).reshape(len(s), -1)), [s]) for x, kind in
                       ((flat.token_ids, np.int64), (flat.logprobs, np.float32)))
        if self.support == "teacher_topk":
            known = (words < self.vocab).sort(dim=1, descending=True, stable=True).indices[:, :s.ids.shape[1]]
            return words.gather(1, known), logq.gather(1, known)
        every = torch.full((len(words), max(self.rows, self.vocab)), -torch.inf).scatter_(1, words, logq)
        return s.ids, every.gather(1, s.ids.long())

    def complete(self, prompts: list[list[int]], max_new: int, stop: list[int], each_step=None) -> list[list[int]]:
        """Greedy answers, ended by `stop` and by nothing else."""
        params = SamplingParams(max_tokens=max_new, temperature=0, stop_token_ids=stop, ignore_eos=True,
                                detokenize=False)
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outs]

"""
The teacher in vLLM: log-probs of the words of a prompt, which is the student's whole sequence.

Importing this file imports vLLM, so that it is imported only for `--teacher-engine vllm`. It has
the methods of teacher.HFTeacher, the reference for what they do; nothing is patched. On a GPU vLLM
is asked for the cached words alone: the question is tested, the answer has not been seen yet. On a
CPU vLLM knows only the best words of a position: where other words are cached it must be asked for
all V, as Python numbers (5 tokens a second at Qwen3's 151,936 words, 270 at 4,096).

What is left out: hidden states and draws of the teacher (teacher.VLLM_LACKS); several GPUs.
Shapes: n new tokens of a segment, m of them with cached scores; C columns of a slot.
Tests: tests/test_teacher.py
"""
from __future__ import annotations

import os

import torch

import engines.vllm_environment  # noqa: F401

# On a GPU the model runner that scores chosen words; on a CPU a core that the rollouts leave free,
# unless transport/process.py has chosen: in a synchronous run it has all of them
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(torch.cuda.is_available()))
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(max(os.sched_getaffinity(0))))

import numpy as np  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from cache import Segment, Slots  # noqa: E402
from config import Config  # noqa: E402
from estimators import ESTIMATORS  # noqa: E402
from models.alignment import kept_rows  # noqa: E402
from models.footprint import gpu_share  # noqa: E402
from models.loading import vocab_size  # noqa: E402


class VLLMTeacher:
    """Serves the estimators that need only the teacher's scores or its best words."""

    def __init__(self, cfg: Config, device: str, dtype: torch.dtype):
        self.support = ESTIMATORS[cfg.estimator].support
        self.on_gpu = device != "cpu"
        self.vocab = vocab_size(cfg.student)         # rows of the student's head
        self.rows = vocab_size(cfg.teacher)          # and of the teacher's
        length = cfg.max_prompt + cfg.max_response + 1       # vLLM always generates one token
        if not self.on_gpu:      # or the first answer compiles the ranks of its log-probs, in seconds
            torch.compiler.set_stance("force_eager")
        self.llm = LLM(cfg.teacher, dtype=str(dtype).removeprefix("torch."), max_model_len=length,
                       max_logprobs=-1, max_num_batched_tokens=max(length, cfg.micro_tokens),
                       gpu_memory_utilization=gpu_share(cfg, "teacher"), enforce_eager=True,
                       enable_prefix_caching=False, skip_tokenizer_init=True,
                       disable_log_stats=True, distributed_executor_backend="uni")

    def score(self, segments: list[Segment], slots: Slots) -> None:
        """Write the teacher's log-probs, float32, into logq; its best words into ids if the
        support is theirs."""
        prompts = [{"prompt_token_ids": s.tokens.tolist()} for s in segments]
        params = [self.question(s) for s in segments]
        outs = self.llm.generate(prompts, params, use_tqdm=False)
        for s, out in zip(segments, outs):
            ids, logq = self.read_answer(s, out)
            slots.ids[s.slot, :len(ids)] = ids.int()
            slots.logq[s.slot, :len(ids)] = logq

    def question(self, s: Segment) -> SamplingParams:
        """What to ask of a segment's sequence.

        The log-probs of a prompt at index t are those of its token t, given what is before it. The
        rows of `prompt_logprob_token_ids` begin at the token after `prompt_logprob_start`.
        """
        common = dict(max_tokens=1, temperature=0, detokenize=False)
        if self.support == "teacher_topk":
            # rows that only the teacher's head has may be among its best
            best = s.ids.shape[1] - 1 + max(0, self.rows - self.vocab)
            return SamplingParams(prompt_logprobs=best, flat_logprobs=True, **common)
        if self.on_gpu:
            return SamplingParams(prompt_logprob_token_ids=self.words_of(s).numpy(),
                                  prompt_logprob_start=s.start - 1, **common)
        every = 0 if self.support == "sampled" else -1
        return SamplingParams(prompt_logprobs=every, flat_logprobs=True, **common)

    def words_of(self, s: Segment) -> Tensor:
        """The words [n, C] whose log-probs are wanted; -1 scores -inf, and vLLM wants a row for
        every token."""
        ids = s.ids.masked_fill(s.ids >= self.rows, -1)
        if s.kept is None:
            return ids
        every = torch.full((len(s), ids.shape[1]), -1, dtype=ids.dtype)
        return every.masked_scatter_(s.kept[:, None], ids)

    def read_answer(self, s: Segment, out) -> tuple[Tensor, Tensor]:
        """Ids [m, C] of the cached rows and their log-probs, from the answer to `question`."""
        if self.on_gpu and self.support != "teacher_topk":
            return s.ids, kept_rows(torch.from_numpy(out.prompt_token_id_logprobs), [s])
        # by token of the prompt but the first: the token itself, then the best words
        flat = out.prompt_logprobs
        words = self.from_flat(s, flat, flat.token_ids, np.int64)
        logq = self.from_flat(s, flat, flat.logprobs, np.float32)
        if self.support == "teacher_topk":
            known = (words < self.vocab).sort(dim=1, descending=True, stable=True).indices
            known = known[:, :s.ids.shape[1]]
            return words.gather(1, known), logq.gather(1, known)
        every = torch.full((len(words), max(self.rows, self.vocab)), -torch.inf)
        every.scatter_(1, words, logq)
        return s.ids, every.gather(1, s.ids.long())

    def from_flat(self, s: Segment, flat, values, dtype: type) -> Tensor:
        """The part of a flat list that belongs to the new tokens, [m, words at each]."""
        first = flat.start_indices[s.start]
        rows = np.array(values[first:], dtype=dtype).reshape(len(s), -1)
        return kept_rows(torch.from_numpy(rows), [s])

    def complete(self, prompts: list[list[int]], max_new: int, stop: list[int],
                 each_step=None) -> list[list[int]]:
        """Greedy answers, ended by `stop` and by nothing else."""
        params = SamplingParams(max_tokens=max_new, temperature=0, stop_token_ids=stop,
                                ignore_eos=True, detokenize=False)
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params,
                                 use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outs]

"""
The teacher-score cache: slots in shared memory that every process can read and write.

    free -> rollout worker -> teacher worker -> learner -> free

One such round is called a ticket. During a ticket the slot holds one segment: a whole response, or
a part of a response that was cut so that the learner could train on it early. It holds the tokens,
the candidate words of every position, and the log-probs of these words under the student that drew
them and under the teacher.

The parent process allocates all slots once, in plain shared CPU memory, with and without a GPU.
The pipes between processes carry slot numbers, never tensors. A slot belongs to one process at a
time, the one that holds its number.

What is left out: who gets which slot (control/scheduler.py); several machines.
Shapes: S slots; T response positions; C words per position, of which column 0 is the emitted token
and `Estimator.support` says which the others are; n new tokens in a segment, of which m have
stored scores (all of them, unless an extension leaves some out). Tests: tests/test_cache.py
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one slot holds: n new tokens of a response, after `start` tokens of context: the prompt
    and, after a cut, the response so far.

    The tensors are views of shared memory, not copies.

    tokens  [start + n]   token ids, the new ones last; the first `prompt` of them are the prompt
    version [n]           version of the weights that drew each new token; they may have read a
                          context of older ones (docs/staleness.md, `--inflight keep`)
    ids     [m, C]        the candidate words, of which the first is the emitted token
    logpi   [m, C]        log of the expected number of their copies (draws.py)
    logq    [m, C]        their log-probs under the teacher
    logmu   [m]           log-prob of the emitted token under mu, what it was really drawn from
    hidden  [m, H]        the teacher's last hidden state, the one that predicts the token; H = 0
                          if the estimator does not need it
    kept    [n] bool      which new tokens have a row in these and in hidden: m of them.
                          None: all, m = n
    extra                 by name, an extension's own slot tensors, their used rows (extension.py)
    """
    slot: int
    tokens: Tensor
    prompt: int
    start: int
    version: Tensor
    ids: Tensor
    logpi: Tensor
    logmu: Tensor
    logq: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    kept: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of new tokens, n."""
        return len(self.version)

    @property
    def new_tokens(self) -> Tensor:
        """[n]: the tokens that this segment is trained on."""
        return self.tokens[self.start:]


class Slots:
    """All slots, one row each.

    tokens [S, max_prompt + T]      ids, logpi, logq [S, T, C]      logmu, version [S, T]
    hidden [S, T, H]                kept [S, T] where only some positions are stored
    Of the ticket that is in the slot, [S] each:
    uid     which prompt it answers, counted over all epochs
    prompt  length of that prompt                  start   number of context tokens
    length  number of new tokens so far
    born    version of the first new token; before there is one, of the weights its worker has
    extra   by name, [S, *shape]: an extension's tensors; used[name] [S] counts their used rows

    The rows of ids, logpi, logmu, logq and hidden are compact: row j belongs to the j-th token
    whose scores are stored. logq is nan from when a token is written until the teacher has scored it.
    """

    def __init__(self, slots: int, max_prompt: int, max_response: int, columns: int, *,
                 hidden: int = 0, dtype: torch.dtype = torch.float32,
                 extra: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
                 sparse: bool = False):
        """`hidden`: width H in `dtype`. `sparse`: some positions may have no stored scores."""
        S = slots
        T = max_response
        C = columns
        self.sparse = sparse
        self.tokens = shared_zeros(S, max_prompt + T, dtype=torch.int32)
        self.ids = shared_zeros(S, T, C, dtype=torch.int32)
        self.logpi = shared_zeros(S, T, C)
        self.logmu = shared_zeros(S, T)
        self.logq = shared_zeros(S, T, C).fill_(torch.nan)
        self.hidden = shared_zeros(S, T, hidden, dtype=dtype)
        self.version = shared_zeros(S, T, dtype=torch.int32)
        self.kept = shared_zeros(S, T if sparse else 0, dtype=torch.bool)
        self.uid = shared_zeros(S, dtype=torch.int64)
        self.prompt = shared_zeros(S, dtype=torch.int64)
        self.start = shared_zeros(S, dtype=torch.int64)
        self.length = shared_zeros(S, dtype=torch.int64)
        self.born = shared_zeros(S, dtype=torch.int64)
        self.extra: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}
        for name, (shape, kind) in (extra or {}).items():
            self.extra[name] = shared_zeros(S, *shape, dtype=kind)
            self.used[name] = shared_zeros(S, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def bytes(self) -> int:
        """The size of all slots."""
        tensors = [x for x in vars(self).values() if isinstance(x, Tensor)]
        tensors += [*self.extra.values(), *self.used.values()]
        return sum(x.numel() * x.element_size() for x in tensors)

    def open(self, s: int, uid: int, context: list[int] | Tensor, prompt: int,
             version: int) -> None:
        """Begin a new ticket in slot s.

        `context`: the prompt, which has `prompt` tokens, and the response so far, after a cut.
        `version`: the newest published.
        """
        room = self.tokens.shape[1]
        assert len(context) < room, f"a context of {len(context)} leaves no room in slot {s}"
        self.tokens[s, :len(context)] = torch.as_tensor(context, dtype=torch.int32)
        self.uid[s] = uid
        self.prompt[s] = prompt
        self.start[s] = len(context)
        self.length[s] = 0
        self.born[s] = version

    def append(self, s: int, tokens: Tensor, ids: Tensor, logpi: Tensor, logmu: Tensor,
               versions: Tensor, kept: Tensor | None = None) -> None:
        """Add k new tokens [k], their drawn columns ids, logpi [k, D], their logmu [k], and the
        versions [k] of the weights that drew them.

        D <= C: the teacher fills in the other C - D columns. `kept` [k], bool: the tokens whose
        scores are stored, in sparse slots; None stores all.
        """
        k, D = ids.shape
        assert tokens.shape == logmu.shape == versions.shape == (k,) and logpi.shape == (k, D), (
            tokens.shape, logmu.shape, versions.shape, ids.shape, logpi.shape)
        assert D <= self.ids.shape[2], f"{D} columns drawn for {self.ids.shape[2]} in a slot"
        assert kept is None or self.sparse, "only sparse slots leave positions out"
        n = int(self.length[s])
        at = int(self.start[s]) + n
        first = self.stored(s)
        self.tokens[s, at:at + k] = tokens
        self.version[s, n:n + k] = versions
        if self.sparse:
            if kept is None:
                kept = torch.ones(k, dtype=torch.bool)
            self.kept[s, n:n + k] = kept
            ids = ids[kept]
            logpi = logpi[kept]
            logmu = logmu[kept]
        rows = slice(first, first + len(ids))
        self.ids[s, rows, :D] = ids
        self.logpi[s, rows, :D] = logpi
        self.logmu[s, rows] = logmu
        self.logq[s, rows] = torch.nan
        if n == 0 and k > 0:
            self.born[s] = versions[0]
        self.length[s] = n + k

    def stored(self, s: int) -> int:
        """The rows of ids, logpi, logmu, logq and hidden that are in use."""
        n = int(self.length[s])
        if self.sparse:
            return int(self.kept[s, :n].sum())
        return n

    def read(self, s: int) -> Segment:
        """The content of slot s, as views."""
        start = int(self.start[s])
        n = int(self.length[s])
        m = self.stored(s)
        return Segment(
            slot=s, tokens=self.tokens[s, :start + n], prompt=int(self.prompt[s]), start=start,
            version=self.version[s, :n], ids=self.ids[s, :m], logpi=self.logpi[s, :m],
            logmu=self.logmu[s, :m], logq=self.logq[s, :m], hidden=self.hidden[s, :m],
            kept=self.kept[s, :n] if self.sparse else None,
            extra={name: x[s, :int(self.used[name][s])] for name, x in self.extra.items()})


def shared_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros that all processes see."""
    return torch.zeros(*shape, dtype=dtype).share_memory_()

"""
What the processes share: the slots, the rule that says which tickets a batch takes, the published weights.

    free -> rollout -> teacher -> learner -> free          a slot's round; a ticket is one such round

The parent allocates everything here once. Slots and weights are plain shared CPU memory, the same with and without
a GPU; pipes carry slot numbers, never tensors. Only the parent decides who works on what (`Ledger`), so there is no
lock that a dying worker could take with it.

What is left out: several machines. Shapes: S slots, T response positions, C token ids per position (column 0 is
the emitted token; the estimator's table entry says what the others are). Tests: tests/test_cache.py, test_lag.py
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from extensions.rock import Bypass

# -- slots -----------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Segment:
    """What one slot holds: n new response tokens of one response, after `start` tokens, `prompt` of them the prompt.

    tokens  [start + n]  ids, new ones last       version  [n]  of the weights that drew each new token
    ids, logmu, logq  [n, C]  candidates per new token; views of shared memory, not copies
    hidden  [n, H]  the teacher's last state that predicts the token; H = 0 where the estimator does not need it
    states  [m, W]  the teacher's states of several layers, of those tokens that oprd.py compares
    kept  [n]  bool, where rocks are bypassed (rock.py): ids, logmu, logq and hidden have a row for each token that is
    kept, m <= n in all, and none for the others; None: all are kept
    """
    slot: int
    tokens: Tensor
    prompt: int
    start: int
    version: Tensor
    ids: Tensor
    logmu: Tensor
    logq: Tensor
    hidden: Tensor = torch.empty(0, 0)
    states: Tensor = torch.empty(0, 0)
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.version)


class Slots:
    """The slab. A slot belongs to one process at a time; its number is the permission to touch it.

    tokens [S, max_prompt + max_response]    ids, logmu, logq [S, T, C]    version [S, T]    hidden [S, T, H]
    states [S, P, W], bfloat16, of which the first `compared` [S] are of this ticket
    uid, prompt, start, length, born [S]: which prompt, its length; `length` new tokens after `start` others; `born` is
    the version of the first new one (while there is none, of its holder's weights). logq is nan until scored.
    kept [S, T] says which new tokens `bypass` let be stored: row j of the others is that of the j-th kept one.
    """

    def __init__(self, slots: int, max_prompt: int, max_response: int, columns: int, hidden: int = 0,
                 dtype: torch.dtype = torch.float32, *, states: tuple[int, int] = (0, 0), bypass: Bypass | None = None):
        S, T, C, self.bypass = slots, max_response, columns, bypass
        self.tokens = torch.zeros(S, max_prompt + T, dtype=torch.int32).share_memory_()
        self.ids = torch.zeros(S, T, C, dtype=torch.int32).share_memory_()
        self.logmu = torch.zeros(S, T, C).share_memory_()
        self.logq = torch.full((S, T, C), torch.nan).share_memory_()
        self.hidden = torch.zeros(S, T, hidden, dtype=dtype).share_memory_()
        self.states = torch.zeros(S, *states, dtype=torch.bfloat16).share_memory_()
        self.version = torch.zeros(S, T, dtype=torch.int32).share_memory_()
        self.kept = torch.zeros(S, T if bypass else 0, dtype=torch.bool).share_memory_()
        self.uid, self.prompt, self.start, self.length, self.born, self.compared = (
            torch.zeros(S, dtype=torch.int64).share_memory_() for _ in range(6))

    def __len__(self) -> int:
        return len(self.start)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    def open(self, s: int, uid: int, context: list[int] | Tensor, prompt: int, version: int) -> None:
        """A new ticket in slot s: `context` is the prompt of `prompt` tokens, and what was generated before a cut."""
        assert len(context) < self.tokens.shape[1], f"context of {len(context)} leaves no room in slot {s}"
        self.tokens[s, :len(context)] = torch.as_tensor(context, dtype=torch.int32)
        self.uid[s], self.prompt[s], self.start[s], self.length[s], self.born[s] = uid, prompt, len(context), 0, version

    def append(self, s: int, tokens: Tensor, ids: Tensor, logmu: Tensor, version: int) -> None:
        """k more tokens [k] with their drawn columns [k, D], D <= C: the teacher fills in the other C - D."""
        k, D = ids.shape
        assert tokens.shape == (k,) and logmu.shape == (k, D) and D <= self.ids.shape[2], (tokens.shape, ids.shape)
        n, at = int(self.length[s]), int(self.start[s] + self.length[s])
        self.tokens[s, at:at + k], self.version[s, n:n + k] = tokens, version
        m = self.stored(s)
        if self.bypass:
            self.kept[s, n:n + k] = kept = self.bypass.kept(tokens, int(self.uid[s]), at - int(self.prompt[s]))
            ids, logmu = ids[kept], logmu[kept]
        rows = slice(m, m + len(ids))
        self.ids[s, rows, :D], self.logmu[s, rows, :D], self.logq[s, rows] = ids, logmu, torch.nan
        if n == 0:
            self.born[s] = version
        self.length[s] = n + k

    def stored(self, s: int) -> int:
        """Rows of ids, logmu, logq and hidden that are in use: those of the new tokens that are kept."""
        n = int(self.length[s])
        return int(self.kept[s, :n].sum()) if self.bypass else n

    def read(self, s: int) -> Segment:
        start, n, m = int(self.start[s]), int(self.length[s]), self.stored(s)
        return Segment(s, self.tokens[s, :start + n], int(self.prompt[s]), start, self.version[s, :n],
                       self.ids[s, :m], self.logmu[s, :m], self.logq[s, :m], self.hidden[s, :m],
                       self.states[s, :int(self.compared[s])], self.kept[s, :n] if self.bypass else None)


# -- the ledger: which tickets a batch takes -------------------------------------------------------

# -- published weights -----------------------------------------------------------------------------


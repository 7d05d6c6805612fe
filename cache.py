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

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rock import Bypass


class Incurable(RuntimeError):
    """A failure that another process would meet again: no reason to start one."""


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

STAGES = ("rollout", "generated", "teacher", "scored", "learner")


@dataclass(slots=True)
class Ticket:
    """One round of a slot: a whole response, or after a cut one segment of it."""
    number: int                    # order of handing out
    slot: int
    uid: int                       # which prompt, counted over all epochs
    context: Tensor | None         # what a cut response had so far, prompt included; None: a new response
    stage: str = "rollout"         # one of STAGES
    holder: str = ""               # the worker that has it
    arrived: int = 0               # order of becoming scored
    asked: int = -1                # version at which its holder was told that it is overdue


class Ledger:
    """The pipeline's only decisions, without processes and without a clock, so that they can be tested by themselves.

    lag of a token = learner version when it is trained - version that drew it. `version` counts publishes, one per
    batch. There are (max_ahead + 1) * batch slots: that is the memory bound, the back-pressure and the run-ahead, and
    it sets the mean lag; it does not bound the lag of a long response. A response is overdue when its oldest token
    would pass max_lag unless the next batch has it. `overdue` says what then: cut, wait, drop, or keep it running.
    """

    def __init__(self, slots: Slots, batch: int, schedule: str, max_ahead: int, max_lag: int, overdue: str):
        self.slots, self.batch, self.lockstep = slots, batch, schedule != "async"
        self.ahead, self.max_lag, self.rule = max_ahead, max_lag, "keep" if self.lockstep else overdue
        self.version = self.began = self.handed_out = self.prompts = self.arrivals = 0
        self.barrier: Literal["", "cut", "weigh"] = ""             # after a jump: nothing new is handed out
        self.free = deque(range(len(slots)))
        self.tickets: dict[int, Ticket] = {}                       # by slot
        self.at: dict[str, dict[int, Ticket]] = {stage: {} for stage in STAGES}      # the same, by stage
        self.rests: deque[Ticket] = deque()                        # cut, waiting for a slot to go on in

    def move(self, t: Ticket, stage: str) -> None:
        del self.at[t.stage][t.slot]
        t.stage = stage
        self.at[stage][t.slot] = t

    def hand_out(self) -> list[Ticket]:
        """New tickets, as many as may be generated now, rests of cut responses first.

        In lockstep batch j is handed out at version j - max_ahead, when everything before it has been generated: so
        that it is wholly drawn under that version, whose weights its workers read by number.
        """
        n, new = len(self.free), [t for t in self.at["rollout"].values() if t.holder == ""]      # its holder died
        if self.lockstep:
            n = 0 if self.at["rollout"] else (self.version + self.ahead + 1) * self.batch - self.handed_out
        n = 0 if self.barrier else n
        for _ in range(n):
            if self.rests:
                rest = self.rests.popleft()
                t = Ticket(self.handed_out, self.free.popleft(), rest.uid, rest.context)
            else:
                t = Ticket(self.handed_out, self.free.popleft(), self.prompts, None)
                self.prompts += 1
            self.handed_out += 1
            self.tickets[t.slot] = self.at["rollout"][t.slot] = t
            new.append(t)
        return new

    def due(self, t: Ticket) -> int | None:
        """The version that t is to be drawn under, also where its first holder has died since; None: the newest.
        After a resumption there is none older than its own: the first batches of step-off are fresher."""
        return max(self.began, t.number // self.batch - self.ahead) if self.lockstep else None

    def holder_died(self, name: str) -> list[Ticket]:
        """What a worker held is to be handed out again, from where its ticket began.

        In sync what it has handed over goes with it, as the teacher has not seen it yet: an engine's rounding depends
        on what runs side by side, and a batch that is drawn again as a whole is drawn again to the bit.
        """
        back = {"rollout", "teacher"} | ({"generated"} if self.lockstep and self.ahead == 0 else set())
        held = [t for t in self.tickets.values() if t.holder == name and t.stage in back]
        for t in held:
            self.move(t, "generated" if t.stage == "teacher" else "rollout")
            t.holder, t.asked = "", -1
        return held

    def untrained(self) -> list[tuple[int, Tensor | None]]:
        """(uid, context) of all that was begun and not trained, in order; of a response in pieces only the earliest."""
        first: dict[int, Tensor | None] = {}
        for t in [*sorted(self.tickets.values(), key=lambda t: t.number), *self.rests]:
            first.setdefault(t.uid, t.context)
        return list(first.items())

    def resume(self, version: int, prompts: int, tickets: list[tuple[int, Tensor | None]]) -> None:
        """Go on from a checkpoint: what was begun then is handed out first."""
        self.version = self.began = version
        self.prompts, self.handed_out = prompts, version * self.batch
        self.rests.extend(Ticket(-1, -1, uid, context) for uid, context in tickets)

    def generated(self, slot: int, finished: bool = True) -> None:
        """Its holder has handed slot over. A cut response's tokens so far are the context of the rest."""
        t = self.at["rollout"][slot]
        self.move(t, "generated")
        if not finished:
            self.rests.append(Ticket(-1, -1, t.uid, self.slots.read(slot).tokens.clone()))

    def to_score(self) -> list[Ticket]:
        """What the teacher gets now: all that is generated; in sync only when the whole batch is. Moves it there."""
        if self.lockstep and self.ahead == 0 and self.at["rollout"]:
            return []
        ready = list(self.at["generated"].values())
        for t in ready:
            self.move(t, "teacher")
        return ready

    def scored(self, slot: int) -> None:
        t = self.at["teacher"][slot]
        self.move(t, "scored")
        t.arrived = self.arrivals
        self.arrivals += 1

    @property
    def floor(self) -> int:
        """A token of this version or older passes max_lag unless the next batch has it; or is older than a jump."""
        return self.version - (1 if self.barrier == "cut" else self.max_lag)

    @property
    def ending(self) -> Literal["cut", "drop", ""]:
        """How a response that runs is ended when it is overdue; "": not at all."""
        return "drop" if self.rule == "drop" else "cut" if self.rule == "cut" or self.barrier == "cut" else ""

    def overdue(self) -> list[Ticket]:
        """Tickets that the next batch must have. `born` may lag behind its holder, on the safe side only."""
        if self.rule == "keep" and self.barrier != "cut":
            return []
        old = (self.slots.born <= self.floor).nonzero().flatten().tolist()
        return [self.tickets[s] for s in old if s in self.tickets]

    def to_stop(self) -> list[Ticket]:
        """Overdue and still running, not told yet: to be cut or dropped now, while the learner waits for its batch."""
        if not self.ending or self.at["learner"]:
            return []
        late = [t for t in self.overdue() if t.stage == "rollout" and t.asked < self.version]
        for t in late:
            t.asked = self.version
        return late

    def dropped(self, slot: int) -> None:
        del self.at[self.tickets.pop(slot).stage][slot]
        self.free.append(slot)

    def to_weigh(self) -> list[Ticket] | None:
        """What was drawn before a jump, once all of it is scored; else None. Then `reopen` ends the barrier."""
        old = self.overdue() if self.barrier == "cut" else None
        if old is None or any(t.stage != "scored" for t in old):
            return None
        self.barrier = "weigh"
        return old

    def reopen(self) -> None:
        self.barrier = ""

    def next_batch(self) -> list[Ticket] | None:
        """The tickets to train under `version` now, or None; moves them to the learner.

        Overdue ones first and all of them, then the oldest; with keep, and only there, in the order of arrival. In
        lockstep batch j is tickets j * batch and on, whatever finished first.
        """
        if self.barrier or self.at["learner"] or len(self.at["scored"]) < self.batch:
            return None
        late, ready = self.overdue(), list(self.at["scored"].values())
        if any(t.stage != "scored" for t in late):
            return None
        if self.lockstep:
            if self.handed_out < (self.version + self.ahead + 1) * self.batch:
                return None
            ready = sorted((t for t in ready if t.number < (self.version + 1) * self.batch), key=lambda t: t.number)
        elif self.rule == "keep":
            ready.sort(key=lambda t: t.arrived)
        else:
            born = self.slots.born.tolist()
            ready.sort(key=lambda t: (born[t.slot], t.number))     # so the overdue come first
        if len(ready) < self.batch:
            return None
        ready = ready[:max(self.batch, len(late))]
        for t in ready:
            self.move(t, "learner")
        return ready

    def trained(self, jumped: bool = False) -> list[Ticket]:
        """The learner has published: one version more, its slots are free. In lockstep nothing else is in flight."""
        done = list(self.at["learner"].values())
        self.at["learner"].clear()
        for t in done:
            del self.tickets[t.slot]
            self.free.append(t.slot)
        self.version += 1
        self.barrier = "cut" if jumped and not self.lockstep else ""
        return done


# -- published weights -----------------------------------------------------------------------------

class Weights:
    """One shared copy of the student with a version, double-buffered: a reader never keeps a half-written one.

    flat [2, P] in the dtype the engines compute in; version v lives in half v % 2. `probe` is a fixed sequence of
    tokens and `probe_logp` [2, len - 1] the learner's log-probs of it at that version: an engine that has loaded v
    proves it by reproducing them.
    """

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype):
        self.layout, self.probe = layout, probe
        self.flat = torch.zeros(2, sum(s.numel() for s in layout.values()), dtype=dtype).share_memory_()
        self.probe_logp = torch.zeros(2, len(probe) - 1).share_memory_()
        self.clock = torch.full((2,), -1, dtype=torch.int64).share_memory_()      # being written, published

    @property
    def version(self) -> int:
        return int(self.clock[1])

    def views(self, half: int) -> dict[str, Tensor]:
        out, at = {}, 0
        for name, shape in self.layout.items():
            out[name] = self.flat[half, at:at + shape.numel()].view(shape)
            at += shape.numel()
        return out

    def publish(self, parameters: dict[str, Tensor], version: int, probe_logp: Tensor,
                whole: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Write the half of `version`. `whole` gathers a parameter that is sharded, one at a time."""
        assert parameters.keys() == self.layout.keys(), parameters.keys() ^ self.layout.keys()
        self.clock[0] = version
        for name, view in self.views(version % 2).items():
            view.copy_(whole(parameters[name].detach()))
        self.probe_logp[version % 2] = probe_logp
        self.clock[1] = version

    def read(self, version: int | None = None) -> tuple[int, dict[str, Tensor], Tensor]:
        """(version, copies of the tensors, the probe's log-probs): the newest, or exactly the one asked for."""
        while True:
            v = self.version if version is None else version
            assert v >= 0, "nothing is published yet"
            copies = {name: x.clone() for name, x in self.views(v % 2).items()}
            probe_logp = self.probe_logp[v % 2].clone()
            if self.clock[0] < v + 2:                    # else the learner has begun to overwrite this half
                return v, copies, probe_logp
            assert version is None, f"version {version} was overwritten by {int(self.clock[0])} while it was read"

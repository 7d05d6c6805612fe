"""
Which tickets a batch takes.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cache import Slots

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

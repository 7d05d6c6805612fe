"""
Which tickets are handed out, scored, ended early and trained: every decision of the pipeline.

    free -> rollout -> generated -> teacher -> scored -> learner -> free      the stages of a slot

The lag of a token is the learner's version when the token is trained, minus the version of the
weights that drew it. A version is one publish, and there is one publish per train batch.

A scheduler knows no process, no clock and no message. It reads what it decides by from the slots
(`born`) and from what it is called with, so that tests can run it for thousands of steps in a
second.

What is left out: who gets which order (controller.py). Tests: tests/test_lag.py
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cache import Slots

STAGES = ("rollout", "generated", "teacher", "scored", "learner")

Overdue = Literal["cut", "wait", "drop", "keep"]
Flush = Literal["", "ending", "examining"]
NEVER = -1


@dataclass(slots=True)
class Ticket:
    """One round of a slot: a whole response, or one segment of a response that was cut."""
    number: int                    # order of handing out
    slot: int
    uid: int                       # which prompt, counted over all epochs
    context: Tensor | None         # of a cut response: prompt and tokens so far; None: new
    stage: str = "rollout"         # one of STAGES
    holder: str = ""               # the worker that has it
    arrived: int = 0               # order of becoming scored
    stop_sent: int = NEVER         # version under which its holder was last ordered to end it


@dataclass(frozen=True, slots=True)
class Rest:
    """The rest of a response that was cut, or begun before a resumption: it waits for a slot."""
    uid: int
    context: Tensor | None         # as in Ticket


class Scheduler:
    """Decides which tickets are handed out and which a batch takes.

    There are (max_ahead + 1) * batch slots. Their number bounds the memory and how far generation
    runs ahead, and it sets the mean lag; it does not bound the lag of a long response. A response
    is overdue if its oldest token would exceed max_lag unless the next batch has it. `overdue` is
    the rule for these: cut, wait, drop or keep.

    The schedules sync and step-off are in lockstep: batch j is handed out at version j -
    max_ahead, as a whole.

    A flush ends what is in flight after the weights have jumped. While it is "ending", everything
    older than the jump is ended and scored; while it is "examining", the learner looks at it.
    Nothing is handed out or trained meanwhile.
    """

    def __init__(self, slots: Slots, batch: int, schedule: str, max_ahead: int, max_lag: int,
                 overdue: Overdue):
        self.slots = slots
        self.batch = batch
        self.lockstep = schedule != "async"
        self.ahead = max_ahead
        self.max_lag = max_lag
        self.rule: Overdue = "keep" if self.lockstep else overdue
        self.version = 0           # publishes so far, which is the number of trained batches
        self.began = 0             # version with which this process began: 0, or a checkpoint's
        self.handed_out = 0        # tickets so far
        self.prompts = 0           # prompts so far, those of rests not counted again
        self.arrivals = 0          # tickets scored so far
        self.flush: Flush = ""
        self.free = deque(range(len(slots)))
        self.tickets: dict[int, Ticket] = {}                                       # by slot
        self.at: dict[str, dict[int, Ticket]] = {stage: {} for stage in STAGES}    # the same
        self.rests: deque[Rest] = deque()

    def move(self, t: Ticket, stage: str) -> None:
        del self.at[t.stage][t.slot]
        t.stage = stage
        self.at[stage][t.slot] = t

    # -- generation -------------------------------------------------------------------------------

    def hand_out(self) -> list[Ticket]:
        """The tickets that may be generated now; rests come before new prompts.

        In lockstep a batch is handed out when everything before it has been generated. It is
        therefore drawn under one version, whose weights its workers read by number.
        """
        tickets = [t for t in self.at["rollout"].values() if t.holder == ""]    # its holder died
        for _ in range(self.room()):
            tickets.append(self.next_ticket())
        return tickets

    def room(self) -> int:
        """How many tickets may begin now."""
        if self.flush:
            return 0
        if not self.lockstep:
            return len(self.free)
        if self.at["rollout"]:
            return 0
        return (self.version + self.ahead + 1) * self.batch - self.handed_out

    def next_ticket(self) -> Ticket:
        """Put the first rest, or else the next prompt, into a free slot."""
        if self.rests:
            rest = self.rests.popleft()
        else:
            rest = Rest(self.prompts, None)
            self.prompts += 1
        t = Ticket(self.handed_out, self.free.popleft(), rest.uid, rest.context)
        self.handed_out += 1
        self.tickets[t.slot] = t
        self.at["rollout"][t.slot] = t
        return t

    def due(self, t: Ticket) -> int | None:
        """The version under which t must be drawn; None: the newest there is.

        It stays the same if the first holder dies. No version is older than the one with which
        this process began: after a resumption the first batches of step-off are fresher than
        usual.
        """
        if not self.lockstep:
            return None
        return max(self.began, t.number // self.batch - self.ahead)

    def generated(self, slot: int, finished: bool = True) -> None:
        """Its holder has handed the slot over. A cut response goes on in its rest."""
        t = self.at["rollout"][slot]
        self.move(t, "generated")
        if not finished:
            self.rests.append(Rest(t.uid, self.slots.read(slot).tokens.clone()))

    def dropped(self, slot: int) -> None:
        """The content of the slot is thrown away; the slot is free."""
        t = self.tickets.pop(slot)
        del self.at[t.stage][slot]
        self.free.append(slot)

    # -- scoring ----------------------------------------------------------------------------------

    def to_score(self) -> list[Ticket]:
        """Move to the teacher what it gets now: all that is generated; in sync a whole batch."""
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

    # -- overdue responses, and a flush -----------------------------------------------------------

    @property
    def floor(self) -> int:
        """A response is overdue if its first token is of this version or older.

        In a flush this means: drawn before the jump.
        """
        if self.flush == "ending":
            return self.version - 1
        return self.version - self.max_lag

    @property
    def stop_order(self) -> Literal["cut", "drop", ""]:
        """The order that ends a running response when it is overdue; "": it goes on."""
        if self.rule == "drop":
            return "drop"
        if self.rule == "cut" or self.flush == "ending":
            return "cut"
        return ""

    def overdue(self) -> list[Ticket]:
        """Tickets that the next batch must have.

        `born` may be older than the truth, which errs on the safe side.
        """
        if self.rule == "keep" and self.flush != "ending":
            return []
        old = (self.slots.born <= self.floor).nonzero().flatten().tolist()
        return [self.tickets[s] for s in old if s in self.tickets]

    def to_stop(self) -> list[Ticket]:
        """Running responses that are overdue, each once per version, while the learner waits for
        its batch.
        """
        if not self.stop_order or self.at["learner"]:
            return []
        late = [t for t in self.overdue() if t.stage == "rollout" and t.stop_sent < self.version]
        for t in late:
            t.stop_sent = self.version
        return late

    def to_examine(self) -> list[Ticket] | None:
        """What was drawn before a jump, once all of it is scored, else None. `reopen` must
        follow.
        """
        if self.flush != "ending":
            return None
        old = self.overdue()
        if any(t.stage != "scored" for t in old):
            return None
        self.flush = "examining"
        return old

    def reopen(self) -> None:
        """The flush is over."""
        self.flush = ""

    # -- training ---------------------------------------------------------------------------------

    def next_batch(self) -> list[Ticket] | None:
        """The tickets to train under `version` now, or None. Moves them to the learner.

        All overdue ones come first, then the oldest. With the rule keep the order is that of
        arrival. In lockstep batch j has the tickets from j * batch on, whatever finished first.
        """
        if self.flush or self.at["learner"] or len(self.at["scored"]) < self.batch:
            return None
        late = self.overdue()
        if any(t.stage != "scored" for t in late):
            return None
        ready = self.in_training_order()
        if len(ready) < self.batch:
            return None
        batch = ready[:max(self.batch, len(late))]
        for t in batch:
            self.move(t, "learner")
        return batch

    def in_training_order(self) -> list[Ticket]:
        """Scored tickets that the next batch may have, in the order in which it takes them."""
        scored = list(self.at["scored"].values())
        if self.lockstep:
            if self.handed_out < (self.version + self.ahead + 1) * self.batch:
                return []            # a batch that may begin now is not handed out yet
            of_batch = [t for t in scored if t.number < (self.version + 1) * self.batch]
            return sorted(of_batch, key=lambda t: t.number)
        if self.rule == "keep":
            return sorted(scored, key=lambda t: t.arrived)
        born = self.slots.born.tolist()
        return sorted(scored, key=lambda t: (born[t.slot], t.number))    # the overdue come first

    def trained(self, flush: bool = False) -> list[Ticket]:
        """The learner has published a version; the slots of its batch are free. `flush`: the
        weights have jumped.

        In lockstep there is nothing to flush, because nothing else is in flight.
        """
        done = list(self.at["learner"].values())
        self.at["learner"].clear()
        for t in done:
            del self.tickets[t.slot]
            self.free.append(t.slot)
        self.version += 1
        self.flush = "ending" if flush and not self.lockstep else ""
        return done

    # -- deaths and resumptions -------------------------------------------------------------------

    def holder_died(self, name: str) -> list[Ticket]:
        """Take back what a worker held: it is handed out again, from where its ticket began.

        In sync this includes what the worker has handed over, which the teacher has not seen yet.
        An engine's rounding depends on what it generates at the same time, so only a batch that is
        drawn again as a whole is drawn again to the bit.
        """
        back = {"rollout", "teacher"}
        if self.lockstep and self.ahead == 0:
            back.add("generated")
        held = [t for t in self.tickets.values() if t.holder == name and t.stage in back]
        for t in held:
            self.move(t, "generated" if t.stage == "teacher" else "rollout")
            t.holder = ""
            t.stop_sent = NEVER
        return held

    def untrained(self) -> list[tuple[int, Tensor | None]]:
        """(uid, context) of everything begun and not trained, in order; of a response in pieces
        the first of them.
        """
        first: dict[int, Tensor | None] = {}
        for t in sorted(self.tickets.values(), key=lambda t: t.number):
            first.setdefault(t.uid, t.context)
        for rest in self.rests:
            first.setdefault(rest.uid, rest.context)
        return list(first.items())

    def resume(self, version: int, prompts: int,
               untrained: list[tuple[int, Tensor | None]]) -> None:
        """Go on from a checkpoint. What was begun and not trained then is handed out first."""
        self.version = version
        self.began = version
        self.prompts = prompts
        self.handed_out = version * self.batch
        for uid, context in untrained:
            self.rests.append(Rest(uid, context))

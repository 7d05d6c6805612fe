"""
Slots on their way: which worker gets which, and what follows when one comes back.

The scheduler decides what may be generated, scored, ended and trained now; the router chooses the
worker with the least to do, sends the orders, and keeps the numbers of what was cut or dropped.

What is left out: the decisions (scheduler.py), all other orders and reports (controller.py).
Tests: tests/test_pipeline.py
"""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

from cache import Slots
from control.scheduler import Scheduler, Ticket
from data.prompts import prompt_number
from record.recorder import Recorder
from transport.process import WorkerHandle, WorkerPool

Orders = dict[tuple[str, str], list]         # (worker, order) -> body


class Router:
    """Between the scheduler and the workers."""

    def __init__(self, prompts: list[list[int]], seed: int, slots: Slots, scheduler: Scheduler,
                 pool: WorkerPool, recorder: Recorder):
        """`prompts`: of the task, token ids; `seed` of their order."""
        self.prompts = prompts
        self.seed = seed
        self.slots = slots
        self.scheduler = scheduler
        self.pool = pool
        self.recorder = recorder
        self.account = recorder.account
        self.flush_cost = FlushCost()

    # -- orders -----------------------------------------------------------------------------------

    def give_work(self) -> None:
        """Send every order that the scheduler allows now, one message per worker and order."""
        handles = {handle.name: handle for handle in self.pool}
        orders: Orders = defaultdict(list)
        self.hand_out(orders)
        self.give_to_teachers(orders)
        self.end_overdue(handles)
        batch = self.scheduler.next_batch()
        if batch is not None:
            for handle in self.pool.role("learner"):
                orders[handle.name, "train"] = [t.slot for t in batch]
        old = self.scheduler.to_examine()
        if old is not None:
            self.pool.broadcast("learner", "examine", [t.slot for t in old])
        for (name, order), body in orders.items():
            handles[name].send(order, body)

    def hand_out(self, orders: Orders) -> None:
        """New tickets, each to the rollout worker with the fewest."""
        tickets = self.scheduler.hand_out()
        if not tickets:
            return
        rollouts = self.pool.role("rollout")
        for t in tickets:
            handle = min(rollouts, key=load_of)
            self.open_slot(t)
            orders[handle.name, "take"].append((self.scheduler.due(t), t.slot))
            t.holder = handle.name
            handle.load += 1

    def open_slot(self, t: Ticket) -> None:
        """Write the prompt of a ticket, or the context of a cut response, into its slot."""
        prompt = self.prompts[prompt_number(t.uid, len(self.prompts), self.seed)]
        context = prompt if t.context is None else t.context
        self.slots.open(t.slot, t.uid, context, len(prompt), self.scheduler.version)

    def give_to_teachers(self, orders: Orders) -> None:
        """What is generated, each slot to the teacher with the fewest."""
        tickets = self.scheduler.to_score()
        if not tickets:
            return
        teachers = self.pool.role("teacher")
        for t in tickets:
            handle = min(teachers, key=load_of)
            orders[handle.name, "score"].append(t.slot)
            t.holder = handle.name
            handle.load += 1

    def end_overdue(self, handles: dict[str, WorkerHandle]) -> None:
        """Order the holders of overdue responses to cut or drop them."""
        late: dict[str, list[int]] = defaultdict(list)
        for t in self.scheduler.to_stop():
            late[t.holder].append(t.slot)
        for name, slots in late.items():
            handles[name].send(self.scheduler.stop_order, (self.scheduler.floor, slots))

    # -- reports ----------------------------------------------------------------------------------

    def generated(self, handle: WorkerHandle, body: dict) -> None:
        """Slots with finished responses, or with what a cut response has so far."""
        slots = self.take_from_rollout(handle, body)
        for s in slots:
            self.scheduler.generated(s, body["finished"])
            if not body["finished"]:
                tokens = int(self.slots.length[s])
                self.flush_cost.count("cut", tokens)
                self.recorder.event("cut", uid=self.scheduler.tickets[s].uid,
                                    version=self.scheduler.version, born=int(self.slots.born[s]),
                                    tokens=tokens)

    def dropped(self, handle: WorkerHandle, body: dict) -> None:
        self.drop(self.take_from_rollout(handle, body))

    def take_from_rollout(self, handle: WorkerHandle, body: dict) -> list[int]:
        """The slots that a rollout worker returns; counts their tokens."""
        slots = body["slots"]
        self.account.handed[handle.name] += int(self.slots.length[slots].sum())
        self.account.drawn[handle.name] = body["tokens"]
        self.account.preempted[handle.name] = body["preempted"]
        handle.load -= len(slots)
        return slots

    def drop(self, slots: Iterable[int]) -> None:
        """Throw away what these slots hold."""
        for s in slots:
            tokens = int(self.slots.length[s])
            self.account.dropped += tokens
            self.flush_cost.count("dropped", tokens)
            self.scheduler.dropped(s)

    def scored(self, handle: WorkerHandle, body: dict) -> None:
        for s in body["slots"]:
            self.scheduler.scored(s)
        handle.load -= len(body["slots"])

    def trained(self, flush: bool) -> list[Ticket]:
        """The batch that the learner has trained and published; its slots are free.

        They are free only now, so that no ticket begins under older weights.
        """
        batch = self.scheduler.trained(flush)
        if self.scheduler.flush:
            self.flush_cost.begin()
        return batch

    def flushed(self, handle: WorkerHandle, body: dict) -> None:
        """What was drawn before a jump has been examined: the flush is over."""
        self.drop(body["drop"])
        self.recorder.event("flush", step=self.scheduler.version, examined=body["examined"],
                            **self.flush_cost.end())
        self.scheduler.reopen()


class FlushCost:
    """What a flush costs, from its beginning to its end: seconds, responses and tokens."""

    def __init__(self):
        self.running = False
        self.began = 0.0
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        self.running = True
        self.began = time.monotonic()
        self.counts = dict.fromkeys(("cut", "cut_tokens", "dropped", "dropped_tokens"), 0)

    def count(self, what: str, tokens: int) -> None:
        """A response was `cut` or `dropped`."""
        if self.running:
            self.counts[what] += 1
            self.counts[f"{what}_tokens"] += tokens

    def end(self) -> dict[str, float]:
        """For the log."""
        self.running = False
        return {"seconds": time.monotonic() - self.began, **self.counts}


def load_of(handle: WorkerHandle) -> int:
    return handle.load

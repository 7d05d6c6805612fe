"""The rules about lag, kept by the real Scheduler and the real Worker over thousands of steps: a stand-in engine draws
a token a step for responses of random length; no process, no model, no clock."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cache import Slots
from config import Config
from control.scheduler import Scheduler
from engines.drawn import Drawn
from rollout import Worker
from transport.published import Published
from transport.shared import SharedMemory

T = 60


class Engine:
    """Draws token `position` of response `uid`, until length_of(uid): what was drawn is seen in the token itself.

    Only the first few responses get a token in a step, as in an engine that is full: the others wait without any.
    Those that run get one on the probe too, as in vLLM; where they may run while weights change.
    """

    preempted = 0

    def __init__(self, length_of, room=3, keeps=False):
        self.length_of, self.rows, self.room, self.keeps = length_of, {}, room, keeps
        self.version, self.versions, self.finished = None, {}, []

    def load(self, tensors, version):
        assert self.keeps or not self.rows
        self.version = version

    def checksums(self, layout, version):
        return []

    def logp(self, tokens):
        self.draw()
        return torch.zeros(1)

    def add(self, key, tokens, budget, *, uid, position):
        assert key not in self.rows and len(tokens) == 1 + position
        self.rows[key] = (uid, position, [])
        self.versions[key] = []

    def step(self):
        self.draw()
        finished, self.finished = self.finished, []
        return finished

    def draw(self):
        for key, (uid, position, drawn) in list(self.rows.items())[:self.room]:
            if key in self.finished:
                continue
            drawn.append(position + len(drawn))
            self.versions[key].append(self.version)
            if position + len(drawn) >= self.length_of(uid):
                self.finished.append(key)

    def take(self, keys):
        self.finished = [key for key in self.finished if key not in keys]
        out = {}
        for key in keys:
            _, _, drawn = self.rows.pop(key)
            tokens = torch.tensor(drawn, dtype=torch.long)
            out[key] = Drawn(tokens, tokens[:, None], torch.zeros(len(drawn), 1), torch.zeros(len(drawn)),
                             torch.tensor(self.versions.pop(key)))
        return out

    def not_begun(self):
        return [key for key, (_, _, drawn) in self.rows.items() if not drawn]


class Link:
    def __init__(self):
        self.sent = []

    def send(self, kind, **body):
        self.sent.append((kind, body))

    def span(self, what):
        from contextlib import nullcontext
        return nullcontext()


class Pipeline:
    """Parent, rollouts, teacher and learner, interleaved by `choose(n)`; it routes as the Controller does."""

    def __init__(self, choose, length_of, *, batch, workers, schedule="async", ahead=1, max_lag=4, overdue="cut",
                 inflight="recompute", deaths=False, resumes=False, jumps=False, room=3,
                 quick_teacher=False):
        cfg = Config(max_response=T, max_running=8, schedule=schedule, inflight=inflight)
        self.choose, self.length_of, self.max_lag, self.quick_teacher = choose, length_of, max_lag, quick_teacher
        self.slots = Slots((ahead + 1) * batch, 1, T, 1)
        self.scheduler = Scheduler(self.slots, batch, schedule, ahead, max_lag, overdue)
        self.weights = SimpleNamespace(version=0, layout={}, probe=[1, 2], read=self.read,
                                       holds=lambda version: True)
        self.began = 0
        shared = SharedMemory(self.slots, self.weights)
        self.start = lambda: Worker(cfg, Link(), shared, Engine(length_of, room, inflight == "keep"))
        self.again = lambda: Scheduler(self.slots, batch, schedule, ahead, max_lag, overdue)
        self.workers = [self.start() for _ in range(workers)]
        self.deaths, self.resumes, self.jumps = deaths, resumes, jumps
        self.light: list[tuple[int, int]] = []                 # (uid, first token) of what was dropped after a jump
        self.jumped = self.flushes = 0
        self.inbox = [[] for _ in self.workers]                # orders that a worker has not read yet
        self.teacher, self.learner = [], []
        self.trained: dict[int, list[int]] = {}                # uid -> tokens, in the order of training
        self.versions: dict[int, list[int]] = {}               # uid -> their versions
        self.lags, self.dropped, self.cuts, self.batches = [], 0, [], []

    def read(self, version):
        assert version is None or self.began <= version <= self.weights.version, "was never published in this run"
        return Published(self.weights.version if version is None else version, {}, {}, torch.zeros(1))

    def route(self):
        handed_out = self.scheduler.handed_out
        closed = self.scheduler.flush or (self.learner and not self.scheduler.lockstep)
        for t in self.scheduler.hand_out():
            self.slots.open(t.slot, t.uid, [0] if t.context is None else t.context, 1, self.scheduler.version)
            worker = self.choose(len(self.workers))
            t.holder = worker
            self.inbox[worker].append(("take", [(self.scheduler.due(t), t.slot)]))
        for t in self.scheduler.to_score():
            t.holder = "teacher"
            self.teacher.append(t.slot)
        for t in self.scheduler.to_stop():
            self.inbox[t.holder].append((self.scheduler.stop_order, (self.scheduler.floor, [t.slot])))
        if batch := self.scheduler.next_batch():
            self.learner = batch
        assert not closed or self.scheduler.handed_out == handed_out, "handed out in a flush, or while it may come"
        if (old := self.scheduler.to_examine()) is not None:
            self.examine(old)
        assert sorted([*self.scheduler.free, *self.scheduler.tickets]) == list(range(len(self.slots))), "a slot is lost"

    def examine(self, old):
        """After a jump: no token that was drawn before it is anywhere else than in `old`."""
        began = [t for t in self.scheduler.tickets.values() if t not in old]
        assert all(self.slots.born[t.slot] == self.scheduler.version for t in began), "drawn before, not examined"
        assert all(t.stage == "scored" for t in old)
        for t in old:
            if self.choose(2):
                self.light.append((t.uid, int(self.slots.start[t.slot]) - 1))
                self.dropped += int(self.slots.length[t.slot])
                self.scheduler.dropped(t.slot)
        self.scheduler.reopen()
        self.flushes += 1

    def hear(self, worker):
        for kind, body in worker.link.sent:
            for s in body["slots"] if kind == "generated" else ():
                self.scheduler.generated(s, body["finished"])
                if not body["finished"]:
                    self.cuts.append((self.scheduler.version, int(self.slots.born[s])))
            for s in body["slots"] if kind == "dropped" else ():
                self.dropped += int(self.slots.length[s])
                self.scheduler.dropped(s)
        worker.link.sent.clear()

    def die(self, who):
        """A worker is gone between two turns, with what it had read and not read; its reports are in the pipe still."""
        if who == len(self.workers):
            self.teacher.clear()
            return self.scheduler.holder_died("teacher")
        self.hear(self.workers[who])
        self.workers[who], self.inbox[who] = self.start(), []
        self.scheduler.holder_died(who)

    def resume(self):
        """The whole run dies after a checkpoint and begins again from it: all that is left are versions and tickets."""
        version, prompts, begun = self.scheduler.version, self.scheduler.prompts, self.scheduler.untrained()
        self.workers, self.inbox = [self.start() for _ in self.workers], [[] for _ in self.workers]
        self.teacher, self.learner = [], []
        self.slots.born.zero_()
        self.scheduler = self.again()
        self.scheduler.resume(version, prompts, begun)
        self.began = version

    def train(self):
        self.batches.append([t.number for t in self.learner])
        for t in self.learner:
            segment = self.slots.read(t.slot)
            assert len(segment) > 0, "an empty segment reached the learner"
            self.trained.setdefault(t.uid, []).extend(segment.tokens[segment.start:].tolist())
            self.versions.setdefault(t.uid, []).extend(segment.version.tolist())
            self.lags += (self.scheduler.version - segment.version).tolist()
        self.weights.version += 1                              # published, and only then
        jump = bool(self.jumps and self.choose(4) == 0)
        self.jumped += jump
        self.scheduler.trained(jump)
        self.learner = []

    def run(self, steps, limit=200_000):
        for i in range(limit):
            if i == limit // 10:        # a batch that takes longer than anybody lives is not a pipeline that hangs
                self.deaths = self.resumes = False
            if self.scheduler.version == steps:
                return self
            self.route()
            if self.deaths and self.choose(40) == 0:
                self.die(self.choose(len(self.workers) + 1))
                self.route()                                   # the parent restarts it and gives its work at once
            if self.resumes and self.choose(100) == 0:
                self.resume()
                self.route()
            while self.quick_teacher and self.teacher:
                self.scheduler.scored(self.teacher.pop(0))
            turn = self.choose(len(self.workers) + 2)
            if turn < len(self.workers):
                worker = self.workers[turn]
                if self.choose(2):                             # an order may arrive just after the worker has looked
                    for order, body in self.inbox[turn]:
                        worker.orders[order](body)
                    self.inbox[turn].clear()
                if not worker.stopped:
                    worker.turn()
                if self.choose(2):                             # and a report be heard after the next order is sent
                    self.hear(worker)
            elif turn == len(self.workers) and self.teacher:
                self.scheduler.scored(self.teacher.pop(self.choose(len(self.teacher))))
            elif turn == len(self.workers) + 1 and self.learner:
                self.train()
        raise AssertionError(f"no progress at version {self.scheduler.version}")

    def check_every_token_once(self):
        for tokens in self.trained.values():
            assert tokens == list(range(len(tokens))), "a token was trained twice, skipped, or out of order"


def chooser(seed):
    import random
    rng = random.Random(seed)
    return lambda n: rng.randrange(n)


def lengths(seed, tail):
    """Lengths with a heavy tail: most are short, some fill the slot."""
    import random
    return lambda uid: min(T, max(1, int(random.Random(f"{seed}-{uid}").paretovariate(tail))))


PIPELINES = dict(seed=st.integers(0, 10 ** 6), batch=st.integers(1, 5), workers=st.integers(1, 3),
                 ahead=st.integers(0, 8), more=st.integers(0, 8), tail=st.sampled_from([0.4, 0.8, 1.5]),
                 inflight=st.sampled_from(["recompute", "keep", "finish"]))
QUICK = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def play(seed, batch, workers, ahead, more, tail, inflight, overdue="cut", schedule="async", steps=15, **faults):
    return Pipeline(chooser(seed), lengths(seed, tail), batch=batch, workers=workers, ahead=ahead, max_lag=ahead + more,
                    overdue=overdue, schedule=schedule, inflight=inflight, **faults).run(steps)


@QUICK
@given(**PIPELINES)
@example(seed=0, batch=1, workers=1, ahead=0, more=0, tail=0.4, inflight="recompute")
@example(seed=0, batch=3, workers=2, ahead=4, more=0, tail=0.4, inflight="finish")
@example(seed=0, batch=3, workers=2, ahead=4, more=0, tail=0.4, inflight="keep")
def test_cut_bounds_the_lag_and_trains_every_token_once(**kw):
    p = play(**kw)
    assert max(p.lags) <= p.max_lag
    p.check_every_token_once()
    assert p.dropped == 0
    assert all(born <= version - p.max_lag for version, born in p.cuts), "something was cut that was not overdue"
    in_flight = sum(int(p.slots.length[s]) + len(row) for s, row in unfinished(p))
    assert sum(w.tokens for w in p.workers) + running(p) == len(p.lags) + in_flight


@QUICK
@given(**PIPELINES, overdue=st.sampled_from(["cut", "wait", "keep"]), resumes=st.booleans())
@example(seed=3, batch=3, workers=2, ahead=2, more=0, tail=0.4, inflight="recompute", overdue="cut", resumes=True)
@example(seed=4, batch=3, workers=2, ahead=4, more=1, tail=0.4, inflight="recompute", overdue="cut", resumes=True)
@example(seed=5, batch=5, workers=1, ahead=2, more=0, tail=0.4, inflight="finish", overdue="cut", resumes=False)
@example(seed=3, batch=3, workers=2, ahead=2, more=0, tail=0.4, inflight="keep", overdue="cut", resumes=True)
def test_deaths_lose_nothing_and_leave_the_bound(overdue, resumes, **kw):
    p = play(**kw, overdue=overdue, deaths=True, resumes=resumes)
    assert overdue == "keep" or max(p.lags) <= p.max_lag
    p.check_every_token_once()
    begun = {uid for uid, _ in p.scheduler.untrained()}
    assert set(range(p.scheduler.prompts)) == set(p.trained) | begun, "a prompt is lost"
    complete = {uid for uid, tokens in p.trained.items() if len(tokens) == p.length_of(uid)}
    assert complete == set(p.trained) - begun, "the rest of a response is lost"


@QUICK
@given(**PIPELINES | dict(more=st.just(0)), schedule=st.sampled_from(["sync", "step-off"]), resumes=st.booleans())
def test_in_lockstep_deaths_lose_nothing_either(schedule, resumes, **kw):
    kw["ahead"] = 0 if schedule == "sync" else kw["ahead"]
    p = play(**kw, schedule=schedule, deaths=True, resumes=resumes)
    p.check_every_token_once()
    assert max(p.lags) <= kw["ahead"] and set(p.trained) == set(range(15 * kw["batch"]))


@QUICK
@given(**PIPELINES, overdue=st.sampled_from(["cut", "wait", "drop", "keep"]), resumes=st.booleans(),
       deaths=st.booleans())
@example(seed=1, batch=4, workers=2, ahead=4, more=0, tail=0.4, inflight="recompute", overdue="cut", resumes=False,
         deaths=True)
@example(seed=2, batch=4, workers=3, ahead=4, more=2, tail=0.4, inflight="finish", overdue="keep", resumes=False,
         deaths=False)
@example(seed=1, batch=4, workers=2, ahead=4, more=0, tail=0.4, inflight="keep", overdue="cut", resumes=False,
         deaths=True)
def test_jumps_leave_the_bound_and_lose_what_they_drop_and_nothing_else(overdue, resumes, deaths, **kw):
    p = play(**kw, overdue=overdue, deaths=deaths, resumes=resumes, jumps=True)
    assert overdue == "keep" or max(p.lags) <= p.max_lag
    assert resumes or p.jumped - 1 <= p.flushes <= p.jumped, "each jump has its flush; the last one's may go on"
    gone = {uid for uid, _ in p.light}
    for uid, tokens in p.trained.items():
        assert tokens == sorted(set(tokens)), "a token was trained twice, or out of order"
        holes = [t for at, t in zip([-1, *tokens], tokens) if t != at + 1]
        assert overdue == "drop" or len(holes) <= len([1 for u, _ in p.light if u == uid]), "what was dropped, no more"
    begun = {uid for uid, _ in p.scheduler.untrained()}
    assert overdue == "drop" or set(range(p.scheduler.prompts)) == set(p.trained) | begun | gone, "a prompt is lost"


def test_after_a_push_the_oldest_responses_go_on_first():
    """Whatever slots they are in."""
    slots = Slots(5, 1, T, 1)
    weights = SimpleNamespace(version=0, layout={}, probe=[1, 2], holds=lambda version: True,
                              read=lambda version: Published(weights.version, {}, {}, torch.zeros(1)))
    engine = Engine(lambda uid: T)
    worker = Worker(Config(max_response=T), Link(), SharedMemory(slots, weights), engine)
    for slot, uid in enumerate([7, 2, 9, 4, 3]):
        slots.open(slot, uid, [0], 1, version=0)
        worker.take([(None, slot)])
    worker.turn()
    assert [uid for uid, _, _ in engine.rows.values()] == [7, 2, 9, 4, 3], "new ones wait in the order of their orders"
    weights.version = 1
    worker.turn()
    assert [uid for uid, _, _ in engine.rows.values()] == [2, 3, 4, 7, 9]


@pytest.mark.parametrize("rule", ["keep", "cut"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_fewer_places_than_responses_nobody_starves(seed, rule):
    """80 slots, an engine with 32 places. Taken up again by slot instead of age, the lag reaches 41 to 67 versions with
    the rule keep, and 32 to 47 responses are cut with the rule cut."""
    import random

    def length_of(uid):
        return min(T, max(1, int(random.Random(f"{seed}-{uid}").lognormvariate(2.5, 0.8))))
    p = Pipeline(chooser(seed), length_of, batch=16, workers=1, ahead=4, max_lag=16, overdue=rule, room=32,
                 quick_teacher=True).run(100)
    assert max(p.lags) <= 10 and not p.cuts
    p.check_every_token_once()


def unfinished(p):
    """(slot, tokens still in an engine) of every ticket that is not trained."""
    rows = {key: drawn for w in p.workers for key, (_, _, drawn) in w.engine.rows.items()}
    return [(s, rows.get(s, [])) for s in p.scheduler.tickets]


def running(p):
    return sum(len(drawn) for w in p.workers for _, _, drawn in w.engine.rows.values())


@QUICK
@given(**PIPELINES | dict(inflight=st.just("keep")), overdue=st.sampled_from(["cut", "wait", "keep"]))
def test_what_stays_in_the_engine_has_tokens_of_several_versions_in_their_order(overdue, **kw):
    p = play(**kw, overdue=overdue)
    assert all(versions == sorted(versions) for versions in p.versions.values())
    assert all(p.versions[uid][-1] <= p.scheduler.version for uid in p.trained)


def first_turn(p) -> None:
    """The only worker takes its tickets and makes one step."""
    p.route()
    for order, body in p.inbox[0]:
        p.workers[0].orders[order](body)
    p.workers[0].turn()


def push(p, version: int) -> None:
    p.weights.version = version
    p.workers[0].load(None)


def test_a_response_that_ends_on_the_probe_is_handed_over_before_anything_else():
    """Nothing that flushes what runs may take it for unfinished: it would go on after its end."""
    p = Pipeline(chooser(0), lambda uid: 2, batch=2, workers=1, ahead=0, inflight="keep")
    worker = p.workers[0]
    first_turn(p)
    push(p, version=1)
    kind, body = worker.link.sent[-1]
    assert kind == "generated" and body["finished"] and body["slots"] == [0, 1] and not worker.running
    assert [p.slots.read(s).version.tolist() for s in (0, 1)] == [[0, 1], [0, 1]]
    assert [int(p.slots.born[s]) for s in (0, 1)] == [0, 0]


def test_a_response_that_only_seems_overdue_goes_on():
    """An engine that has read a prompt in part may not know that nothing has been drawn yet."""
    p = Pipeline(chooser(0), lambda uid: 6, batch=2, workers=1, ahead=0, inflight="keep")
    worker = p.workers[0]
    worker.engine.room = 0
    worker.engine.not_begun = lambda: []
    first_turn(p)
    push(p, version=1)
    worker.engine.room = 3
    worker.turn()
    assert [int(p.slots.born[s]) for s in (0, 1)] == [0, 0], "as far as the parent can see"
    worker.cut((0, [0, 1]))
    kind, body = worker.link.sent[-1]
    assert kind == "generated" and body["slots"] == [] and worker.running == {0, 1}
    worker.turn()
    worker.cut((1, [0, 1]))
    assert worker.link.sent[-1][1]["slots"] == [0, 1]
    assert all(set(p.slots.read(s).version.tolist()) == {1} for s in (0, 1))


@QUICK
@given(**PIPELINES)
def test_wait_bounds_the_lag_and_cuts_nothing(**kw):
    p = play(**kw, overdue="wait")
    assert max(p.lags) <= p.max_lag and not p.cuts and p.dropped == 0
    p.check_every_token_once()
    assert all(len(tokens) == p.length_of(uid) for uid, tokens in p.trained.items()), "whole responses only"


@QUICK
@given(**PIPELINES)
def test_drop_bounds_the_lag_and_trains_whole_responses_only(**kw):
    p = play(**kw, overdue="drop")
    assert max(p.lags) <= p.max_lag and not p.cuts
    assert all(tokens == list(range(p.length_of(uid))) for uid, tokens in p.trained.items())


@QUICK
@given(**PIPELINES)
def test_keep_trains_whole_responses_whenever_they_finish(**kw):
    p = play(**kw, overdue="keep")
    assert not p.cuts and p.dropped == 0 and all(len(b) == len(p.batches[0]) for b in p.batches)
    assert all(tokens == list(range(p.length_of(uid))) for uid, tokens in p.trained.items())


@QUICK
@given(**PIPELINES, deaths=st.booleans())
def test_step_off_draws_batch_j_wholly_under_version_j_minus_k(**kw):
    """Also what a worker that died had begun, though the learner may have published since."""
    p = play(**kw, schedule="step-off")
    k, batch = kw["ahead"], kw["batch"]
    assert p.batches == [list(range(j * batch, (j + 1) * batch)) for j in range(15)]
    want = [j - max(j - k, 0) for j in range(15) for uid in range(j * batch, (j + 1) * batch)
            for _ in range(p.length_of(uid))]
    assert p.lags == want


@pytest.mark.parametrize("inflight", ["recompute", "keep"])
@pytest.mark.parametrize("rule", ["cut", "drop"])
def test_an_order_that_crosses_new_weights_ends_only_what_is_overdue(rule, inflight):
    """Slot 1 waits for room without a token while the weights go from 0 to 5: what it draws then is not old."""
    p = Pipeline(chooser(0), lambda uid: T, batch=2, workers=1, ahead=0, inflight=inflight)
    worker = p.workers[0]
    worker.engine.room = 1
    p.route()
    for order, body in p.inbox[0]:
        worker.orders[order](body)
    worker.turn()
    p.weights.version, worker.engine.room = 5, 2
    worker.turn()
    worker.orders[rule]((0, [0, 1]))
    assert worker.link.sent[-1][1]["slots"] == [0] and worker.running == {1} and int(p.slots.born[1]) == 5


def test_drop_throws_long_answers_away_and_keep_lets_them_age():
    """What the other rules cost: the reason for cutting."""
    kw = dict(seed=1, batch=4, workers=2, ahead=1, more=0, tail=0.5, inflight="recompute", steps=300)
    keep, drop, cut = (play(**kw, overdue=rule) for rule in ("keep", "drop", "cut"))
    assert max(keep.lags) > 5 * keep.max_lag and max(cut.lags) <= cut.max_lag
    assert drop.dropped > 0.1 * len(drop.lags)
    def mean(p):
        return sum(map(len, p.trained.values())) / len(p.trained)
    assert mean(drop) < 0.7 * mean(keep)


@pytest.mark.parametrize("rule", ["cut", "keep", "wait", "drop"])
def test_thousands_of_steps_without_a_deadlock(rule):
    p = play(seed=3, batch=2, workers=2, ahead=2, more=2, tail=0.8, inflight="recompute", overdue=rule, steps=1000)
    assert p.scheduler.version == 1000


@pytest.mark.parametrize("rule", ["cut", "wait", "drop", "keep"])
def test_a_flush_ends_what_runs_under_every_rule(rule):
    scheduler = Scheduler(Slots(4, 2, 3, 1), 2, "async", 1, 4, rule)
    a, b, c, d = scheduler.hand_out()
    for t in (a, b, c, d):
        t.holder = "rollout0"
    for t in (a, b, c):
        scheduler.generated(t.slot)
    scheduler.to_score()
    scheduler.scored(a.slot)
    scheduler.scored(b.slot)
    assert scheduler.next_batch() == [a, b] and not scheduler.to_stop()
    scheduler.trained(flush=True)
    assert scheduler.stop_order == ("drop" if rule == "drop" else "cut")
    assert scheduler.floor == 0 and scheduler.to_stop() == [d]
    assert scheduler.hand_out() == [] and scheduler.to_examine() is None
    scheduler.slots.born[d.slot] = 1            # it had no token yet and begins under the new weights
    assert scheduler.to_examine() is None, "c is at the teacher"
    scheduler.scored(c.slot)
    assert scheduler.to_examine() == [c] and scheduler.flush == "examining"
    assert scheduler.to_examine() is None and scheduler.hand_out() == []
    scheduler.reopen()
    assert len(scheduler.hand_out()) == 2
    assert scheduler.stop_order == (rule if rule in ("cut", "drop") else "")


def test_a_dropped_response_frees_its_slot_at_whatever_stage():
    scheduler = Scheduler(Slots(4, 2, 3, 1), 2, "async", 1, 4, "cut")
    a, b, *_ = scheduler.hand_out()
    scheduler.generated(a.slot)
    scheduler.to_score()
    scheduler.scored(a.slot)
    for t in (a, b):
        scheduler.dropped(t.slot)
    assert list(scheduler.free) == [a.slot, b.slot] and set(scheduler.tickets) == {2, 3}
    assert not scheduler.at["scored"] and set(scheduler.at["rollout"]) == {2, 3}


# -- the tests above can fail ----------------------------------------------------------------------

def test_a_worker_that_overstates_its_versions_is_caught():
    p = Pipeline(chooser(0), lengths(0, 0.4), batch=1, workers=2, ahead=3, max_lag=3, inflight="finish")
    for worker in p.workers:
        def wrong(s, worker=worker, start=worker.start):
            start(s)
            p.slots.born[s] = worker.version + 50
        worker.start = wrong
    p.run(200)
    assert max(p.lags) > p.max_lag


def test_a_scheduler_that_forgets_the_overdue_is_caught():
    p = Pipeline(chooser(0), lengths(0, 0.4), batch=2, workers=1, ahead=1, max_lag=1)
    p.scheduler.overdue = lambda: []
    p.run(60)
    assert max(p.lags) > p.max_lag

"""A run of some steps, event by event: servers that decode samples of unequal length, one trainer, a bound on staleness, failures.

All samples of a server advance together, one token a decoding step, whose time follows from the rows and cache it has then. A
sample waits in one queue until a server has a slot. As in `omni_fast.ahead`, the samples of a step are asked for when the step
`staleness` before it begins, and a step trains its own samples, when all of them are there. A sync pauses every server. A server
that fails loses its samples, which start again elsewhere, and is back after `REPAIR_S`. GPUs that generate and train in turns are
servers on all of them with staleness 0.

Limits: rewards take no time; a group's samples may land on several servers and its prompt is charged once; cache that runs out in the
middle (retraction) is not modelled, the slots are what fits at mean length.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist, fmean

from omni_fast.errors import UserError
from omni_fast.predict.step import Server, Work

REPAIR_S = 300.0  # a server that failed: found, started, loaded


@dataclass(frozen=True)
class Timing:
    """Means over the steps that count. lost_tokens: a step's, by failures. waiting: the trainer had not all samples of its step.
    generate: from a step's first sample to the last it needs. tail: from nine tenths of its samples done to all. idle: share of
    the servers' time."""

    step: float
    waiting: float
    update: float
    sync: float
    generate: float
    tail: float
    idle: float
    staleness: float
    lost_tokens: float


@dataclass
class _Replica:
    """A server: its samples as (progress at which it ends, number, version it began under), the tokens they hold, and how far
    all have come since they began."""

    running: list[tuple[float, int, int]] = field(default_factory=list)
    progress: float = 0.0
    context: float = 0.0
    since: float = 0.0
    stalled_until: float = 0.0
    step_s: float = 0.0
    plans: int = 0  # the end of a sample that an earlier plan foretold does not come
    down: bool = False
    busy_s: float = 0.0

    def advance(self, now: float) -> None:
        """Bring it up to now at the pace it has had since the last event."""
        if self.running:
            self.busy_s += now - self.since
            moved = max(0.0, now - max(self.since, self.stalled_until)) / self.step_s
            self.progress += moved
            self.context += moved * len(self.running)
        self.since = now


@dataclass
class _Step:
    """The samples of a step: when the first began, when they ended, and the versions they began under, added up."""

    began: float
    ended: list[float] = field(default_factory=list)
    versions: int = 0


@lru_cache(2)
def lengths(work: Work, count: int, seed: int) -> tuple[list[float], tuple]:
    """Log-normal with the work's spread, cut at the limit, scaled so that the mean of the cut ones is the work's; and the
    state of the generator behind them."""
    sigma = math.sqrt(math.log1p(work.spread**2))
    grid = [NormalDist().inv_cdf((n + 0.5) / 400) for n in range(400)]

    def cut(scale: float, z: float) -> float:
        return min(float(work.max_new_tokens), max(1.0, scale * math.exp(sigma * z)))

    low, high = 1e-3, 1e3 * work.max_new_tokens
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fmean(cut(middle, z) for z in grid) < work.new_tokens else (low, middle)
    draw = random.Random(seed)
    return [cut(low, draw.gauss(0.0, 1.0)) for _ in range(count)], draw.getstate()


@dataclass
class Simulation:
    """`run` takes `steps` optimiser steps on `servers` replicas, after some that fill the fleet and do not count.

    failures_per_s: of one replica. Same arguments, same result.
    """

    server: Server
    servers: int
    work: Work
    update_s: float
    sync_s: float
    staleness: int = 0
    failures_per_s: float = 0.0
    steps: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        work, self.batch, self.slots = self.work, self.work.batch, self.server.slots(self.work)
        self.uncounted = 1 + 2 * self.staleness
        self.draw = random.Random()
        count = (self.uncounted + self.steps + self.staleness + 1) * self.batch
        self.length, state = lengths(work, count, self.seed)
        self.draw.setstate(state)
        self.prompt = work.prompt_tokens / (work.samples if work.shared else 1)  # tokens that a sample brings
        self.prefill_s = self.server.prefill_s(self.prompt, work.prompt_tokens)
        # A decoding step takes `rows_s` of its rows and `token_s` for each token in their caches.
        self.rows_s = [self.server.decode_s(rows, 0.0) for rows in range(self.slots + 1)]
        self.token_s = (self.server.decode_s(1, 1e9) - self.rows_s[1]) / 1e9
        self.fleet = [_Replica() for _ in range(self.servers)]
        self.asked: list[_Step] = []
        self.done: list[tuple[float, float, float, float, float]] = []  # at, waited, generate, tail, staleness
        self.queue: deque[int] = deque()
        self.events: list[tuple] = []  # at, number, what happens with which arguments
        self.number = self.version = self.failures = 0
        self.now = self.free_since = self.lost = 0.0
        self.training = False

    def run(self) -> Timing:
        for replica in self.fleet if self.failures_per_s else ():
            self._at(self.draw.expovariate(self.failures_per_s), self._fail, replica)
        self._ask()
        while len(self.done) < self.uncounted + self.steps:
            self.now, _, happen, *what = heapq.heappop(self.events)
            happen(*what)
        for replica in self.fleet:
            replica.advance(self.now)
        counted = self.done[self.uncounted :]
        span = counted[-1][0] - self.done[self.uncounted - 1][0]
        waiting, generate, tail, staleness = (fmean(column) for column in list(zip(*counted, strict=True))[1:])
        idle = max(0.0, 1 - sum(replica.busy_s for replica in self.fleet) / (self.servers * self.now))
        lost = self.lost / len(self.done)
        return Timing(span / len(counted), waiting, self.update_s, self.sync_s, generate, tail, idle, staleness, lost)

    def _at(self, time: float, happen: Callable[..., None], *what: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, happen, *what))

    def _ask(self) -> None:
        """For the samples of all steps up to the bound on staleness."""
        while len(self.asked) <= self.version + self.staleness:
            self.queue.extend(range(len(self.asked) * self.batch, (len(self.asked) + 1) * self.batch))
            self.asked.append(_Step(math.inf))
        self._fill()

    def _fill(self) -> None:
        """Waiting samples to the servers with the fewest: afterwards none waits, or all are full."""
        free = [(len(replica.running), place) for place, replica in enumerate(self.fleet) if not replica.down]
        heapq.heapify(free)
        fresh = dict[int, _Replica]()
        while self.queue and free and free[0][0] < self.slots:
            rows, place = free[0]
            replica = self.fleet[place]
            if place not in fresh:
                fresh[place] = replica
                replica.advance(self.now)
            self._start(replica)
            heapq.heapreplace(free, (rows + 1, place))
        for replica in fresh.values():
            self._plan(replica)

    def _start(self, replica: _Replica) -> None:
        sample = self.queue.popleft()
        step = self.asked[sample // self.batch]
        step.began = min(step.began, self.now)
        heapq.heappush(replica.running, (replica.progress + self.length[sample], sample, self.version))
        replica.context += self.prompt
        replica.stalled_until = max(replica.stalled_until, self.now) + self.prefill_s

    def _plan(self, replica: _Replica) -> None:
        """The server's pace from now on, and its next end of a sample."""
        replica.plans += 1
        if rows := len(replica.running):
            ahead = max(0.0, replica.running[0][0] - replica.progress)
            replica.step_s = self.rows_s[rows] + self.token_s * (replica.context + rows * ahead / 2)
            end = max(self.now, replica.stalled_until) + ahead * replica.step_s
            self._at(end, self._finish, replica, replica.plans)

    def _finish(self, replica: _Replica, plan: int) -> None:
        if plan < replica.plans:
            return
        replica.advance(self.now)
        _, sample, version = heapq.heappop(replica.running)
        replica.context -= self.prompt + self.length[sample]
        step = self.asked[sample // self.batch]
        step.versions += version
        step.ended.append(self.now)
        if self.queue:  # then every other server is full
            self._start(replica)
        self._plan(replica)
        if len(step.ended) == self.batch:
            self._train()

    def _train(self) -> None:
        """The next step, if the trainer is free and all its samples are there."""
        if not self.training and len(self.asked[self.version].ended) == self.batch:
            self.training, self.waited = True, self.now - self.free_since
            self._at(self.now + self.update_s, self._sync)

    def _sync(self) -> None:
        """The step is trained: every server stands still and takes the weights."""
        step = self.asked[self.version]
        tail = step.ended[-1] - step.ended[int(0.9 * (self.batch - 1))]
        stale = self.version - step.versions / self.batch
        self.done.append((self.now + self.sync_s, self.waited, step.ended[-1] - step.began, tail, stale))
        self.version += 1
        for replica in self.fleet:
            replica.advance(self.now)
            replica.stalled_until = max(replica.stalled_until, self.now) + self.sync_s
            self._plan(replica)
        self._at(self.now + self.sync_s, self._synced)

    def _synced(self) -> None:
        self.training, self.free_since = False, self.now
        self._ask()
        self._train()

    def _fail(self, replica: _Replica) -> None:
        self._at(self.now + REPAIR_S + self.draw.expovariate(self.failures_per_s), self._fail, replica)
        self.failures += 1
        if self.failures > len(self.length):
            raise UserError("servers fail so often that samples hardly ever end: give more --hours-between-failures")
        replica.advance(self.now)
        for end, sample, _ in replica.running:
            self.lost += self.length[sample] - (end - replica.progress)
            self.queue.appendleft(sample)
        replica.running, replica.context, replica.stalled_until, replica.down = [], 0.0, 0.0, True
        self._plan(replica)
        self._at(self.now + REPAIR_S, self._back, replica)
        self._fill()

    def _back(self, replica: _Replica) -> None:
        replica.down = False
        self._fill()

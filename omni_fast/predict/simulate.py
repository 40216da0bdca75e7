"""A run of some steps, event by event: servers that decode samples of unequal length, one trainer, a bound on staleness, failures.

All samples of a server advance together, one token a decoding step, whose time follows from the rows and cache it has then. A
sample waits in one queue until a server has a slot. As in `omni_fast.ahead`, the samples of a step are asked for when the step
`staleness` before it begins, and a step trains its own samples, when all of them are there. A sync pauses every server. A server that fails loses its samples, which start again elsewhere, and is back
after `REPAIR_S`. GPUs that generate and train in turns are servers on all of them with staleness 0.

Limits: rewards take no time; a group's samples may land on several servers and its prompt is charged once; cache that runs out in the
middle (retraction) is not modelled, the slots are what fits at mean length.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from statistics import NormalDist, fmean

from omni_fast.errors import UserError
from omni_fast.predict.step import Server, Work

REPAIR_S = 300.0  # a server that failed: found, started, loaded


@dataclass(frozen=True)
class Timing:
    """Means over the steps that count. lost_tokens: a step's, by failures. waiting: the trainer had not all samples of its step. generate: from a step's
    first sample to the last it needs. tail: from nine tenths of its samples done to all. idle: share of the servers' time."""

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
class _Busy:
    """A server: its samples as (progress at which each ends, number), the tokens it holds, and how far all have come."""

    running: list[tuple[float, int]] = field(default_factory=list)
    progress: float = 0.0
    context: float = 0.0
    since: float = 0.0
    stalled_until: float = 0.0
    step_s: float = 0.0
    epoch: int = 0
    down: bool = False
    busy_s: float = 0.0


def lengths(work: Work, count: int, draw: random.Random) -> list[float]:
    """Log-normal with the work's spread, cut at the limit, scaled so that the mean of the cut ones is the work's."""
    sigma = math.sqrt(math.log1p(work.spread**2))
    grid = [NormalDist().inv_cdf((n + 0.5) / 400) for n in range(400)]

    def cut(scale: float, z: float) -> float:
        return min(float(work.max_new_tokens), max(1.0, scale * math.exp(sigma * z)))

    low, high = 1e-3, 1e3 * work.max_new_tokens
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fmean(cut(middle, z) for z in grid) < work.new_tokens else (low, middle)
    return [cut(low, draw.gauss(0.0, 1.0)) for _ in range(count)]


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
        self.slots, batch = self.server.slots(self.work), self.work.batch
        assert self.slots > 0
        self.draw = random.Random(self.seed)
        self.uncounted = 1 + 2 * self.staleness
        count = (self.uncounted + self.steps + self.staleness + 1) * batch
        self.length = lengths(self.work, count, self.draw)
        self.started_version = [0] * count
        self.started_at = [math.inf] * count
        self.finished_at = [math.inf] * count
        self.left = [batch] * (count // batch)  # unfinished samples of each step
        self.fleet = [_Busy() for _ in range(self.servers)]
        self.queue: deque[int] = deque()
        self.events: list[tuple[float, int, str, int, int]] = []
        self.number = self.admitted = self.version = self.failures = 0
        self.now = self.trainer_free = self.lost = 0.0
        self.training = False

    def run(self) -> Timing:
        done: list[tuple[float, float, float, float, float]] = []  # at, waited, generate, tail, staleness
        if self.failures_per_s:
            for place in range(len(self.fleet)):
                self._at(self.now + self.draw.expovariate(self.failures_per_s), "fail", place)
        self._admit()
        begun = 0.0
        while len(done) < self.uncounted + self.steps:
            self.now, _, what, place, epoch = heapq.heappop(self.events)
            busy = self.fleet[place]
            if what == "finish" and epoch == busy.epoch:
                self._advance(busy)
                self._finish(busy)
                self._fill()
                self._plan(place)
            elif what == "fail":
                self._fail(place)
            elif what == "back":
                busy.down, busy.since = False, self.now
                self._fill()
            elif what == "trained":
                self.training = False
                self.version += 1
                self._pause()
                batch = self._samples(self.version - 1)
                samples = sorted(self.finished_at[sample] for sample in batch)
                start = min(self.started_at[sample] for sample in batch)
                late = [self.version - 1 - self.started_version[sample] for sample in batch]
                done.append((self.now + self.sync_s, begun - self.trainer_free, samples[-1] - start,
                             samples[-1] - samples[int(0.9 * (len(samples) - 1))], fmean(late)))  # fmt: skip
                self.trainer_free = self.now + self.sync_s
                self._at(self.trainer_free, "synced", 0)
            elif what == "synced":
                self._admit()
            if not self.training and self.now >= self.trainer_free and not self.left[self.version]:
                self.training, begun = True, self.now
                self._at(self.now + self.update_s, "trained", 0)
        for place in range(len(self.fleet)):
            self._advance(self.fleet[place])
        counted = done[self.uncounted :]
        span = done[-1][0] - done[self.uncounted - 1][0]
        return Timing(
            step=span / len(counted),
            waiting=fmean(row[1] for row in counted),
            update=self.update_s,
            sync=self.sync_s,
            generate=fmean(row[2] for row in counted),
            tail=fmean(row[3] for row in counted),
            idle=1 - sum(busy.busy_s for busy in self.fleet) / (len(self.fleet) * self.now),
            staleness=fmean(row[4] for row in counted),
            lost_tokens=self.lost / len(done),
        )

    def _samples(self, step: int) -> range:
        return range(step * self.work.batch, (step + 1) * self.work.batch)

    def _at(self, time: float, what: str, place: int, epoch: int = 0) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, place, epoch))

    def _admit(self) -> None:
        """Steps up to the bound on staleness."""
        limit = min(self.staleness + self.version + 1, len(self.left))
        while self.admitted < limit:
            self.queue.extend(self._samples(self.admitted))
            self.admitted += 1
        self._fill()

    def _fill(self) -> None:
        """Waiting samples to the servers with the fewest."""
        if not self.queue:
            return
        free = [(len(busy.running), place) for place, busy in enumerate(self.fleet) if not busy.down]
        heapq.heapify(free)
        touched: dict[int, int] = {}
        while self.queue and free and free[0][0] < self.slots:
            rows, place = heapq.heappop(free)
            busy = self.fleet[place]
            if place not in touched:
                self._advance(busy)
            touched[place] = touched.get(place, 0) + 1
            sample = self.queue.popleft()
            self.started_version[sample] = self.version
            self.started_at[sample] = min(self.started_at[sample], self.now)
            heapq.heappush(busy.running, (busy.progress + self.length[sample], sample))
            busy.context += self._prompt
            heapq.heappush(free, (rows + 1, place))
        for place, count in touched.items():
            seconds = self.server.prefill_s(count * self._prompt, self.work.prompt_tokens)
            busy = self.fleet[place]
            busy.stalled_until = max(busy.stalled_until, self.now) + seconds
            self._plan(place)

    @property
    def _prompt(self) -> float:  # cached and computed tokens that a sample brings
        return self.work.prompt_tokens / (self.work.samples if self.work.shared else 1)

    def _advance(self, busy: _Busy) -> None:
        """Bring a server up to now at the pace it has had since the last event."""
        since, busy.since = busy.since, self.now
        if busy.running and not busy.down:
            busy.busy_s += self.now - since
            moved = max(0.0, self.now - max(since, busy.stalled_until)) / busy.step_s if busy.step_s else 0.0
            busy.progress += moved
            busy.context += moved * len(busy.running)

    def _plan(self, place: int) -> None:
        """The server's pace from now on, and its next end of a sample."""
        busy = self.fleet[place]
        busy.epoch += 1
        if busy.running and not busy.down:
            ahead = busy.running[0][0] - busy.progress
            context = busy.context + len(busy.running) * ahead / 2
            busy.step_s = self.server.decode_s(len(busy.running), context)
            self._at(max(self.now, busy.stalled_until) + max(0.0, ahead) * busy.step_s, "finish", place, busy.epoch)

    def _finish(self, busy: _Busy) -> None:
        _, sample = heapq.heappop(busy.running)
        busy.context -= self._prompt + self.length[sample]
        self.finished_at[sample] = self.now
        self.left[sample // self.work.batch] -= 1

    def _pause(self) -> None:
        for place, busy in enumerate(self.fleet):
            self._advance(busy)
            busy.stalled_until = max(busy.stalled_until, self.now) + self.sync_s
            self._plan(place)

    def _fail(self, place: int) -> None:
        busy = self.fleet[place]
        self._at(self.now + REPAIR_S + self.draw.expovariate(self.failures_per_s), "fail", place)
        if busy.down:
            return
        self.failures += 1
        if self.failures > len(self.length):
            raise UserError("servers fail so often that samples hardly ever end: give more --hours-between-failures")
        self._advance(busy)
        for end, sample in busy.running:
            self.lost += self.length[sample] - (end - busy.progress)
            self.queue.appendleft(sample)
        self.fleet[place] = _Busy(
            progress=busy.progress, since=self.now, epoch=busy.epoch + 1, down=True, busy_s=busy.busy_s
        )
        self._at(self.now + REPAIR_S, "back", place)
        self._fill()

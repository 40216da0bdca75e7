"""Scores while the engine still generates, and the pause when nothing can give them.

A group is scored as one unit as soon as its last sample is complete: its hidden tests are drawn once for all its samples,
its questions to a judge go out together, and its scores depend on nothing else that is scored meanwhile. So a run gives
the same numbers however the work overlaps. Every task has a thread of its own: a slow judge holds up no sandbox.

What the infrastructure could not score is invalid, never 0. A task that loses more than `max_invalid` of a step's samples
that way pauses the run: one line says what it waits for and how long at most; the affected groups are asked again now
and then, and the run goes on with the scores it would have had. After `pause_s` it stops, resumable.
"""

from __future__ import annotations

import threading
import time
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue

from omni_fast.config import RewardsConfig
from omni_fast.errors import RunError
from omni_fast.groups import Group, by_task
from omni_fast.progress import Progress
from omni_fast.rewards.score import Part, Score
from omni_fast.tasks.base import Task

RETRY_S, MAX_RETRY_S = 1.0, 15.0  # between two rounds of a pause
STOP_S = 5.0  # a user who wants to stop waits this long for scores under way


class Scorer:
    """`submit` groups as they are complete, from any thread; `finish` a step's from the training thread."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        limits: RewardsConfig,
        progress: Progress,
        raise_if_stopping: Callable[[], None] = lambda: None,
        hold: bool = False,
    ) -> None:
        """hold: score a step's groups only when all are complete, for a judge whose server must not generate meanwhile."""
        self.tasks, self.limits, self.progress, self.raise_if_stopping = tasks, limits, progress, raise_if_stopping
        self.hold = hold
        self._jobs: dict[str, SimpleQueue[tuple[Future[float], Group] | None]] = {name: SimpleQueue() for name in tasks}
        for name in tasks:
            threading.Thread(target=self._work, args=(name,), name=f"score-{name}", daemon=True).start()
        self._down: set[str] = set()  # tasks whose later groups are not asked: they would only wait for the same server

    def submit(self, group: Group) -> None:
        """Score a group whose samples are complete."""
        if not self.hold:
            group.scoring = self._ask(group)

    def finish(self, groups: Sequence[Group]) -> float:
        """Wait until these groups, all of them submitted, have their scores; returns the seconds that scoring took.

        Raises RunError when too many samples stay without a score for `pause_s`, or the user stops meanwhile.
        """
        self.progress.wait(f"the rewards of {sum(len(group.samples) for group in groups)} samples")
        work = self._wait([group.scoring or self._ask(group) for group in groups]) + self._outlast(groups)
        self._down.clear()
        return work

    def close(self) -> None:
        """What is under way ends by itself, the rest is dropped."""
        for jobs in self._jobs.values():
            with suppress(Empty):
                while True:
                    jobs.get_nowait()
            jobs.put(None)

    def _ask(self, group: Group) -> Future[float]:
        job: Future[float] = Future()
        self._jobs[group.draw.task].put((job, group))
        return job

    def _work(self, name: str) -> None:
        """The task's thread: a group after the other. Ends with the process even where a task's own code never returns."""
        while (taken := self._jobs[name].get()) is not None:
            job, group = taken
            try:
                job.set_result(self._score(group))
            except (Exception, CancelledError) as error:  # of a closed judge, or any; told to whoever waits
                job.set_exception(error)

    def _score(self, group: Group) -> float:
        """Returns the seconds it took."""
        start, name = time.perf_counter(), group.draw.task
        task = self.tasks[name]
        if name in self._down:
            skipped = {part: Part(None, "not_asked") for part in task.composition.weights}
            group.scores = group.scores or [Score(skipped) for _ in group.texts]
            return 0.0
        group.scores = task.score([group.item] * len(group.texts), group.texts)
        if self._lost([group]):
            self._down.add(name)
        return time.perf_counter() - start

    def _outlast(self, groups: Sequence[Group]) -> float:
        """Ask again for what is lost until it is little enough; returns the seconds that the asking took."""
        start, gap, work = time.monotonic(), RETRY_S, 0.0
        if lost := self._lost(groups):
            limit = f"Nothing is scored 0 for it; waiting up to {self.limits.pause_s:.0f} s (rewards.pause_s)"
            self.progress.warn(f"paused: {_told(lost)}. {limit} for it to come back")
        while lost:
            spent = time.monotonic() - start
            if spent >= self.limits.pause_s:
                stopped = f"{_told(lost)}, and that for {spent:.0f} s: stopped before the step, nothing is lost"
                raise RunError(f"{stopped}. Bring back what scores them, and run the same command again")
            self.progress.wait(f"scores of {', '.join(lost)}, {self.limits.pause_s - spent:.0f} s before it stops")
            end = time.monotonic() + min(gap, self.limits.pause_s - spent)
            while time.monotonic() < end:
                self.raise_if_stopping()
                time.sleep(0.05)
            gap = min(2 * gap, MAX_RETRY_S)
            self._down.clear()
            missing = [one for members in lost.values() for one in members if not all(s.valid for s in one.scores)]
            work += self._wait([self._ask(group) for group in missing])
            if not (lost := self._lost(groups)):
                self.progress.say(f"  scores are there again after {time.monotonic() - start:.0f} s; the run goes on")
        return work

    def _lost(self, groups: Iterable[Group]) -> dict[str, list[Group]]:
        """The tasks that lost too many samples, with their groups."""
        found = {}
        for name, members in by_task(groups).items():
            scores = [score for group in members for score in group.scores]
            if sum(not score.valid for score in scores) > self.limits.max_invalid * len(scores):
                found[name] = members
        return found

    def _wait(self, jobs: Sequence[Future[float]]) -> float:
        """Until all are done; the sum of their results."""
        pending, end = set(jobs), 0.0
        while pending:
            pending = wait(pending, timeout=0.2).not_done
            try:
                self.raise_if_stopping()
            except RunError:
                end = end or time.monotonic() + STOP_S
                if pending and time.monotonic() > end:
                    raise
        return sum(job.result() for job in jobs)


def _told(lost: Mapping[str, Sequence[Group]]) -> str:
    """ "writing: 64 of 96 samples of this step could not be scored (judge_unreachable)"."""
    texts = []
    for name, members in lost.items():
        scores = [score for group in members for score in group.scores]
        reasons = Counter(part.reason for score in scores for part in score.parts.values() if not part.valid)
        reasons.pop("not_asked", None)
        count = sum(not score.valid for score in scores)
        texts.append(f"{name}: {count} of {len(scores)} samples could not be scored ({', '.join(sorted(reasons))})")
    return "; ".join(texts)

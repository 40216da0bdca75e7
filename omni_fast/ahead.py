"""The groups of a stage, step by step, those of the next steps under way while one is scored and trained.

The groups of step s are asked for when step s - `max_staleness` begins, never earlier. A step makes one weight version and
the engine takes no token older than the weights that a group was asked under, so no sample is more than `max_staleness`
versions behind the policy that it trains; that is checked once more before each update. Steps train their own groups, in
the order of the prompt stream: which prompts a step has does not depend on what was quick.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass

from omni_fast.build import Parts
from omni_fast.curriculum.stages import PromptStream, Stage, StreamState
from omni_fast.errors import RunError
from omni_fast.groups import Group, staleness
from omni_fast.rollout.engine import Rollout


@dataclass(frozen=True, slots=True)
class _Batch:
    """The groups of a step. before: the stream before they were drawn, where a resume draws them again."""

    groups: list[Group]
    rollouts: list[Rollout]
    before: StreamState


class Ahead(AbstractContextManager["Ahead"]):
    """Context manager; leaving it gives up what is under way."""

    def __init__(self, parts: Parts, stage: Stage, stream: PromptStream, done: int) -> None:
        """stream: after the prompts of the first `done` steps."""
        self.parts, self.stage, self.stream = parts, stage, stream
        self.bound = parts.config.rollout.max_staleness
        self.step = done  # the last step that is trained
        self._under_way: deque[_Batch] = deque()
        self._staleness: dict[str, float] = {}

    def __exit__(self, *error: object) -> None:
        for batch in self._under_way:
            for rollout in batch.rollouts:
                rollout.cancel()

    @property
    def state(self) -> StreamState:
        """The prompt stream after the prompts that were trained: those under way are drawn again by a resume."""
        return self._under_way[0].before if self._under_way else self.stream.state_dict()

    def next(self) -> list[Group]:
        """The groups of the next step with their samples; asks for all that may be under way meanwhile.

        Raises RunError where a sample is older than allowed, and what the engine raises.
        """
        while len(self._under_way) < min(1 + self.bound, self.stage.steps - self.step):
            self._ask()
        batch = self._under_way[0]
        for rollout in batch.rollouts:
            rollout.wait(self.parts.progress.generating)
        self._staleness = staleness(batch.groups, self.parts.engine.version)
        behind = self._staleness["staleness_max"]
        if behind > self.bound:
            old = f"a sample of step {self.step + 1} is {behind:.0f} weight versions old"
            raise RunError(f"{old} and rollout.max_staleness is {self.bound}: a bug of ours; the same command resumes")
        return batch.groups

    def done(self) -> dict[str, float]:
        """The groups of `next` have been trained; returns how old they were (`groups.staleness`)."""
        self._under_way.popleft()
        self.step += 1
        return self._staleness

    def _ask(self) -> None:
        before = self.stream.state_dict()
        groups = [self.parts.group(draw) for draw in self.stream.draw(self.parts.config.rollout.prompts_per_step)]
        batch = _Batch(groups, [], before)
        self._under_way.append(batch)  # before anything can fail: a resume draws these prompts again
        number = self.step + len(self._under_way)
        batch.rollouts.extend(self.parts.start(groups, f"{'+'.join(self.stage.own)}:{number}"))

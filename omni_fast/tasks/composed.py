"""A task whose reward is put together as the config says, from its own parts and those that any task can have."""

from __future__ import annotations

from collections.abc import Sequence

from omni_fast.config import RewardConfig
from omni_fast.errors import UserError
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.parts import EXTRA
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import Item, Split, Task


class Composed:
    """A task whose reward is put together as the config says; everything else is the task's own."""

    def __init__(self, task: Task, composition: Composition) -> None:
        self.task, self.composition = task, composition
        self.name, self.system, self.max_new_tokens = task.name, task.system, task.max_new_tokens
        self._extra = {name: EXTRA[name] for name in composition.weights if name not in task.composition.weights}

    def items(self, split: Split) -> Sequence[Item]:
        return self.task.items(split)

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        scores = self.task.score(items, completions)
        return [
            Score({**score.parts, **{name: part(text) for name, part in self._extra.items()}})
            for score, text in zip(scores, completions, strict=True)
        ]

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return self.task.metric(items, completions)


def composed(task: Task, reward: RewardConfig) -> Task:
    """The task with the config's composition. Raises UserError for a part that nothing gives."""
    if reward.kind == "own":
        return task
    known = [*task.composition.weights, *EXTRA]
    if unknown := sorted(set(reward.weights) - set(known)):
        parts = f"task '{task.name}': reward.weights names {', '.join(unknown)}"
        raise UserError(f"{parts}; the parts there are: {', '.join(known)}")
    return Composed(task, Composition(reward.kind, reward.weights, reward.gate or None, reward.gate_threshold))

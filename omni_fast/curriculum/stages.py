"""Stages, and the stream of prompts a stage draws from.

A stage trains one task for its steps, unless a replay fraction mixes in the tasks before it, or the mode is `joint`.
`PromptStream` is where prompts come from: per task a sequence of epochs, each a permutation that depends on the seed,
the task's name and the epoch alone. Its whole state is how many prompts were taken, so a resume neither loses nor
repeats one, and a task's stream is the same in a single-task run, in a curriculum stage and in joint training.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from omni_fast.curriculum.order import random_order
from omni_fast.curriculum.scores import Estimate
from omni_fast.errors import UserError

Mode = Literal["curriculum", "order", "reversed", "random", "joint"]


class Stage(NamedTuple):
    """Some steps on one task, or on several with shares.

    name: unique in the run, for example "single:math", "curriculum:1:code", "joint", "refresh:math".
    tasks, weights: what is drawn and in which shares (they sum to 1); tasks[0] is the stage's own task unless it is
    joint.
    steps: optimiser steps.
    """

    name: str
    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    steps: int
    joint: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """The tasks this stage is about: all of them if joint, else the first (the others are replay)."""
        return self.tasks if self.joint else self.tasks[:1]


def build_stages(
    mode: Mode,
    tasks: Sequence[str],
    steps: int,
    *,
    order: Sequence[str] = (),
    seed: int = 0,
    replay: float = 0.0,
    weights: Mapping[str, float],
) -> list[Stage]:
    """The stages of a run, of so many steps for each task; every mode takes the same number in total.

    order: the solved order for `curriculum` and `reversed`, the user's for `order`; unused by `random` (seed) and `joint`.
    replay: share of each later stage's prompts that go, in equal parts, to the tasks already trained (0 <= replay < 1).
    weights: of the tasks in `joint`, above 0.
    """
    if mode == "joint":
        total = sum(weights[task] for task in tasks)
        shares = tuple(weights[task] / total for task in tasks)
        return [Stage("joint", tuple(tasks), shares, steps * len(tasks), joint=True)]
    if mode == "random":
        names = [tasks[i] for i in random_order(len(tasks), seed)]
    else:
        names = list(reversed(order)) if mode == "reversed" else list(order)
    stages = []
    for place, task in enumerate(names):
        earlier = names[:place] if replay > 0 else []
        shares = (1.0 - replay if earlier else 1.0, *(replay / len(earlier) for _ in earlier))
        stages.append(Stage(f"{mode}:{place + 1}:{task}", (task, *earlier), shares, steps))
    return stages


def fell_furthest(after_own: Mapping[str, Estimate], final: Mapping[str, Estimate]) -> str | None:
    """The task that fell furthest since its own stage (scores on `select`), which a refresh trains; None when none fell."""
    drops = {task: after_own[task].value - final[task].value for task in after_own}
    worst = max(drops, key=lambda task: drops[task])
    return worst if drops[worst] > 0 else None


class Draw(NamedTuple):
    """One prompt to train on.

    item: its index in the task's train split.
    position: how many prompts of the task were taken before; with the task's name it keys the sampling seed.
    """

    task: str
    item: int
    position: int


class StreamState(TypedDict):
    """What a resume needs; counts of prompts only."""

    taken: dict[str, int]


@lru_cache(maxsize=32)
def _epoch(seed: int, task: str, epoch: int, size: int) -> NDArray[np.int64]:
    """The order in which an epoch takes the items of a task."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), epoch]).permutation(size)


class PromptStream:
    """A seeded, resumable source of train-item indices for one stage.

    sizes: items per task.   tasks, weights: as in `Stage`.
    Shares are kept exactly: each prompt goes to the task that is furthest behind its share, so after any number of
    prompts no task is off by a whole prompt (two tasks) or by more than K - 1 (many).
    """

    def __init__(self, sizes: Mapping[str, int], tasks: Sequence[str], weights: Sequence[float], seed: int) -> None:
        for task in tasks:
            if sizes[task] < 1:
                raise UserError(f"Task '{task}' has no training prompts; give it data or take it out of the tasks.")
        self.sizes = {task: sizes[task] for task in tasks}
        self.weights = dict(zip(tasks, weights, strict=True))
        self.seed = seed
        self.taken = dict.fromkeys(tasks, 0)

    def draw(self, n: int) -> list[Draw]:
        """The next n prompts in the stage's shares."""
        out: list[Draw] = []
        for _ in range(n):
            count = sum(self.taken.values()) + 1
            out.append(self.take(max(self.weights, key=lambda task: self.weights[task] * count - self.taken[task])))
        return out

    def take(self, task: str) -> Draw:
        """The next prompt of one task."""
        position = self.taken[task]
        epoch, offset = divmod(position, self.sizes[task])
        self.taken[task] = position + 1
        return Draw(task, int(_epoch(self.seed, task, epoch, self.sizes[task])[offset]), position)

    def state_dict(self) -> StreamState:
        """Counts of prompts taken, JSON-ready."""
        return StreamState(taken=dict(self.taken))

    def load_state_dict(self, state: StreamState) -> None:
        """Continue where `state_dict` was taken, with the same seed and data."""
        self.taken = {task: state["taken"][task] for task in self.sizes}

"""Three disjoint splits, the same for the same seed on every machine, and what the built-in domains do with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from omni_fast.config import TaskConfig
from omni_fast.errors import UserError
from omni_fast.rewards.compose import Composition
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import SPLITS, Item, Resources, Split

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many items each split holds."""

    train: int = 448
    select: int = 64
    test: int = 128


def partition(things: Sequence[T], shares: Mapping[Split, float], rng: random.Random) -> dict[Split, list[T]]:
    """Shuffle and cut by shares (which sum to 1): no thing is in two splits. Each split gets at least one."""
    order = list(things)
    rng.shuffle(order)
    select = max(1, round(shares["select"] * len(order)))
    test = max(1, round(shares["test"] * len(order)))
    return {"test": order[:test], "select": order[test : test + select], "train": order[test + select :]}


@dataclass(frozen=True, slots=True)
class Level:
    """system: message of the chat template. pools: seed -> the items of each split, as many as `sizes` or more."""

    sizes: Sizes
    system: str
    pools: Callable[[int], Mapping[Split, Sequence[Item]]]


class BuiltIn:
    """What the built-in domains share of the `Task` interface. A subclass states its kind, its part and its levels."""

    kind: ClassVar[str]
    part: ClassVar[str]
    levels: ClassVar[Mapping[str, Level]]

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        """Raises UserError for a level that there is not."""
        self.name, self.seed, self.level, self.max_new_tokens = block.name, seed, block.level, block.max_new_tokens
        if self.level not in self.levels:
            raise UserError(f"{self.kind} has no level {self.level!r}; use one of {', '.join(self.levels)}")
        own = self.levels[self.level]
        self.system = own.system if block.system is None else block.system
        self.composition = Composition("additive", {self.part: 1.0})
        pools = own.pools(seed)
        self._items = {split: tuple(pools[split][: getattr(own.sizes, split)]) for split in SPLITS}

    def items(self, split: Split) -> Sequence[Item]:
        return self._items[split]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        raise NotImplementedError

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        """A right and a wrong reply to one of the train items of "tiny", to warm up a from-scratch model."""
        raise NotImplementedError

    def metric(self, items: Sequence[Item], completions: Sequence[str]) -> list[float | None]:
        return [score.parts[self.part].value for score in self.score(items, completions)]

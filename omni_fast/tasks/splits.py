"""Three disjoint splits, the same for the same seed on every machine."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from omni_fast.errors import UserError
from omni_fast.tasks.base import SPLITS, Item, Split

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


def take(task: str, pools: Mapping[Split, Sequence[Item]], sizes: Sizes) -> dict[Split, tuple[Item, ...]]:
    """The first items of each pool. Raises UserError when a pool is smaller than its size."""
    wanted = {"train": sizes.train, "select": sizes.select, "test": sizes.test}
    for split in SPLITS:
        if len(pools[split]) < wanted[split]:
            raise UserError(
                f"task '{task}' has {len(pools[split])} items for split '{split}', {wanted[split]} were asked for; "
                "ask for fewer"
            )
    return {split: tuple(pools[split][: wanted[split]]) for split in SPLITS}

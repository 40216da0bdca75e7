"""Small arithmetic: "What is 7 + 5?", graded by the number the reply commits to.

Why this and not GSM8K: a group whose samples are all wrong teaches nothing, and a 135M model has signal only here.
Splits share no pair of operands: {5, 7} is in one split with all its operations and orders, so a held-out gain is not
recall. Level "tiny" is one-digit sums.
Limits: integers; what a reply says before its last number is not read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import combinations_with_replacement

from omni_fast.config import TaskConfig
from omni_fast.rewards.score import Score
from omni_fast.tasks.base import Item, Resources, Split
from omni_fast.tasks.splits import BuiltIn, Level, Sizes, partition

_ASKED = ("What is {a} {op} {b}?", "How much is {a} {op} {b}?", "Work out {a} {op} {b}.", "Compute {a} {op} {b}.")
_WORDINGS = tuple(f"{asked} Answer with just the number." for asked in _ASKED)
_TINY_WORDINGS = ("{a}{op}{b}=",)
_SIZES = Sizes(train=448, select=48, test=120)
_TINY_SIZES = Sizes(train=60, select=20, test=50)


def _arithmetic(seed: int, tiny: bool = False) -> dict[Split, list[Item]]:
    """All problems over the level's operands, cut by pair of operands.

    Training meets every problem in all wordings; a held-out problem has one, so that its items are independent.
    """
    rng = random.Random(f"math:{'tiny' if tiny else 'default'}:{seed}")
    wordings = _TINY_WORDINGS if tiny else _WORDINGS
    pools: dict[Split, list[Item]] = {}
    pairs = list(combinations_with_replacement(range(10) if tiny else range(1, 14), 2))
    for split, own in partition(pairs, {"train": 0.42, "select": 0.18, "test": 0.4}, rng).items():
        asked = [
            (problem, wording)
            for pair in own
            for problem in _problems(*pair, tiny=tiny)
            for wording in (wordings if split == "train" else (rng.choice(wordings),))
        ]
        rng.shuffle(asked)
        pools[split] = [
            Item(f"{a}{op}{b}/{wordings.index(wording)}", wording.format(a=a, op=op, b=b), {"gold": str(result)})
            for (a, op, b, result), wording in asked[: _TINY_SIZES.train if tiny else None]
        ]
    return pools


def _problems(low: int, high: int, tiny: bool) -> list[tuple[int, str, int, int]]:
    """Every problem with these two operands, low <= high; products only where both are in 2..10.

    Without those whose result is the second operand, outside of "tiny": there an echo of the prompt would be right.
    """
    found = {(low, "+", high, low + high), (high, "+", low, low + high), (high, "-", low, high - low)}
    if tiny:
        return sorted(found)
    if low >= 2 and high <= 10:
        found |= {(low, "*", high, low * high), (high, "*", low, low * high)}
    return sorted(problem for problem in found if problem[3] != problem[2])


class MathTask(BuiltIn):
    """Part `correct`: 1 when the final number equals the result. The metric is the same."""

    kind = "math"
    part = "correct"
    levels = {
        "default": Level(_SIZES, "You are a calculator.", _arithmetic),
        "tiny": Level(_TINY_SIZES, "", partial(_arithmetic, tiny=True)),
    }

    def __init__(self, block: TaskConfig, seed: int, resources: Resources) -> None:
        super().__init__(block, seed, resources)
        self.verifier = resources.math()

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[Score]:
        golds = [str(item.answer["gold"]) for item in items]
        return [Score({"correct": part}) for part in self.verifier.score(completions, golds)]

    @staticmethod
    def demonstrate(item: Item, items: Sequence[Item], rng: random.Random) -> tuple[str, str]:
        gold = str(item.answer["gold"])
        return gold, rng.choice([str(n) for n in range(19) if str(n) != gold])

"""The operations that the code domain asks for, and how inputs for them are drawn.

An operation is one line of Python with a plain description. `{k}` is a small constant, so that one operation gives
several functions. The table is data (`operations.txt`). References are ours, hence trusted, and run in this process;
what a model writes never does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from omni_fast.rewards.sandbox import Data

WORDS = (
    "apple", "river", "stone", "cloud", "garden", "winter", "silver", "market", "candle", "forest", "level", "banana",
    "kayak", "yellow", "pepper", "island", "mirror", "rocket", "noon", "cotton",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operation:
    """name: unique. arguments: one letter each (see `draw`). text: what is returned. expression: the reference.

    constants: values of `{k}`; empty where there is no constant.
    """

    name: str
    arguments: str
    text: str
    expression: str
    constants: tuple[int | str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameter names: by kind for one argument, a, b, c for several."""
        single = {"i": "n", "p": "n", "s": "s", "w": "s", "l": "items"}
        return (single[self.arguments],) if len(self.arguments) == 1 else tuple("abc"[: len(self.arguments)])


def draw(kind: str, rng: random.Random) -> Data:
    """One input. i: -20..20, p: 1..20, w: a word, s: a phrase of one to three words, l: one to six integers -9..9."""
    if kind == "i":
        return rng.randint(-20, 20)
    if kind == "p":
        return rng.randint(1, 20)
    if kind == "w":
        return rng.choice(WORDS)
    if kind == "s":
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))
    return [rng.randint(-9, 9) for _ in range(rng.randint(1, 6))]


@lru_cache(maxsize=4096)
def reference(parameters: tuple[str, ...], expression: str) -> Callable[..., Data]:
    """The reference as a callable. Its source is a line of the table, never a model's."""
    function: Callable[..., Data] = eval(f"lambda {', '.join(parameters)}: {expression}")  # noqa: S307
    return function


def _read(line: str) -> Operation:
    name, arguments, text, expression, *rest = line.split(" | ")
    constants = tuple(int(k) if k.isdigit() else k for k in "".join(rest).split())
    return Operation(name, arguments, text, expression, constants)


OPERATIONS = tuple(
    _read(line)
    for line in files("omni_fast.tasks").joinpath("operations.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)

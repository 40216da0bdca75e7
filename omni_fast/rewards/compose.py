"""From a score to one number: composition of parts, advantages inside a group, statistics.

A task declares how the parts of its score become one reward. Three ways:

additive    sum of weight x part.
gated       the gate part always counts; every other part counts only where the gate reaches its threshold, so that an
            easy part (format) cannot be farmed without the hard one (correct).
normalised  each part is normalised inside the group before it is summed (GDPO, arXiv 2601.05242): summing first maps
            different reward vectors to the same advantage, and lets the part with the largest spread drown the others.

Invalid samples leave their group; a group with fewer than two valid samples is dropped. Neither is ever scored 0.
Limits: everything here is plain Python on groups of some tens of samples; it is not meant for tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omni_fast.errors import UserError
from omni_fast.rewards.score import Score

MAX_WEIGHT = 1e6  # squares of sums stay numbers
ZERO_STD = 1e-6  # a spread below this is rounding noise: dividing by it would turn noise into a full-size advantage


@dataclass(frozen=True)
class Composition:
    """How the parts of a score become one reward.

    kind: "additive", "gated" or "normalised" (see the module).
    weights: part name -> weight. A part that is not named is recorded and does not count.
    gate, gate_threshold: for "gated" alone: the part that must reach the threshold before the others count.
    """

    kind: Literal["additive", "gated", "normalised"]
    weights: Mapping[str, float]
    gate: str | None = None
    gate_threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("additive", "gated", "normalised"):
            raise UserError(f"composition kind {self.kind!r} is unknown; use additive, gated or normalised")
        if not self.weights:
            raise UserError("a composition needs at least one weight; name the parts that count and their weights")
        if not all(abs(number) <= MAX_WEIGHT for number in (*self.weights.values(), self.gate_threshold)):  # nor NaN
            given = f"{dict(self.weights)} and {self.gate_threshold}"
            raise UserError(f"weights and gate_threshold must be numbers within {MAX_WEIGHT:g}, got {given}")
        if self.kind == "gated" and self.gate not in self.weights:
            names = sorted(self.weights)
            raise UserError(f"a gated composition needs `gate` to be one of its weights {names}, got {self.gate!r}")
        if self.kind != "gated" and self.gate is not None:
            raise UserError(f"`gate` means something for a gated composition, not for {self.kind}; drop it")


def part_value(score: Score, name: str) -> float:
    """Value of a valid score's part. Raises UserError when the score has no such part."""
    part = score.parts.get(name)
    if part is None or part.value is None:
        raise UserError(f"the composition weighs part {name!r}, the score has {sorted(score.parts)}; name it in both")
    return part.value


def total(score: Score, composition: Composition) -> float | None:
    """The one number of a score; None when the score is invalid.

    For "normalised" this is the weighted sum too: it is what is logged, the advantages are made from the parts.
    """
    if not score.valid:
        return None
    values = {name: part_value(score, name) for name in composition.weights}
    if composition.gate is not None and values[composition.gate] < composition.gate_threshold:
        return composition.weights[composition.gate] * values[composition.gate]
    return sum(weight * values[name] for name, weight in composition.weights.items())


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation of at least one value."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def centre(values: Sequence[float], scale: Literal["std", "none"]) -> list[float]:
    """Values minus their mean, for "std" over the population standard deviation; all 0.0 when they do not differ."""
    mean, std = moments(values)
    if std <= ZERO_STD * max(1.0, abs(mean)):
        return [0.0] * len(values)
    return [(value - mean) / (std if scale == "std" else 1.0) for value in values]


def group_advantages(
    scores: Sequence[Score], composition: Composition, scale: Literal["std", "none"] = "std"
) -> list[float | None]:
    """Advantages of the samples of one group, in order.

    None for an invalid sample; all None when fewer than two samples are valid; 0.0 where nothing differs.
    scale: "std" divides by the group's standard deviation (GRPO), "none" only centres (Dr. GRPO, arXiv 2503.20783).
    A "normalised" composition always divides each part by its own deviation; the sum of the parts is brought back to a
    common scale over the step by `batch_normalise`.
    """
    valid = [score for score in scores if score.valid]
    if len(valid) < 2:
        return [None] * len(scores)
    if composition.kind == "normalised":
        sums = [0.0] * len(valid)
        for name, weight in composition.weights.items():
            part = centre([part_value(score, name) for score in valid], "std")
            sums = [before + weight * value for before, value in zip(sums, part, strict=True)]
    else:
        sums = centre([value for score in valid if (value := total(score, composition)) is not None], scale)
    advantages = iter(sums)
    return [next(advantages) if score.valid else None for score in scores]


def batch_normalise(groups: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Divide the advantages of a whole step by their standard deviation: the last step of GDPO (arXiv 2601.05242).

    Each group already sums to zero, so there is no mean to take off; groups that do not differ keep their zeros and do
    not enter the deviation, else a step of mostly equal groups would have its few informative ones blown up.
    """
    informative = [value for group in groups if any(group) for value in group if value is not None]
    if not informative:
        return [list(group) for group in groups]
    std = math.sqrt(math.fsum(value * value for value in informative) / len(informative))
    return [[None if value is None else value / std for value in group] for group in groups]


@dataclass(frozen=True, slots=True)
class PartStatistics:
    """One part over many samples. mean, std: over the valid ones, None without any. reasons: every reason but "ok"."""

    mean: float | None
    std: float | None
    reasons: Mapping[str, int]


def part_statistics(scores: Sequence[Score]) -> dict[str, PartStatistics]:
    """Statistics of every part that occurs, by name, in order of first appearance."""
    result: dict[str, PartStatistics] = {}
    for name in dict.fromkeys(name for score in scores for name in score.parts):
        parts = [score.parts[name] for score in scores if name in score.parts]
        values = [part.value for part in parts if part.value is not None]
        mean, std = moments(values) if values else (None, None)
        reasons = Counter(part.reason for part in parts if part.reason != "ok")
        result[name] = PartStatistics(mean, std, dict(reasons))
    return result


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What the groups of a step have to teach.

    reward: mean total over the valid samples, None without any.
    mixed: groups whose totals (for "normalised": any part) differ; only these move the policy.
    dropped: groups left with fewer than two valid samples.
    invalid_reasons: `part:reason` of the invalid parts, counted.
    """

    groups: int
    reward: float | None
    mixed: int
    dropped: int
    invalid: int
    invalid_reasons: Mapping[str, int]

    @property
    def mixed_share(self) -> float:
        """Share of mixed groups among those that were not dropped; 0.0 without any."""
        kept = self.groups - self.dropped
        return self.mixed / kept if kept else 0.0


def group_statistics(groups: Sequence[Sequence[Score]], composition: Composition) -> GroupStatistics:
    """Statistics over the groups of one step or one evaluation."""
    scores = [score for group in groups for score in group]
    totals = [value for score in scores if (value := total(score, composition)) is not None]
    advantages = [group_advantages(group, composition) for group in groups]
    lost = [f"{name}:{part.reason}" for score in scores for name, part in score.parts.items() if not part.valid]
    return GroupStatistics(
        groups=len(groups),
        reward=math.fsum(totals) / len(totals) if totals else None,
        mixed=sum(any(group) for group in advantages),
        dropped=sum(all(value is None for value in group) for group in advantages),
        invalid=len(scores) - len(totals),
        invalid_reasons=dict(Counter(lost)),
    )

"""Scores with n and a 95 % interval, and what a run did to them: backward transfer, forward transfer, forgetting.

An item score is in 0..1, NaN where the infrastructure failed; such an item is left out. Which interval is used:

* one score of 0/1 items, or of items that are all equal: Wilson (honest at 0 and 1, where a bootstrap collapses);
* one score of fractional items: percentile bootstrap over the items;
* differences, averages of differences and BWT: paired percentile bootstrap, every task's items resampled together in
  all checkpoints that are compared (the tasks are the strata).

Limits: the intervals speak of the items, not of the training seed; with one seed a run's own noise is not in them
(`omni_fast.study` takes several). With items that all agree a paired interval has width 0.
Sources: Wilson 1927; Efron and Tibshirani 1993, ch. 13; BWT after Lopez-Paz and Ranzato 2017, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ItemScores = Mapping[str, Floats]  # task -> item scores [n_items]

DRAWS = 2000
Z95 = 1.959963984540054


class ScoreDict(TypedDict):
    """The JSON form of an estimate; null stands for "not measured"."""

    value: float | None
    n: int
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number, the items behind it and its 95 % interval; all NaN when n is 0."""

    value: float
    n: int
    low: float
    high: float

    def as_dict(self) -> ScoreDict:
        """JSON form: NaN becomes None."""
        value, low, high = (float(x) if math.isfinite(x) else None for x in (self.value, self.low, self.high))
        return {"value": value, "n": self.n, "low": low, "high": high}


NOT_KNOWN = Estimate(math.nan, 0, math.nan, math.nan)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a mean of `n` items in 0..1 (for fractional items wider than needed)."""
    z2 = Z95 * Z95
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def resample(n: int, draws: int, rng: np.random.Generator) -> Floats:
    """Bootstrap weights [draws, n]: row b holds how often each of n items was drawn, divided by n."""
    out = np.empty((draws, n))
    rows = max(1, 1_000_000 // n)  # bounds the memory of the indices; several times faster than a multinomial draw
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        picks = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        out[start : start + count] = np.bincount(picks.ravel(), minlength=count * n).reshape(count, n)
    return out / n


def interval(draws: Floats) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def score(items: Floats) -> Estimate:
    """The mean of one task's item scores, Wilson or bootstrap as the module says."""
    x = _valid(items)
    if x.size == 0:
        return NOT_KNOWN
    mean = float(x.mean())
    if np.all((x == 0) | (x == 1)) or np.ptp(x) == 0:
        low, high = wilson(mean, x.size)
    else:
        low, high = interval(resample(x.size, DRAWS, np.random.default_rng(0)) @ x)
    return Estimate(mean, x.size, min(low, mean), max(high, mean))


def mean_difference(before: ItemScores, after: ItemScores, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Average over the tasks of `before` of the paired difference; n counts items over all tasks.

    A task without one item valid on both sides is an infrastructure failure: the result is then NaN with n = 0, because
    an average over the other tasks would be another quantity.
    """
    rng = np.random.default_rng(seed)
    gains = [_valid(np.asarray(after[task]) - np.asarray(first)) for task, first in before.items()]
    if not all(gain.size for gain in gains):
        return NOT_KNOWN
    drawn = [resample(gain.size, draws, rng) @ gain for gain in gains]
    value = float(np.mean([gain.mean() for gain in gains]))
    return Estimate(value, sum(gain.size for gain in gains), *interval(np.mean(drawn, axis=0)))


def flips(before: Floats, after: Floats) -> tuple[int, int]:
    """(lost, gained): items that went from 1 to 0 and from 0 to 1, a score of 0.5 or more counting as 1.

    A net accuracy of 0 can hide many of both (correct-set turnover).
    """
    first, last = np.asarray(before), np.asarray(after)
    ok = ~(np.isnan(first) | np.isnan(last))
    was, now = first[ok] >= 0.5, last[ok] >= 0.5
    return int((was & ~now).sum()), int((~was & now).sum())


def backward_transfer(rows: Sequence[ItemScores], trained: Sequence[Sequence[str]]) -> Estimate:
    """BWT: mean over the tasks trained before the last stage of final score - score right after the task's own stage.

    rows: item scores of every task, row 0 the initial policy, row s after stage s.
    trained: the tasks of each stage; a task's own stage is the first that trains it (so a refresh counts as recovery).
    NaN with n = 0 when no task was trained before the last one (joint training, one stage).
    """
    own = own_stages(trained)
    last = max(own.values(), default=0)
    return _moved(rows, {task: (stage, -1) for task, stage in own.items() if stage < last})


def forward_transfer(rows: Sequence[ItemScores], trained: Sequence[Sequence[str]]) -> Estimate:
    """Mean over the tasks trained after the first stage of score just before the own stage - initial score."""
    return _moved(rows, {task: (0, stage - 1) for task, stage in own_stages(trained).items() if stage > 1})


def _moved(rows: Sequence[ItemScores], spans: Mapping[str, tuple[int, int]]) -> Estimate:
    """Mean change over tasks, each from one row to another."""
    before, after = ({task: rows[span[side]][task] for task, span in spans.items()} for side in (0, 1))
    return mean_difference(before, after) if spans else NOT_KNOWN


def forgetting(rows: Sequence[ItemScores], trained: Sequence[Sequence[str]]) -> dict[str, float]:
    """Per trained task: best mean score from its own stage on, minus its final one (0: nothing was forgotten).

    The best of several noisy scores is biased upwards, so this reads high by about one standard error.
    """
    out: dict[str, float] = {}
    for task, stage in own_stages(trained).items():
        means = [score(row[task]).value for row in rows[stage:]]
        out[task] = max(means) - means[-1]
    return out


def own_stages(trained: Sequence[Sequence[str]]) -> dict[str, int]:
    """Task -> number (from 1) of the first stage whose main tasks name it."""
    own: dict[str, int] = {}
    for number, tasks in enumerate(trained, start=1):
        for task in tasks:
            own.setdefault(task, number)
    return own


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of the p-values that are known (Holm 1979): reject at alpha what is at most alpha."""
    ranked = sorted((p, name) for name, p in p_values.items() if math.isfinite(p))
    stepped = np.maximum.accumulate([min(1.0, (len(ranked) - rank) * p) for rank, (p, _) in enumerate(ranked)])
    adjusted = {name: float(p) for (_, name), p in zip(ranked, stepped, strict=True)}
    return {name: adjusted[name] for name in p_values if name in adjusted}


def _valid(x: Floats) -> Floats:
    x = np.asarray(x, dtype=np.float64)
    return x[~np.isnan(x)]

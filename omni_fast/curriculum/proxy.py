"""Cheap stand-ins for the measured transfer matrix, and how well they agree with it where both exist.

A short probe run or a sub-sample of the items gives a matrix through `transfer.measure` like any other. Gradient
sketches give
two more without any further evaluation: the cosine between tasks (symmetric, so it can rank effects but never an
order), and the first-order effect of a run on another task, the dot product of the run's weight change with that task's
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.scores import Floats


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a proxy compares with the full matrix over its K (K - 1) effects; NaN where it cannot be computed.

    spearman, kendall: rank correlations of the effects.
    pairs: share of task pairs for which both prefer the same one first (a pair that either leaves open counts half).
    regret: summed score lost, on the full matrix, by the order the proxy leads to.
    """

    n: int
    spearman: float
    kendall: float
    pairs: float
    regret: float


def agreement(full_KK: Floats, proxy_KK: Floats) -> Agreement:
    """Compare a proxy with the measured transfer, both [K, K] over the same tasks; the diagonals are ignored."""
    k = len(full_KK)
    off = ~np.eye(k, dtype=bool)
    x, y = full_KK[off], proxy_KK[off]
    constant = x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
    above = np.triu_indices(k, 1)
    signs = np.sign(_preference(full_KK)[above]) * np.sign(_preference(proxy_KK)[above])
    best = orders.exact(full_KK).value
    return Agreement(
        n=int(x.size),
        spearman=math.nan if constant else float(stats.spearmanr(x, y).statistic),
        kendall=math.nan if constant else float(stats.kendalltau(x, y).statistic),
        pairs=float(np.mean((signs + 1) / 2)) if signs.size else math.nan,
        regret=best - orders.order_value(full_KK, orders.exact(proxy_KK).order),
    )


def cosine_matrix(sketches: Sequence[Floats]) -> Floats:
    """Cosine between the tasks' gradient sketches [K, K]; 0 where a sketch is zero."""
    stack = np.stack(sketches)
    norms = np.linalg.norm(stack, axis=1)
    unit = stack / np.where(norms > 0, norms, 1.0)[:, None]
    return np.asarray(unit @ unit.T)


def first_order_transfer(changes: Sequence[Floats], gradients: Sequence[Floats]) -> Floats:
    """Predicted effect [K, K] of run i on task j: sketch of theta_i - theta_0 dotted with the sketch of j's reward
    gradient.

    Both sketches need the same size, seed and tensor names. In units of reward to first order; only ranks are to be
    trusted.
    """
    return np.asarray(np.stack(changes) @ np.stack(gradients).T)


def _preference(matrix_KK: Floats) -> Floats:
    """Positive at (i, j) where i right before j is better; 0 where the two are equal to rounding."""
    gain = matrix_KK.T - matrix_KK
    return np.where(np.abs(gain) <= orders.TIE, 0.0, gain)

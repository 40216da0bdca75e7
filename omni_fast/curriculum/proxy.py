"""Cheap stand-ins for the measured transfer matrix, and how well they agree with it where both exist.

A short probe run or a sub-sample of the items gives a matrix through `transfer.measure` like any other. Gradient sketches
give one without any further evaluation, the cosine between tasks: symmetric, so it can rank effects but never an order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.scores import Floats


class Agreement(NamedTuple):
    """How a proxy compares with the full matrix over its K (K - 1) effects; NaN where it cannot be computed.

    spearman, kendall: rank correlations of the effects.
    pairs: share of task pairs for which both prefer the same one first (a pair that either leaves open counts half).
    regret: summed score lost, on the full matrix, by the order the proxy leads to.
    """

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
    first = [orders.pairwise_probability(matrix[None])[np.triu_indices(k, 1)] for matrix in (full_KK, proxy_KK)]
    alike = first[0] * first[1] + (1 - first[0]) * (1 - first[1])
    return Agreement(
        spearman=math.nan if constant else float(stats.spearmanr(x, y).statistic),
        kendall=math.nan if constant else float(stats.kendalltau(x, y).statistic),
        pairs=float(np.mean(alike)) if k > 1 else math.nan,
        regret=orders.exact(full_KK).value - float(orders.order_value(full_KK, orders.exact(proxy_KK).order)),
    )


def cosine_matrix(sketches: Sequence[Floats]) -> Floats:
    """Cosine between the tasks' gradient sketches [K, K]; 0 where a sketch is zero."""
    stack = np.stack(sketches)
    norms = np.linalg.norm(stack, axis=1)
    unit = stack / np.where(norms > 0, norms, 1.0)[:, None]
    return np.asarray(unit @ unit.T)

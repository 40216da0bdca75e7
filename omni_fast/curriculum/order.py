"""The order of the tasks that forgets least: solvers for the Linear Ordering Problem on the transfer matrix.

Under constant transfer and saturation the summed forecast of an order is

    sum_j a*_j + sum over pairs (j before i) of T[i -> j]

so only the second sum depends on the order. `exact` is the dynamic program over subsets

    f(S) = max over j in S of [ sum over i in S\\j of T[i -> j] + f(S\\j) ],   j first in S,

O(2^K K^2), vectorised over subsets of one size and over bootstrap draws, and it keeps the second best order and the
number of optima too. Beyond `EXACT_LIMIT` tasks: greedy by net transfer, recomputed at each pick, then pairwise swaps,
with a bound on what may be missing. All functions take T [K, K] (row i: the trained task, column j: the task scored;
the diagonal is ignored) and orders as tuples of indices, first trained first. Ties go to the order that comes first in
the tasks' own numbering.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from omni_fast.curriculum.scores import Floats

EXACT_LIMIT = 18
TIE = 1e-10  # sums of at most 18 * 18 numbers below 1 agree far better than this; measured differences are above 1e-6

Order = tuple[int, ...]


class Solution(NamedTuple):
    """Optimum of one matrix. `second` is None with one task; `optima` counts the orders that reach `value`."""

    order: Order
    value: float
    second: Order | None
    second_value: float
    optima: int


def exact(matrix_KK: Floats) -> Solution:
    """Best and second best order by dynamic programming. ValueError above EXACT_LIMIT tasks."""
    tables = _Tables(matrix_KK[None])
    k = matrix_KK.shape[0]
    full = (1 << k) - 1
    best = tables.trace(full, rank=0)
    return Solution(
        order=best,
        value=float(tables.best[full, 0]),
        second=tables.trace(full, rank=1) if k > 1 else None,
        second_value=float(tables.second[full, 0]),
        optima=round(float(tables.count[full, 0])),
    )


class _Tables:
    """The dynamic program for B matrices at once: best and second best value, number of optima; a row per subset."""

    def __init__(self, matrices_BKK: Floats) -> None:
        b, k, _ = matrices_BKK.shape
        if k > EXACT_LIMIT:
            raise ValueError(f"The exact order takes at most {EXACT_LIMIT} tasks, got {k}; use greedy_net.")
        subsets = np.arange(1 << k)
        sizes = np.bitwise_count(subsets)
        # incoming[j][S, b] = sum over i in S of T[b, i -> j], by doubling
        self.incoming = []
        for j in range(k):
            table = np.zeros((1, b))
            for i in range(k):
                table = np.concatenate([table, table + (matrices_BKK[:, i, j] if i != j else 0.0)])
            self.incoming.append(table)
        self.best, self.second = np.full((2, 1 << k, b), -np.inf)
        self.count = np.zeros((1 << k, b))
        self.best[0], self.count[0] = 0.0, 1.0
        for size in range(1, k + 1):
            level = subsets[sizes == size]
            for j in range(k):
                chosen = level[(level >> j) & 1 == 1]
                rest = chosen ^ (1 << j)
                gain = self.incoming[j][rest]
                first, runner = gain + self.best[rest], gain + self.second[rest]
                held, held_second = self.best[chosen], self.second[chosen]
                self.second[chosen] = np.maximum(np.minimum(held, first), np.maximum(held_second, runner))
                self.best[chosen] = np.maximum(held, first)
            for j in range(k):
                chosen = level[(level >> j) & 1 == 1]
                rest = chosen ^ (1 << j)
                reached = self.incoming[j][rest] + self.best[rest] >= self.best[chosen] - TIE
                self.count[chosen] += np.where(reached, self.count[rest], 0.0)

    def trace(self, subset: int, rank: int) -> Order:
        """The best (rank 0) or second best (rank 1) order of a subset, of the first matrix."""
        order: list[int] = []
        while subset:
            members = [j for j in range(len(self.incoming)) if subset >> j & 1]
            options = []
            for j in members:
                rest = subset ^ (1 << j)
                gain = self.incoming[j][rest, 0]
                options.append((gain + self.best[rest, 0], j, 0))
                if len(members) > 1:
                    options.append((gain + self.second[rest, 0], j, 1))
            _, j, rank = sorted(options, key=lambda o: (-round(o[0], 10), o[1:]))[rank]  # ties: by task number
            order.append(j)
            subset ^= 1 << j
        return tuple(order)


def greedy_net(matrix_KK: Floats) -> Order:
    """Picks first the task with the largest net transfer from the rest (incoming - outgoing), again at each pick."""
    left = list(range(matrix_KK.shape[0]))
    order: list[int] = []
    while left:
        sub = matrix_KK[np.ix_(left, left)]
        net = sub.sum(axis=0) - sub.sum(axis=1)  # the diagonal cancels
        order.append(left.pop(int(np.argmax(net))))
    return tuple(order)


def improve_by_swaps(matrix_KK: Floats, order: Sequence[int]) -> Order:
    """Swaps any two positions while that raises the value; ends in a local optimum."""
    best, value, improved = tuple(order), order_value(matrix_KK, order), True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(best)), 2):
            swapped = (*best[:a], best[b], *best[a + 1 : b], best[a], *best[b + 1 :])
            if (reached := order_value(matrix_KK, swapped)) > value + TIE:
                best, value, improved = swapped, reached, True
    return best


def ascending_forgettability(matrix_KK: Floats) -> Order:
    """Least to most forgettable: ascending F_j = - sum over i != j of T[i -> j], computed once over all tasks."""
    incoming = matrix_KK.sum(axis=0) - np.diagonal(matrix_KK)
    return tuple(int(j) for j in np.argsort(-incoming, kind="stable"))


def random_order(k: int, seed: int) -> Order:
    """A uniformly random order that depends on nothing but k and the seed."""
    return tuple(int(j) for j in np.random.default_rng([seed, k]).permutation(k))


def regret_bound(matrix_KK: Floats, order: Sequence[int]) -> float:
    """What the optimum can exceed `order` by at most: every pair at its better side, minus the value reached."""
    off = matrix_KK - np.diag(np.diagonal(matrix_KK))
    upper = float(np.triu(np.maximum(off, off.T), k=1).sum())
    return upper - float(order_value(matrix_KK, order))


def order_probability(draws_BKK: Floats, order: Sequence[int]) -> float:
    """Share of bootstrap draws whose optimum is this order; a draw with several optima gives each an equal part."""
    size = max(1, (1 << 16) >> draws_BKK.shape[1])  # half a megabyte a table, which stays in the cache
    parts = []
    for start in range(0, len(draws_BKK), size):
        some = draws_BKK[start : start + size]
        tables = _Tables(some)
        reached = order_value(some, order) >= tables.best[-1] - TIE
        parts.append(np.where(reached, 1.0 / tables.count[-1], 0.0))
    return float(np.mean(np.concatenate(parts)))


def order_value(matrices_KK: Floats, order: Sequence[int]) -> Floats:
    """Sum of T[i -> j] over the pairs with j trained before i: what the order decides of the summed forecast.

    matrices_KK: [..., K, K]; a sum for each leading index [...].
    """
    positions = np.asarray(order)
    permuted = matrices_KK[..., positions[:, None], positions[None, :]]
    return np.tril(permuted, k=-1).sum(axis=(-2, -1))


def pairwise_probability(draws_BKK: Floats) -> NDArray[np.float64]:
    """P[i, j] [K, K]: share of draws in which i right before j beats the swap (T[j -> i] > T[i -> j]); ties half."""
    gain = draws_BKK.transpose(0, 2, 1) - draws_BKK
    return np.asarray((gain > TIE).mean(axis=0) + 0.5 * (np.abs(gain) <= TIE).mean(axis=0))

"""How much each way of ordering loses, on transfer matrices whose optimum is known.

An instance is a true matrix T (random, or the user's own). A scheduler sees T plus Gaussian noise of a given standard
error, as a measurement on finitely many items would give it, and returns an order; its regret is the summed score that
the best order of the true T has and this one has not. Both assumptions of the forecast hold by construction, so this
says what ordering can lose, not whether the assumptions hold on real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.order import Order
from omni_fast.curriculum.scores import Floats
from omni_fast.errors import UserError

LOW, HIGH = -0.10, 0.05  # range of a random transfer: more interference than help
MAX_TASKS = 12

Scheduler = Callable[[Floats, np.random.Generator], Order]

SCHEDULERS: dict[str, Scheduler] = {
    "exact": lambda matrix, rng: orders.exact(matrix).order,
    "greedy_net+swaps": lambda matrix, rng: orders.improve_by_swaps(matrix, orders.greedy_net(matrix)),
    "greedy_net": lambda matrix, rng: orders.greedy_net(matrix),
    "ascending_forgettability": lambda matrix, rng: orders.ascending_forgettability(matrix),
    "random": lambda matrix, rng: tuple(int(j) for j in rng.permutation(len(matrix))),
    "reversed": lambda matrix, rng: orders.exact(matrix).order[::-1],
}


@dataclass(frozen=True, slots=True)
class Regret:
    """Summed score that a scheduler loses against the best order: mean, standard error of the mean, worst case."""

    scheduler: str
    noise: float
    instances: int
    mean: float
    standard_error: float
    worst: float


def random_matrices(count: int, ks: Sequence[int], rng: np.random.Generator) -> list[Floats]:
    """`count` matrices with K cycling through `ks` and every off-diagonal T uniform in [LOW, HIGH]."""
    matrices = []
    for n in range(count):
        k = ks[n % len(ks)]
        matrix = rng.uniform(LOW, HIGH, (k, k))
        np.fill_diagonal(matrix, 0.0)
        matrices.append(matrix)
    return matrices


def simulate(matrices: Sequence[Floats], *, noise: float = 0.0, repeats: int = 1, seed: int = 0) -> list[Regret]:
    """Regret of every scheduler, all on the same matrices and the same noise.

    matrices: true transfer, [K, K] each.   noise: standard error of each measured T.   repeats: noise draws per matrix.
    UserError for a matrix that is not square, not finite, or beyond MAX_TASKS.
    """
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not 2 <= len(matrix) <= MAX_TASKS:
            raise UserError(
                f"A transfer matrix has to be square with 2 to {MAX_TASKS} tasks, got shape {matrix.shape}."
            )
        if not np.isfinite(matrix).all():
            raise UserError("The transfer matrix holds a number that is not finite; give every effect a value.")
    rng = np.random.default_rng(seed)
    lost: dict[str, list[float]] = {name: [] for name in SCHEDULERS}
    for matrix in matrices:
        best = orders.exact(matrix).value
        for _ in range(repeats):
            seen = matrix + rng.normal(0.0, noise, matrix.shape) if noise > 0 else matrix
            for name, schedule in SCHEDULERS.items():
                lost[name].append(best - orders.order_value(matrix, schedule(seen, rng)))
    count = len(matrices) * repeats
    return [
        Regret(
            name,
            noise,
            count,
            float(np.mean(values)),
            float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
            float(np.max(values)),
        )
        for name, values in lost.items()
    ]

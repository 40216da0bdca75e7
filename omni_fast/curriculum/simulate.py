"""How much each way of ordering loses, on transfer matrices whose optimum is known.

An instance is a true matrix T (random, or the user's own). A scheduler sees T plus Gaussian noise of a given standard
error, as a measurement on finitely many items would give it, and returns an order; its regret is the summed score that
the best order of the true T has and this one has not. Both assumptions of the forecast hold by construction, so this
says what ordering can lose, not whether the assumptions hold on real runs.

    python -m omni_fast.curriculum.simulate                     the table of docs/curriculum.md, in ten seconds
    python -m omni_fast.curriculum.simulate T.json --noise 0 0.03

T.json holds the matrix as a list of rows; row i is the trained task, column j the task scored, the diagonal is ignored.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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


def random_matrices(count: int, ks: Sequence[int], rng: np.random.Generator) -> list[Floats]:
    """`count` matrices with K cycling through `ks` and every off-diagonal T uniform in [LOW, HIGH]."""
    sizes = [ks[n % len(ks)] for n in range(count)]
    return [rng.uniform(LOW, HIGH, (k, k)) * (1.0 - np.eye(k)) for k in sizes]


def simulate(
    matrices: Sequence[Floats], *, noise: float = 0.0, repeats: int = 1, seed: int = 0
) -> dict[str, list[float]]:
    """Scheduler -> summed score lost against the best order, instance by instance; all on the same matrices and noise.

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
                lost[name].append(best - float(orders.order_value(matrix, schedule(seen, rng))))
    return lost


def regret_table(groups: Mapping[str, Sequence[Floats]], noises: Sequence[float], *, repeats: int, seed: int) -> str:
    """Mean regret and its standard error as a Markdown table: a row per scheduler, a column per group and noise.

    groups: name -> matrices.
    """
    columns = {
        f"{name}, s.e. {noise:g}": simulate(matrices, noise=noise, repeats=repeats, seed=seed)
        for name, matrices in groups.items()
        for noise in noises
    }
    rows = [["scheduler", *columns], ["---"] * (1 + len(columns))]
    for scheduler in SCHEDULERS:
        found = [np.array(lost[scheduler]) for lost in columns.values()]
        errors = [np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan for x in found]
        rows.append([scheduler, *(f"{max(0.0, x.mean()):.3f} ± {e:.3f}" for x, e in zip(found, errors, strict=True))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", nargs="?", type=Path, help="JSON list of rows; random matrices without it")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.02, 0.05], help="standard errors of T")
    parser.add_argument("--instances", type=int, default=300, help="random matrices of K = 3..6; a third as many of 12")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    rng = np.random.default_rng(given.seed)
    groups = {
        "K = 3..6": random_matrices(given.instances, (3, 4, 5, 6), rng),
        f"K = {MAX_TASKS}": random_matrices(math.ceil(given.instances / 3), (MAX_TASKS,), rng),
    }
    try:
        if given.matrix is not None:
            groups = {given.matrix.name: [np.array(json.loads(given.matrix.read_bytes()), dtype=np.float64)]}
        print(regret_table(groups, given.noise, repeats=1 if given.matrix is None else 500, seed=given.seed))
    except UserError as error:
        parser.error(str(error))
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"{given.matrix} is no matrix ({error}); write it as a JSON list of rows of numbers")


if __name__ == "__main__":
    main()

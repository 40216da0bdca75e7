"""The transfer matrix with its uncertainty, from item-level scores of the initial policy and of K single-task runs.

    T[i -> j] = a_j(theta_i) - a_j(theta_0)      a*_j = a_j(theta_j)

where a_j is the score on task j (split `select`: these numbers decide, they are never reported as a result), theta_0
the initial policy and theta_i the policy after one stage of task i from theta_0. K runs and K(K+1) evaluations measure
all of it.

The bootstrap is paired and joint: a draw resamples the items of every task once and re-scores all K + 1 checkpoints on
them, because every T[i -> j] shares a_j(theta_0). An item that failed (NaN) at one checkpoint leaves that task's scores
at all of them, so that a*, base and T stay consistent; `dropped` counts those.
Limits: the draws hold the items' noise, not that of the training seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from omni_fast.curriculum.scores import DRAWS, Estimate, Floats, ItemScores, interval, resample
from omni_fast.errors import RunError


@dataclass(frozen=True, slots=True)
class Transfer:
    """Measured transfer. Index i is the trained task, j the task scored; B bootstrap draws.

    tasks: names, the order of every axis.
    scores_MK: mean scores, row 0 the initial policy, row i + 1 after the single-task run of task i.
    draws_BMK: the same for each bootstrap draw.
    n_K: items behind each task's column.   dropped_K: items left out because a checkpoint has no score for them.
    """

    tasks: tuple[str, ...]
    scores_MK: Floats
    draws_BMK: Floats
    n_K: tuple[int, ...]
    dropped_K: tuple[int, ...]

    @property
    def base_K(self) -> Floats:
        """a_j(theta_0) [K]."""
        return np.array(self.scores_MK[0])

    @property
    def own_K(self) -> Floats:
        """a*_j [K]: each task's score after its own stage."""
        return np.array(np.diagonal(self.scores_MK[1:]))

    @property
    def matrix_KK(self) -> Floats:
        """T[i, j] [K, K]; the diagonal is the task's own gain a*_i - a_i(theta_0), which no order can change."""
        return self.scores_MK[1:] - self.scores_MK[:1]

    @property
    def matrix_draws_BKK(self) -> Floats:
        """T of each bootstrap draw [B, K, K]."""
        return self.draws_BMK[:, 1:] - self.draws_BMK[:, :1]

    def effects(self) -> dict[str, dict[str, Estimate]]:
        """Trained task -> scored task -> T with its paired interval, the diagonal included."""
        values, draws = self.matrix_KK.tolist(), self.matrix_draws_BKK
        return {
            a: {b: Estimate(values[i][j], self.n_K[j], *interval(draws[:, i, j])) for j, b in enumerate(self.tasks)}
            for i, a in enumerate(self.tasks)
        }


def measure(base: ItemScores, single: Mapping[str, ItemScores], *, draws: int = DRAWS, seed: int = 0) -> Transfer:
    """Transfer from item scores.

    base: task -> item scores [n_items] in 0..1 of the initial policy, NaN where the infrastructure failed.
    single: trained task -> the same mapping for the policy after that task's run; items in the same order everywhere.
    Raises RunError when a task has no item that was scored at every checkpoint.
    """
    tasks = tuple(single)
    rng = np.random.default_rng(seed)
    means, drawn, n_items, dropped = [], [], [], []
    for task in tasks:
        rows = {"the initial policy": base[task]} | {f"the run of '{i}'": single[i][task] for i in tasks}
        stack_MN = np.stack([np.asarray(row, dtype=np.float64) for row in rows.values()])
        ok = ~np.isnan(stack_MN).any(axis=0)
        n = int(ok.sum())
        if n == 0:
            missing = [name for name, row in rows.items() if np.isnan(row).all()]
            raise RunError(
                f"Task '{task}' has no item that every checkpoint scored (nothing at all from:"
                f" {', '.join(missing) or 'none'}); repair its verifier or judge and evaluate again."
            )
        stack_MN = stack_MN[:, ok]
        means.append(stack_MN.mean(axis=1))
        drawn.append(resample(n, draws, rng) @ stack_MN.T)
        n_items.append(n)
        dropped.append(int((~ok).sum()))
    return Transfer(tasks, np.stack(means, axis=1), np.stack(drawn, axis=2), tuple(n_items), tuple(dropped))

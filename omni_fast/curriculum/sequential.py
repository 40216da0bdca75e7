"""Transfer measured only as far as the order needs it: evaluate in batches, stop when the order is settled.

Each look adds items of the task whose part of the gap between the best and the second best order is the least certain
(its variance falls most per evaluation), re-solves the order on all items so far, and stops when the order is the
optimum in enough of the bootstrap draws. Looking several times would raise the chance of stopping at a wrong order, so
the level is split over the looks that are possible (Bonferroni: safe and a little slow). What the caller saves is
reported in evaluations, one being one checkpoint on one item. Limit: the draws hold the items' noise, not that of the
training seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from omni_fast.curriculum.decide import Decision, decide, gap_variance
from omni_fast.curriculum.scores import Floats
from omni_fast.curriculum.transfer import Transfer, measure

LEVEL = 0.95  # share of the draws in which a settled order is the optimum, before it is split over the looks
FIRST = 30  # items of every task at the first look: a bootstrap of fewer is not to be trusted

# (task, start, stop) -> scores of all K + 1 checkpoints on these items of a task's `select` split: [K + 1, stop - start] in
# 0..1, row 0 the initial policy, row i + 1 the run of task i; NaN where it failed.
Scorer = Callable[[str, int, int], Floats]


class Outcome(NamedTuple):
    """Result of a sequential measurement.

    items: used, per task.   settled: the order met the level in the end.   saved: share of the evaluations not needed.
    """

    decision: Decision
    items: dict[str, int]
    settled: bool
    saved: float


def settle_order(tasks: Sequence[str], sizes: Mapping[str, int], scorer: Scorer, batch: int = 20) -> Outcome:
    """Measure until the order is settled at LEVEL, or all items are used.

    sizes: `select` items per task.   batch: items added to one task at each look after the first.
    """
    scores = {task: scorer(task, 0, min(FIRST, sizes[task])) for task in tasks}
    possible = 1 + sum(math.ceil((sizes[task] - scores[task].shape[1]) / batch) for task in tasks)
    wanted = 1.0 - (1.0 - LEVEL) / possible
    for look in range(possible):
        transfer = measure(
            {task: scores[task][0] for task in tasks},
            {trained: {task: scores[task][i + 1] for task in tasks} for i, trained in enumerate(tasks)},
            seed=look,
        )
        decision = decide(transfer)
        used = {task: scores[task].shape[1] for task in tasks}
        open_tasks = [task for task in tasks if used[task] < sizes[task]]
        settled = (decision.probability or 0.0) >= wanted
        if settled or not open_tasks:
            break
        task = _least_certain(transfer, decision, open_tasks)
        more = scorer(task, used[task], min(used[task] + batch, sizes[task]))
        scores[task] = np.concatenate([scores[task], more], axis=1)
    return Outcome(decision, used, settled, 1.0 - sum(used.values()) / sum(sizes[task] for task in tasks))


def _least_certain(transfer: Transfer, decision: Decision, candidates: Sequence[str]) -> str:
    """The task whose further items reduce the variance of the gap to the second best order most."""
    place = {task: k for k, task in enumerate(transfer.tasks)}
    best, second = ([place[task] for task in order] for order in (decision.order, decision.second or decision.order))
    drop_K = gap_variance(transfer, best, second) / transfer.n_K
    # where the two orders tie, or nothing has moved yet: the task with the fewest items
    return max(candidates, key=lambda task: (drop_K[place[task]], -transfer.n_K[place[task]]))

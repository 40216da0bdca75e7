"""From measured transfer to a decision: the order, how sure it is, and what it would take to be sure.

`decide` solves the order on the measured matrix and on every bootstrap draw, compares it with the second best order,
and says in plain language whether the data can tell the two apart. When it cannot, it works out how many more `select`
items of which task
would: the gap between two orders is a sum of one term per task, so its variance splits over the tasks, and the
cheapest allocation gives each task items in proportion to its standard deviation (Neyman 1934). That number supposes
that the measured gap is the true one.
Limit: the draws hold the items' noise only; how much another training seed would move the matrix is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.order import EXACT_LIMIT, Order
from omni_fast.curriculum.scores import Z95, Estimate, Floats, interval
from omni_fast.curriculum.stages import Stage
from omni_fast.curriculum.transfer import Transfer

SETTLED = 0.975  # share of draws in which the best order beats the second best: the gap's 95 % interval is then above 0


class Decision(NamedTuple):
    """The solved order and what supports it.

    order, second: task names, first trained first (`second` is None with a single task, or beyond the exact limit).
    probability: share of draws whose optimum is this order (None beyond the exact limit).
    gap: summed forecast of the order minus that of the second best, with a paired interval.
    beats_second: share of draws in which the order is ahead of the second best (a tie counts half).
    optima: how many orders tie for the best.
    more_items: task -> further items that would settle it against the second best; None when nothing measured could.
    pairs: task -> task -> share of draws in which the first is better placed right before the second.
    """

    order: tuple[str, ...]
    pairs: dict[str, dict[str, float]]
    statement: str
    method: Literal["exact", "greedy_net+swaps"] = "exact"
    probability: float | None = None
    second: tuple[str, ...] | None = None
    gap: Estimate | None = None
    beats_second: float | None = None
    optima: int = 1
    more_items: dict[str, int] | None = None

    @property
    def settled(self) -> bool:
        """Whether the data tell the order from the second best one."""
        return self.second is None or (self.optima == 1 and (self.beats_second or 0.0) >= SETTLED)


class Plan(NamedTuple):
    """What is trained in which order, and why. transfer and decision are None where nothing was measured."""

    stages: list[Stage]
    statement: str
    transfer: Transfer | None
    decision: Decision | None


def decide(transfer: Transfer) -> Decision:
    """Solve the order on the measured transfer and say how sure it is."""
    matrix, draws, names = transfer.matrix_KK, transfer.matrix_draws_BKK, transfer.tasks
    k = len(names)
    pair_KK = orders.pairwise_probability(draws)
    pairs = {a: {b: float(pair_KK[i, j]) for j, b in enumerate(names) if i != j} for i, a in enumerate(names)}
    if k > EXACT_LIMIT:
        best = orders.improve_by_swaps(matrix, orders.greedy_net(matrix))
        bound = orders.regret_bound(matrix, best)
        order = tuple(names[i] for i in best)
        text = (
            f"With {k} tasks the order {_arrow(order)} was found by greedy search and pairwise swaps; the best order can"
            f" exceed its summed score by at most {bound:.3f}."
        )
        return Decision(order, pairs, text, method="greedy_net+swaps")
    solution = orders.exact(matrix)
    order = tuple(names[i] for i in solution.order)
    if solution.second is None:
        return Decision(order, pairs, f"There is one task, {names[0]}: nothing to order.", probability=1.0)
    lead_B = orders.order_value(draws, solution.order) - orders.order_value(draws, solution.second)
    gap = Estimate(solution.value - solution.second_value, sum(transfer.n_K), *interval(lead_B))
    beats = float(np.mean(lead_B > orders.TIE) + 0.5 * np.mean(np.abs(lead_B) <= orders.TIE))
    decision = Decision(
        order,
        pairs,
        statement="",
        probability=orders.order_probability(draws[: max(100, (1 << 22) >> k)], solution.order),  # seconds at any k
        second=tuple(names[i] for i in solution.second),
        gap=gap,
        beats_second=beats,
        optima=solution.optima,
        more_items=further_items(transfer, solution.order, solution.second),
    )
    return decision._replace(statement=_statement(decision, gap, transfer))


def further_items(transfer: Transfer, best: Order, second: Order) -> dict[str, int] | None:
    """Further `select` items per task that would separate two orders at 95 %, if the measured gap is the true one.

    Returns {} when they are separated already, None when the gap is 0: no number of items separates a tie.
    """
    gap = float(orders.order_value(transfer.matrix_KK, best) - orders.order_value(transfer.matrix_KK, second))
    if gap <= orders.TIE:
        return None
    n_K = np.array(transfer.n_K, dtype=np.float64)
    allowed = (gap / Z95) ** 2
    variance_K = gap_variance(transfer, best, second)
    if variance_K.sum() <= allowed:
        return {}
    wanted_K = _neyman(np.sqrt(variance_K * n_K), n_K, allowed)
    extra = {name: math.ceil(wanted_K[j] - n_K[j] - 1e-9) for j, name in enumerate(transfer.tasks)}
    return {name: count for name, count in extra.items() if count > 0}


def gap_variance(transfer: Transfer, best: Sequence[int], second: Sequence[int]) -> Floats:
    """Each task's part [K] in the variance of the gap between two orders: items of different tasks are independent."""
    weight_KK = _pair_signs(best) - _pair_signs(second)  # of T[i, j] in the gap
    return np.asarray((weight_KK[None] * transfer.matrix_draws_BKK).sum(axis=1).var(axis=0))


def _neyman(sd_K: Floats, n_K: Floats, allowed: float) -> Floats:
    """Fewest items N_k >= n_k with sum of sd_k^2 / N_k <= allowed, sd_k of one item: in proportion to sd_k above n_k."""
    free = sd_K > 0
    while True:
        budget = allowed - float((sd_K[~free] ** 2 / n_K[~free]).sum())
        wanted_K = np.where(free, sd_K * sd_K[free].sum() / budget, n_K)
        short = wanted_K < n_K
        if not short.any():
            return wanted_K
        free &= ~short


def _pair_signs(order: Sequence[int]) -> Floats:
    """[K, K]: 1 at (i, j) where j is trained before i."""
    place = np.argsort(order)
    return (place[:, None] > place[None, :]).astype(np.float64)


def _statement(found: Decision, gap: Estimate, transfer: Transfer) -> str:
    """gap: to the second best order."""
    k, best = len(found.order), _arrow(found.order)
    if found.optima > 1:
        return (
            f"{found.optima} of the {math.factorial(k)} orders tie for the best forecast; {best} is the first of"
            " them. On these items the choice among them is arbitrary."
        )
    lead = (
        f"The best order is {best}: its forecast is {gap.value / k:.4f} per task ahead of the second best,"
        f" {_arrow(found.second or ())} (95 % interval {gap.low / k:+.4f} to {gap.high / k:+.4f}); it is the optimum in"
        f" {found.probability:.0%} of the bootstrap draws"
    )
    if found.settled:
        return f"{lead}. The data tell it from the second best order."
    return f"{lead}, so the data cannot tell the two apart. {_remedy(found.more_items, sum(transfer.n_K))}"


def _remedy(more: dict[str, int] | None, present: int) -> str:
    """more: further items per task.   present: items so far."""
    if not more:
        return "They differ by too little for further items to matter."
    total = sum(more.values())
    listed = ", ".join(f"{task} {count:,}" for task, count in sorted(more.items(), key=lambda pair: -pair[1]))
    if total > 100 * present:
        return f"At this gap it would take some {total:,} further select items: in practice the two orders are equal."
    return f"If the measured gap is the true one, about {total:,} further select items would settle it ({listed})."


def _arrow(order: tuple[str, ...]) -> str:
    return " -> ".join(order)

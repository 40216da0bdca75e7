"""The order solvers against brute force, and the decision's probabilities and words."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.decide import decide, further_items
from omni_fast.curriculum.transfer import measure

# multiples of 1/100, as measured accuracies give them: ties are frequent, which is where a solver goes wrong
matrices = st.integers(1, 6).flatmap(
    lambda k: arrays(np.float64, (k, k), elements=st.integers(-10, 6).map(lambda x: x / 100))
)


def brute_force(matrix):
    ranked = [(orders.order_value(matrix, order), order) for order in itertools.permutations(range(len(matrix)))]
    return sorted(ranked, key=lambda pair: (-round(pair[0], 10), pair[1]))


@given(matrices)
@settings(max_examples=150, deadline=None)
def test_exact_equals_brute_force(matrix):
    ranked = brute_force(matrix)
    solution = orders.exact(matrix)
    best = ranked[0][0]
    assert solution.value == pytest.approx(best, abs=1e-12)
    assert orders.order_value(matrix, solution.order) == pytest.approx(best, abs=1e-12)
    assert solution.order == ranked[0][1], "ties go to the first order in the tasks' numbering"
    assert solution.optima == sum(1 for value, _ in ranked if value >= best - 1e-9)
    if len(ranked) > 1:
        assert solution.second_value == pytest.approx(ranked[1][0], abs=1e-12)
        assert solution.second != solution.order
        assert orders.order_value(matrix, solution.second) == pytest.approx(ranked[1][0], abs=1e-12)
    else:
        assert solution.second is None


@given(matrices)
@settings(max_examples=80, deadline=None)
def test_heuristics_are_orders_below_the_optimum_and_within_their_bound(matrix):
    k = len(matrix)
    optimum = orders.exact(matrix).value
    greedy = orders.greedy_net(matrix)
    swapped = orders.improve_by_swaps(matrix, greedy)
    for order in (greedy, swapped, orders.ascending_forgettability(matrix), orders.random_order(k, 3)):
        assert sorted(order) == list(range(k))
        value = orders.order_value(matrix, order)
        assert value <= optimum + 1e-9
        assert optimum - value <= orders.regret_bound(matrix, order) + 1e-9
    assert orders.order_value(matrix, swapped) >= orders.order_value(matrix, greedy) - 1e-12


def test_diagonal_never_matters():
    rng = np.random.default_rng(0)
    matrix = rng.uniform(-0.1, 0.05, (5, 5))
    other = matrix + np.diag(rng.uniform(-5, 5, 5))
    for solve in (orders.greedy_net, orders.ascending_forgettability, lambda m: orders.exact(m).order):
        assert solve(matrix) == solve(other)
    assert orders.regret_bound(matrix, (0, 1, 2, 3, 4)) == pytest.approx(
        orders.regret_bound(other, (0, 1, 2, 3, 4)), abs=1e-9
    )


def test_forgettable_task_goes_last():
    # training anything destroys task 2; nothing else interacts
    matrix = np.zeros((3, 3))
    matrix[[0, 1], 2] = -0.2
    assert orders.exact(matrix).order[-1] == 2
    assert orders.greedy_net(matrix)[-1] == 2
    assert orders.ascending_forgettability(matrix)[-1] == 2


def test_exact_at_twelve_tasks_reaches_at_least_the_heuristic():
    matrix = np.random.default_rng(1).uniform(-0.1, 0.05, (12, 12))
    solution = orders.exact(matrix)
    assert orders.order_value(matrix, solution.order) == pytest.approx(solution.value, abs=1e-12)
    assert solution.value >= orders.order_value(matrix, orders.improve_by_swaps(matrix, orders.greedy_net(matrix)))


def test_too_many_tasks_for_the_exact_solver():
    with pytest.raises(ValueError, match="18"):
        orders.exact(np.zeros((19, 19)))


def test_probability_is_a_distribution_over_orders():
    draws = np.random.default_rng(2).integers(-3, 3, (200, 3, 3)) / 100  # coarse: many ties
    total = sum(orders.order_probability(draws, order) for order in itertools.permutations(range(3)))
    assert total == pytest.approx(1.0)
    assert orders.order_probability(np.zeros((10, 4, 4)), (2, 0, 1, 3)) == pytest.approx(1 / 24)


def test_pairwise_probability():
    draws = np.random.default_rng(3).normal(0, 0.1, (500, 3, 3))
    draws[:, 0, 1] += 1.0  # training 0 helps 1: 1 should come before 0
    pair = orders.pairwise_probability(draws)
    off = ~np.eye(3, dtype=bool)
    assert np.allclose((pair + pair.T)[off], 1.0)
    assert pair[1, 0] > 0.99


def _items(rng, n, p):
    return (rng.random(n) < p).astype(float)


def _scores(effect: float, n: int, seed: int = 0):
    """Two tasks: training a costs b `effect`, training b leaves a alone."""
    rng = np.random.default_rng(seed)
    base = {"a": _items(rng, n, 0.4), "b": _items(rng, n, 0.5)}
    hit = base["b"].copy()
    ones = np.flatnonzero(hit)
    hit[ones[: round(effect * n)]] = 0.0
    noise = base["a"].copy()
    flip = rng.permutation(n)[: n // 10]
    noise[flip] = 1 - noise[flip]
    return base, {"a": {"a": _items(rng, n, 0.8), "b": hit}, "b": {"a": noise, "b": _items(rng, n, 0.9)}}


def test_decision_is_settled_when_the_effect_is_large():
    decision = decide(measure(*_scores(0.3, 200)))
    assert decision.order == ("a", "b")
    assert decision.settled and decision.probability > 0.99 and decision.more_items == {}
    assert decision.gap.low > 0
    assert "The data tell it" in decision.statement


def test_decision_says_when_the_data_cannot_tell_and_what_would():
    transfer = measure(*_scores(0.02, 50, seed=4))
    decision = decide(transfer)
    assert not decision.settled
    assert "cannot tell" in decision.statement and "further select items" in decision.statement
    assert decision.more_items and all(count > 0 for count in decision.more_items.values())


def test_further_items_are_enough_and_not_many_too_many():
    """With the suggested items, and the same spread per item, the gap's standard error meets the 95 % line."""
    transfer = measure(*_scores(0.02, 50, seed=4))
    decision = decide(transfer)
    best, second = ([transfer.tasks.index(t) for t in order] for order in (decision.order, decision.second))
    more = further_items(transfer, tuple(best), tuple(second))
    gap = decision.gap.value
    lead = orders.order_value(transfer.matrix_draws_BKK, best) - orders.order_value(transfer.matrix_draws_BKK, second)
    spread = lead.var()
    # only task terms that differ between the two orders carry variance; scale each by n / (n + more)
    per_task = []
    for j in range(2):
        only = transfer.matrix_draws_BKK.copy()
        only[:, :, 1 - j] = 0
        per_task.append((orders.order_value(only, best) - orders.order_value(only, second)).var())
    assert sum(per_task) == pytest.approx(spread, rel=0.2)
    scaled = sum(
        v * transfer.n_K[j] / (transfer.n_K[j] + more.get(transfer.tasks[j], 0)) for j, v in enumerate(per_task)
    )
    assert gap / math.sqrt(scaled) == pytest.approx(1.96, rel=0.05)


def test_decision_on_a_full_tie_and_on_one_task():
    items = {"a": np.ones(20), "b": np.ones(20)}
    tie = decide(measure(items, {"a": items, "b": items}))
    assert tie.optima == 2 and not tie.settled and tie.probability == pytest.approx(0.5) and tie.more_items is None
    assert "tie" in tie.statement
    one = decide(measure({"a": np.ones(5)}, {"a": {"a": np.ones(5)}}))
    assert one.order == ("a",) and one.settled and "nothing to order" in one.statement


def test_decision_beyond_the_exact_limit():
    rng = np.random.default_rng(0)
    names = [f"t{i}" for i in range(19)]
    base = {t: _items(rng, 10, 0.5) for t in names}
    single = {i: {t: _items(rng, 10, 0.5) for t in names} for i in names}
    decision = decide(measure(base, single, draws=50))
    assert decision.method == "greedy_net+swaps" and sorted(decision.order) == sorted(names)
    assert "at most" in decision.statement

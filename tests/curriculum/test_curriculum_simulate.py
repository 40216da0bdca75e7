"""The acceptance figures of ordering by simulation, and sequential evaluation."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.sequential import settle_order
from omni_fast.curriculum.simulate import main, random_matrices, simulate
from omni_fast.errors import UserError


@pytest.fixture(scope="module")
def instances():
    """300 matrices, K = 3..6, T uniform in [-0.10, 0.05]."""
    return random_matrices(300, (3, 4, 5, 6), np.random.default_rng(0))


def _mean(lost):
    return {scheduler: np.mean(values) for scheduler, values in lost.items()}


def test_regret_of_each_scheduler(instances):
    mean = _mean(simulate(instances))
    assert mean["exact"] == pytest.approx(0.0, abs=1e-12)
    assert 0.010 <= mean["greedy_net"] <= 0.020
    assert mean["greedy_net+swaps"] <= mean["greedy_net"]
    assert 0.05 <= mean["ascending_forgettability"] <= 0.09
    assert 0.15 <= mean["random"] <= 0.20
    assert mean["reversed"] > mean["random"]


def test_exact_is_brute_force_on_all_instances(instances):
    for matrix in instances:
        best = max(orders.order_value(matrix, order) for order in itertools.permutations(range(len(matrix))))
        assert orders.exact(matrix).value == pytest.approx(best, abs=1e-12)


def test_noise_costs_the_solved_order(instances):
    small = _mean(simulate(instances, noise=0.02, repeats=2))["exact"]
    large = _mean(simulate(instances, noise=0.05, repeats=2))["exact"]
    assert small == pytest.approx(0.016, abs=0.006)
    assert large == pytest.approx(0.06, abs=0.02)


def test_a_given_matrix_and_bad_ones():
    own = np.array([[0, -0.2, 0], [0, 0, 0], [0, 0, 0.0]])
    rows = simulate([own])
    assert _mean(rows)["exact"] == 0.0 and _mean(rows)["reversed"] == pytest.approx(0.2)
    for bad, word in ((np.zeros((2, 3)), "square"), (np.full((3, 3), np.nan), "finite"), (np.zeros((13, 13)), "12")):
        with pytest.raises(UserError, match=word):
            simulate([bad])


def test_twelve_tasks_and_noise_that_never_makes_a_regret_negative():
    for lost in simulate(random_matrices(3, (12,), np.random.default_rng(1)), noise=0.03, repeats=2).values():
        assert len(lost) == 6 and min(lost) >= -1e-12


def _figures(table: str) -> dict[str, list[float]]:
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and "±" in line]
    return {row[0]: [float(cell.split(" ")[0]) for cell in row[1:]] for row in rows}


def test_the_table_in_the_docs_is_what_the_command_prints(capsys):
    main([])
    printed = _figures(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "curriculum.md").read_text(encoding="utf-8")
    written = _figures(page)
    assert printed.keys() == written.keys() and len(printed) == 6
    for scheduler, figures in printed.items():
        assert figures == pytest.approx(written[scheduler], abs=0.0015), scheduler


def test_a_matrix_file_and_its_faults(tmp_path, capsys):
    path = tmp_path / "T.json"
    path.write_text(json.dumps([[0, -0.2, 0], [0, 0, 0.1], [0, 0, 0]]))
    main([str(path), "--noise", "0"])
    assert _figures(capsys.readouterr().out)["reversed"] == [0.3]
    for fault, word in (("{", "list of rows"), ("[[0, null], [0, 0]]", "finite"), ("[[0, 1]]", "square")):
        path.write_text(fault)
        with pytest.raises(SystemExit):
            main([str(path)])
        assert re.search(word, capsys.readouterr().err)


class Bernoulli:
    """Checkpoints with known pass rates, items shared by all of them (paired)."""

    def __init__(self, rates: np.ndarray, seed: int, size: int) -> None:
        rng = np.random.default_rng(seed)
        self.items = rng.random((rates.shape[1], size))  # an item's difficulty: solved where it is below the rate
        self.noise = rng.random((rates.shape[0], rates.shape[1], size))
        self.rates = rates
        self.asked = 0

    def __call__(self, task: str, start: int, stop: int) -> np.ndarray:
        j = int(task)
        self.asked += (stop - start) * self.rates.shape[0]
        solved = self.items[j, start:stop] < self.rates[:, j, None]
        churn = self.noise[:, j, start:stop] < 0.05
        return np.where(churn, ~solved, solved).astype(float)


def _rates(transfer: np.ndarray, base: float = 0.5) -> np.ndarray:
    return np.concatenate([np.full((1, len(transfer)), base), base + transfer])


def test_sequential_stops_early_when_the_order_is_clear():
    transfer = np.array([[0.3, -0.4, -0.4], [0.2, 0.3, -0.4], [0.2, 0.2, 0.3]])
    scorer = Bernoulli(_rates(transfer), seed=0, size=400)
    names = ("0", "1", "2")
    outcome = settle_order(names, dict.fromkeys(names, 400), scorer)
    assert outcome.settled and outcome.decision.order == ("0", "1", "2")
    assert outcome.saved > 0.8 and outcome.saved == 1 - scorer.asked / (4 * 1200)


def test_sequential_uses_everything_when_there_is_nothing_to_find():
    scorer = Bernoulli(_rates(np.zeros((3, 3))), seed=1, size=90)
    names = ("0", "1", "2")
    outcome = settle_order(names, {"0": 90, "1": 75, "2": 30}, scorer)
    assert not outcome.settled and outcome.saved == 0.0
    assert outcome.items == {"0": 90, "1": 75, "2": 30} and scorer.asked == 4 * 195


def test_sequential_rarely_settles_on_a_wrong_order():
    """Two tasks with a small true effect: stopping at the wrong order has to stay within the level."""
    wrong = settled = 0
    transfer = np.array([[0.2, -0.04], [0.0, 0.2]])  # training 0 hurts 1: 0 first is right
    for seed in range(50):
        scorer = Bernoulli(_rates(transfer), seed=seed, size=200)
        outcome = settle_order(("0", "1"), {"0": 200, "1": 200}, scorer, batch=40)
        settled += outcome.settled
        wrong += outcome.settled and outcome.decision.order != ("0", "1")
    assert wrong <= 0.05 * 50
    assert settled > 4, "the test must see stops to say anything"

"""Intervals cover, differences are paired, BWT and its kin do what their definition says, transfer is consistent."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from omni_fast.curriculum import scores
from omni_fast.curriculum.transfer import measure
from omni_fast.errors import RunError


@given(st.integers(1, 200), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_equals_scipy(n, data):
    k = data.draw(st.integers(0, n))
    ours = scores.score(np.array([1.0] * k + [0.0] * (n - k)))
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.n == n and ours.low <= ours.value <= ours.high


def test_score_leaves_out_failed_items():
    est = scores.score(np.array([1.0, math.nan, 0.0, 1.0]))
    assert est.n == 3 and est.value == pytest.approx(2 / 3)
    empty = scores.score(np.array([math.nan, math.nan]))
    assert empty.n == 0 and empty.as_dict() == {"value": None, "n": 0, "low": None, "high": None}
    assert empty.as_dict() == {"value": None, "n": 0, "low": None, "high": None}


def test_fractional_score_interval_is_close_to_normal():
    x = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 400)
    est = scores.score(x)
    half = 1.96 * x.std() / math.sqrt(x.size)
    assert est.high - est.low == pytest.approx(2 * half, rel=0.1)


def test_paired_interval_covers_at_its_rate():
    """Over 300 simulated evaluations the 95 % interval of a difference holds the truth about 95 % of the time."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        before = (rng.random(120) < 0.5).astype(float)
        after = np.where(rng.random(120) < 0.2, 1.0, before)  # truth: 0.2 * 0.5 = 0.1
        est = scores.mean_difference({"": before}, {"": after}, draws=400, seed=seed)
        hits += est.low <= 0.1 <= est.high
    assert 0.90 <= hits / 300 <= 0.98


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    before = (rng.random(100) < 0.5).astype(float)
    after = before.copy()
    after[:5] = 1.0
    paired = scores.mean_difference({"": before}, {"": after})
    unpaired = scores.score(after).high - scores.score(after).low
    assert paired.high - paired.low < unpaired / 2
    same = scores.mean_difference({"": before}, {"": before})
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_mean_difference_weighs_tasks_equally():
    before = {"a": np.zeros(10), "b": np.zeros(1000)}
    after = {"a": np.ones(10), "b": np.zeros(1000)}
    assert scores.mean_difference(before, after).value == pytest.approx(0.5)
    after["a"] = np.full(10, math.nan)
    assert scores.mean_difference(before, after).n == 0


def test_flips():
    assert scores.flips(np.array([1, 1, 0, 0, math.nan, 0.5]), np.array([0, 1, 1, 0, 1, 0.0])) == (2, 1)


def _rows(*levels):
    """Rows of constant item scores, so that every mean is the level given: [{task: level}, ...]."""
    return [{task: np.full(8, level) for task, level in row.items()} for row in levels]


def test_bwt_forward_transfer_and_forgetting_by_hand():
    rows = _rows(
        {"a": 0.1, "b": 0.2, "c": 0.3},
        {"a": 0.6, "b": 0.25, "c": 0.3},
        {"a": 0.5, "b": 0.7, "c": 0.4},
        {"a": 0.4, "b": 0.75, "c": 0.9},
    )
    trained = [("a",), ("b",), ("c",)]
    assert scores.backward_transfer(rows, trained).value == pytest.approx(((0.4 - 0.6) + (0.75 - 0.7)) / 2)
    assert scores.forward_transfer(rows, trained).value == pytest.approx(((0.25 - 0.2) + (0.4 - 0.3)) / 2)
    assert scores.forgetting(rows, trained) == pytest.approx({"a": 0.2, "b": 0.0, "c": 0.0})


def test_bwt_counts_a_refresh_as_recovery_and_needs_two_stages():
    rows = _rows({"a": 0, "b": 0}, {"a": 0.6, "b": 0}, {"a": 0.4, "b": 0.5}, {"a": 0.55, "b": 0.5})
    assert scores.backward_transfer(rows, [("a",), ("b",), ("a",)]).value == pytest.approx(-0.05)
    joint = scores.backward_transfer(rows[:2], [("a", "b")])
    assert joint.n == 0 and math.isnan(joint.value)


def test_holm():
    assert scores.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert scores.holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})
    assert scores.holm({"a": math.nan, "b": 0.02, "c": 0.01}) == pytest.approx(
        {"b": 0.02, "c": 0.02}
    ) and not scores.holm({})


item = st.sampled_from([0.0, 0.5, 1.0, math.nan])


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_transfer_is_consistent(k, seed):
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(k)]

    def items():
        x = rng.choice([0.0, 1.0, 0.5, math.nan], 40, p=[0.45, 0.4, 0.1, 0.05])
        x[0] = 1.0
        return x

    base = {t: items() for t in names}
    single = {i: {t: items() for t in names} for i in names}
    transfer = measure(base, single, draws=64)
    assert np.allclose(transfer.base_K + np.diagonal(transfer.matrix_KK), transfer.own_K)
    for j, task in enumerate(names):
        columns = np.stack([base[task], *(single[i][task] for i in names)])
        ok = ~np.isnan(columns).any(axis=0)
        assert transfer.n_K[j] == ok.sum() and transfer.dropped_K[j] == 40 - ok.sum()
        for i in range(len(names)):
            assert transfer.matrix_KK[i, j] == pytest.approx((columns[i + 1] - columns[0])[ok].mean())


def test_transfer_draws_share_the_base_and_are_centred():
    """Two runs with the same items have the same T in every draw; the draws' mean is the measured value."""
    rng = np.random.default_rng(5)
    base = {"a": (rng.random(100) < 0.5) * 1.0, "b": (rng.random(100) < 0.5) * 1.0}
    after = {"a": (rng.random(100) < 0.6) * 1.0, "b": (rng.random(100) < 0.4) * 1.0}
    transfer = measure(base, {"a": after, "b": after})
    assert np.array_equal(transfer.matrix_draws_BKK[:, 0], transfer.matrix_draws_BKK[:, 1])
    assert np.allclose(transfer.matrix_draws_BKK.mean(axis=0), transfer.matrix_KK, atol=0.01)
    effect = transfer.effects()["a"]["b"]
    direct = scores.mean_difference({"": base["b"]}, {"": after["b"]})
    assert effect.value == pytest.approx(direct.value) and effect.low == pytest.approx(direct.low, abs=0.02)
    again = measure(base, {"a": after, "b": after})
    assert np.array_equal(again.draws_BMK, transfer.draws_BMK), "the same seed gives the same draws"


def test_transfer_failures_are_named():
    ok, bad = np.ones(4), np.full(4, math.nan)
    with pytest.raises(RunError, match="the run of 'b'"):
        measure({"a": ok, "b": ok}, {"a": {"a": ok, "b": ok}, "b": {"a": bad, "b": ok}})

"""Forecast: closed form against stage-by-stage simulation, ratios at 0, error measures."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from omni_fast.curriculum import predict
from omni_fast.curriculum.order import order_value
from omni_fast.curriculum.transfer import measure


@given(st.integers(1, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_closed_form_equals_stage_by_stage(k, seed):
    rng = np.random.default_rng(seed)
    base, own = rng.random(k), rng.random(k)
    matrix = rng.uniform(-0.1, 0.05, (k, k))
    order = list(rng.permutation(k))
    later = [[order.index(i) > order.index(j) for j in range(k)] for i in range(k)]
    closed = own + (matrix * later).sum(axis=0)
    np.fill_diagonal(matrix, own - base)
    walked = predict.walk(np.vstack([base, base + matrix]), [1] * k, order)
    assert np.allclose(closed, walked[-1], atol=1e-12, rtol=0)
    assert closed.sum() == pytest.approx(own.sum() + order_value(matrix, order), abs=1e-12)
    assert walked.shape == (k + 1, k)


def _transfer(seed=0, n=200, k=3, zero_base=False):
    rng = np.random.default_rng(seed)
    names = [f"t{i}" for i in range(k)]
    base = {t: (rng.random(n) < 0.4) * 1.0 for t in names}
    if zero_base:
        base["t0"] = np.zeros(n)
    single = {i: {t: (rng.random(n) < (0.8 if t == i else 0.35)) * 1.0 for t in names} for i in names}
    return measure(base, single)


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_last_task_reaches_its_own_score_and_intervals_hold_the_value(form):
    transfer = _transfer()
    out = predict.forecast(transfer, ["t1", "t0", "t2"], form)
    assert out["t2"].value == pytest.approx(transfer.own_K[2])
    for est in out.values():
        assert 0 <= est.low <= est.value <= est.high <= 1 and est.high > est.low


def test_forms_agree_when_nothing_transfers_and_base_row_is_the_base():
    x = (np.random.default_rng(0).random(100) < 0.5) * 1.0
    up = np.ones(100)
    transfer = measure({"a": x, "b": x}, {"a": {"a": up, "b": x}, "b": {"a": x, "b": up}})
    for form in ("additive", "multiplicative"):
        assert predict.forecast(transfer, [], form)["a"].value == pytest.approx(x.mean())
        final = predict.forecast(transfer, ["a", "b"], form)
        assert final["a"].value == pytest.approx(1.0) and final["b"].value == pytest.approx(1.0)


def test_ratio_is_finite_at_a_base_of_zero_and_forecast_stays_a_score():
    transfer = _transfer(zero_base=True)
    rows = predict.walk(transfer.scores_MK, transfer.n_K, [1, 2], "multiplicative")
    assert np.isfinite(rows).all() and (rows[:, 1:] > 0).all()
    out = predict.forecast(transfer, ["t0", "t1", "t2"], "multiplicative")
    assert all(0 <= est.value <= 1 for est in out.values())


def test_forecast_of_a_refreshed_order_ends_at_the_refreshed_score():
    transfer = _transfer()
    assert predict.forecast(transfer, ["t0", "t1", "t2", "t0"])["t0"].value == pytest.approx(transfer.own_K[0])


def test_error_measures_against_scipy():
    rng = np.random.default_rng(1)
    level = np.array([0.1, 0.5, 0.9])
    p = level + rng.normal(0, 0.02, (6, 3))
    r = level + rng.normal(0, 0.02, (6, 3))
    err = predict.forecast_error(p, r)
    pc, rc = (p - p.mean(axis=0)).ravel(), (r - r.mean(axis=0)).ravel()
    assert err.n == 18
    assert err.pearson == pytest.approx(stats.pearsonr(pc, rc).statistic)
    assert err.spearman == pytest.approx(stats.spearmanr(pc, rc).statistic)
    assert abs(err.pearson) < 0.8 < stats.pearsonr(p.ravel(), r.ravel()).statistic, "levels alone would correlate"
    assert err.rmse == pytest.approx(math.sqrt(((p - r) ** 2).mean()))
    assert err.bias == pytest.approx((p - r).mean())


def test_error_measures_with_one_row_and_with_holes():
    one = predict.forecast_error(np.array([0.1, 0.2]), np.array([0.2, 0.4]))
    assert one.n == 2 and one.mean_absolute == pytest.approx(0.15) and math.isnan(one.pearson)
    p, r = np.array([[0.1, 0.2], [0.3, math.nan], [0.2, 0.5]]), np.array([[0.1, 0.2], [0.3, 0.4], [math.nan, 0.5]])
    holes = predict.forecast_error(p, r)
    assert holes.n == 4 and holes.mean_absolute == pytest.approx(0.0) and holes.pearson == pytest.approx(1.0)
    assert predict.forecast_error(np.full((2, 2), math.nan), np.zeros((2, 2))).n == 0

"""Forecast of the scores that an order will reach, and how far off it was.

Assumption 1 (constant transfer): a stage of task i moves a_j by T[i -> j] from any checkpoint.
Assumption 2 (saturation): a stage of task j sets a_j to a*_j.
Hence a_j(order) = a*_j + sum of T[i -> j] over the tasks i trained after j. Assumption 1 alone would make every order
equal: it is the reset of assumption 2 that makes the order matter.

`walk` goes through the stages, so repeated stages and orders of some of the tasks work. The multiplicative forecast
replaces T by the ratio rho[i -> j] = a_j(theta_i) / a_j(theta_0), each score smoothed to (n a + 1/2) / (n + 1) so that a
score of 0 neither divides nor erases. `walk` gives what the formula gives, which can leave 0..1; `forecast` clips it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from omni_fast.curriculum.scores import Estimate, Floats, interval
from omni_fast.curriculum.transfer import Transfer

Form = Literal["additive", "multiplicative"]


def walk(scores_MK: Floats, n_K: Sequence[int], stages: Sequence[int], form: Form = "additive") -> Floats:
    """Both assumptions applied stage by stage: [S + 1, ..., K], row 0 the base.

    scores_MK: [..., K + 1, K], row 0 the initial policy, row i + 1 after the run of task i.   n_K: items behind each
    column, which smooth the ratios.
    """
    base, after = scores_MK[..., :1, :], scores_MK[..., 1:, :]
    smooth_K = np.asarray(n_K, dtype=np.float64)
    ratios = (after * smooth_K + 0.5) / (base * smooth_K + 0.5) if form == "multiplicative" else after
    rows = [np.array(scores_MK[..., 0, :], dtype=np.float64)]
    for i in stages:
        row = rows[-1] * ratios[..., i, :] if form == "multiplicative" else rows[-1] + (after - base)[..., i, :]
        row[..., i] = after[..., i, i]
        rows.append(row)
    return np.stack(rows)


def forecast(transfer: Transfer, order: Sequence[str], form: Form = "additive") -> dict[str, Estimate]:
    """Forecast of every task's final score for an order, in 0..1, with 95 % bootstrap intervals.

    The interval holds the `select` items' noise in the measured transfer; a realised score on `test` has its own on top.
    """
    index = [transfer.tasks.index(name) for name in order]
    final_K, draws_BK = (
        np.clip(walk(scores, transfer.n_K, index, form)[-1], 0.0, 1.0)
        for scores in (transfer.scores_MK, transfer.draws_BMK)
    )
    return {
        task: Estimate(float(final_K[j]), transfer.n_K[j], *interval(draws_BK[:, j]))
        for j, task in enumerate(transfer.tasks)
    }


class ForecastError(NamedTuple):
    """How forecasts compare with realised scores over n (run, task) points; NaN where it cannot be computed.

    mean_absolute, bias: in score units, forecast - realised.   rmse: root of the mean square.
    pearson, spearman: on values centred within each task, because the tasks' levels alone would correlate by themselves.
    """

    n: int
    mean_absolute: float
    bias: float
    rmse: float
    pearson: float
    spearman: float


def forecast_error(predicted_NK: Floats, realised_NK: Floats) -> ForecastError:
    """Compare forecasts with realised scores, both [N runs or stages, K tasks]; pairs with a NaN are left out.

    Correlations need two or more rows: after centring within the task a single row is all zeros.
    """
    p, r = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (predicted_NK, realised_NK))
    ok = ~(np.isnan(p) | np.isnan(r))
    n = int(ok.sum())
    if n == 0:
        return ForecastError(0, *(math.nan,) * 5)
    error = (p - r)[ok]
    counts_K = np.maximum(ok.sum(axis=0), 1)
    centred = [(x - np.where(ok, x, 0.0).sum(axis=0) / counts_K)[ok] for x in (p, r)]
    return ForecastError(
        n=n,
        mean_absolute=float(np.abs(error).mean()),
        bias=float(error.mean()),
        rmse=float(np.sqrt((error**2).mean())),
        pearson=_correlation(*centred),
        spearman=_correlation(*(stats.rankdata(np.round(x, 12)) for x in centred)),
    )


def _correlation(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 1e-12 else math.nan

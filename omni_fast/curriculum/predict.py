"""Forecast of the scores that an order will reach, and how far off it was.

Assumption 1 (constant transfer): a stage of task i moves a_j by T[i -> j] from any checkpoint.
Assumption 2 (saturation): a stage of task j sets a_j to a*_j.
Hence a_j(order) = a*_j + sum of T[i -> j] over the tasks i trained after j. Assumption 1 alone would make every order
equal: it is the reset of assumption 2 that makes the order matter.

`additive_rows` walks the stages (so repeated stages and orders of some of the tasks work), `additive` is the closed
form. The multiplicative forecast replaces T by the ratio rho[i -> j] = a_j(theta_i) / a_j(theta_0), each score smoothed
to (n a + 1/2) / (n + 1) so that a score of 0 neither divides nor erases. Both functions return what the formula gives,
which can leave 0..1; `forecast`, which is what a report shows, clips it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from omni_fast.curriculum.scores import Estimate, Floats, interval
from omni_fast.curriculum.transfer import Transfer

Form = Literal["additive", "multiplicative"]


def additive(own_K: Floats, matrix_KK: Floats, order: Sequence[int]) -> Floats:
    """Closed form [..., K] for a full order; own [..., K], matrix [..., K, K], leading dimensions broadcast."""
    out = np.array(own_K, dtype=np.float64)
    for place, j in enumerate(order):
        for i in order[place + 1 :]:
            out[..., j] = out[..., j] + matrix_KK[..., i, j]
    return out


def additive_rows(base_K: Floats, own_K: Floats, matrix_KK: Floats, stages: Sequence[int]) -> Floats:
    """Both assumptions applied stage by stage: [S + 1, ..., K], row 0 the base."""
    rows = [np.array(base_K, dtype=np.float64)]
    for i in stages:
        after = rows[-1] + matrix_KK[..., i, :]
        after[..., i] = own_K[..., i]
        rows.append(after)
    return np.stack(rows)


def multiplicative_rows(base_K: Floats, own_K: Floats, ratio_KK: Floats, stages: Sequence[int]) -> Floats:
    """The same with ratios: a stage of i multiplies a_j by ratio[i, j] and sets a_i to a*_i."""
    rows = [np.array(base_K, dtype=np.float64)]
    for i in stages:
        after = rows[-1] * ratio_KK[..., i, :]
        after[..., i] = own_K[..., i]
        rows.append(after)
    return np.stack(rows)


def smoothed_ratios(scores_MK: Floats, n_K: Sequence[int]) -> Floats:
    """rho[i, j] [..., K, K] from scores [..., K + 1, K] (row 0 the base) with half an item of smoothing."""
    n = np.asarray(n_K, dtype=np.float64)
    smooth = (scores_MK * n + 0.5) / (n + 1.0)
    return np.asarray(smooth[..., 1:, :] / smooth[..., :1, :])


def forecast_rows(transfer: Transfer, stages: Sequence[str], form: Form = "additive") -> list[dict[str, Estimate]]:
    """Forecast of every task after each stage (row 0: the initial policy), clipped to 0..1, with 95 % bootstrap
    intervals.

    The interval holds the `select` items' noise in the measured transfer; a realised score on `test` has its own on
    top.
    """
    index = [transfer.tasks.index(name) for name in stages]
    centre_SK = _rows(transfer.scores_MK, transfer.n_K, index, form)
    draws_SBK = _rows(transfer.draws_BMK, transfer.n_K, index, form)
    out: list[dict[str, Estimate]] = []
    for s in range(len(stages) + 1):
        row: dict[str, Estimate] = {}
        for j, task in enumerate(transfer.tasks):
            value = float(np.clip(centre_SK[s, j], 0.0, 1.0))
            low, high = interval(np.clip(draws_SBK[s, :, j], 0.0, 1.0))
            row[task] = Estimate(value, transfer.n_K[j], low, high)
        out.append(row)
    return out


def forecast(transfer: Transfer, order: Sequence[str], form: Form = "additive") -> dict[str, Estimate]:
    """Forecast of every task's final score for an order (task -> Estimate): the last of `forecast_rows`."""
    return forecast_rows(transfer, order, form)[-1]


def _rows(scores: Floats, n_K: Sequence[int], stages: Sequence[int], form: Form) -> Floats:
    base = scores[..., 0, :]
    own = np.diagonal(scores[..., 1:, :], axis1=-2, axis2=-1)
    if form == "additive":
        return additive_rows(base, own, scores[..., 1:, :] - scores[..., :1, :], stages)
    return multiplicative_rows(base, own, smoothed_ratios(scores, n_K), stages)


@dataclass(frozen=True, slots=True)
class ForecastError:
    """How forecasts compare with realised scores over n (run, task) points; NaN where it cannot be computed.

    mean_absolute, bias: in score units, forecast - realised.   rmse: root of the mean square.
    pearson, spearman: on values centred within each task, because the tasks' levels alone would correlate by
    themselves.
    pearson_pooled: without centring, shown next to it for that reason.
    """

    n: int
    mean_absolute: float
    bias: float
    rmse: float
    pearson: float
    spearman: float
    pearson_pooled: float


def forecast_error(predicted_NK: Floats, realised_NK: Floats) -> ForecastError:
    """Compare forecasts with realised scores, both [N runs or stages, K tasks]; pairs with a NaN are left out.

    Correlations need two or more rows: after centring within the task a single row is all zeros.
    """
    p = np.atleast_2d(np.asarray(predicted_NK, dtype=np.float64))
    r = np.atleast_2d(np.asarray(realised_NK, dtype=np.float64))
    ok = ~(np.isnan(p) | np.isnan(r))
    n = int(ok.sum())
    if n == 0:
        return ForecastError(0, *(math.nan,) * 6)
    error = (p - r)[ok]
    centred = [_centre(x, ok)[ok] for x in (p, r)]
    return ForecastError(
        n=n,
        mean_absolute=float(np.abs(error).mean()),
        bias=float(error.mean()),
        rmse=float(np.sqrt((error**2).mean())),
        pearson=_correlation(*centred),
        spearman=_correlation(*(stats.rankdata(np.round(x, 12)) for x in centred)),
        pearson_pooled=_correlation(p[ok], r[ok]),
    )


def _centre(x_NK: Floats, ok_NK: np.ndarray) -> Floats:
    counts = np.maximum(ok_NK.sum(axis=0), 1)
    return np.asarray(x_NK - np.where(ok_NK, x_NK, 0.0).sum(axis=0) / counts)


def _correlation(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 1e-12 else math.nan

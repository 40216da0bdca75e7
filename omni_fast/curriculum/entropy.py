"""Entropy and temperature: does a stage act like a change of temperature, and does that explain the forecast's error?

`H[i, j]` is the mean token entropy, in nats, of policy i on a fixed probe set of task j, row 0 the initial policy.
The effective temperature of a trained policy on a task is the temperature at which the initial policy has the entropy
that the trained one has at 1. If training mostly moved the temperature, decoding each policy at 1 / tau should shrink
what the forecast missed: a study measures whether it does, and reports it either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from omni_fast.curriculum.scores import Floats


def effective_temperature(temperatures: Sequence[float], entropies: Sequence[float], target: float) -> float:
    """The temperature at which the initial policy's entropy is `target`, linear between measured points.

    temperatures: increasing.   entropies: the initial policy's at each of them, in nats; noise that makes them fall is
    smoothed to a running maximum, since entropy rises with temperature. NaN when the target lies outside what was
    measured.
    """
    if any(later <= earlier for earlier, later in zip(temperatures, temperatures[1:], strict=False)):
        raise ValueError(f"temperatures have to increase, got {list(temperatures)}")
    rising = np.maximum.accumulate(np.asarray(entropies, dtype=np.float64))
    if not rising[0] <= target <= rising[-1]:
        return math.nan
    return float(np.interp(target, rising, np.asarray(temperatures, dtype=np.float64)))


def entropy_aware(matrix_KK: Floats, entropy_MK: Floats, weight: float) -> Floats:
    """Transfer with a price on collapsing the entropy that an earlier task needs; solve the order on it as an ablation.

    matrix_KK: T.   entropy_MK: H [K + 1, K], row 0 the initial policy, row i + 1 after the run of task i.
    A task needs entropy if its own run raises it. Placing i after such a j costs weight * (the entropy j loses to i,
    nats).
    """
    base_K, after_KK = entropy_MK[0], entropy_MK[1:]
    needs_K = np.diagonal(after_KK) > base_K
    lost_KK = np.maximum(0.0, base_K[None, :] - after_KK)
    return np.asarray(matrix_KK - weight * lost_KK * needs_K[None, :])

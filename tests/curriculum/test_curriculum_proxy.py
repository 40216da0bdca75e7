"""Proxies of transfer, effective temperature and the entropy-aware order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.curriculum import order as orders
from omni_fast.curriculum.entropy import effective_temperature, entropy_aware
from omni_fast.curriculum.proxy import agreement, cosine_matrix


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_agreement_of_a_matrix_with_itself_and_its_negative(k, seed):
    matrix = np.random.default_rng(seed).uniform(-0.1, 0.05, (k, k))
    same, opposite = agreement(matrix, 3 * matrix + 1), agreement(matrix, -matrix)
    assert (same.spearman, same.kendall, same.pairs) == pytest.approx((1, 1, 1)) and same.regret == pytest.approx(0)
    assert (opposite.spearman, opposite.pairs) == pytest.approx((-1, 0)) and opposite.regret >= -1e-12
    assert same.n == k * (k - 1)


def test_a_symmetric_proxy_leaves_every_pair_open():
    rng = np.random.default_rng(0)
    full = rng.uniform(-0.1, 0.05, (4, 4))
    cosines = cosine_matrix([rng.normal(size=32) for _ in range(4)])
    assert np.allclose(cosines, cosines.T) and np.allclose(np.diagonal(cosines), 1)
    assert agreement(full, cosines).pairs == pytest.approx(0.5)
    assert math.isnan(agreement(full, np.zeros((4, 4))).spearman)
    assert cosine_matrix([np.zeros(3), np.ones(3)])[0, 1] == 0.0


def _softmax_entropy(logits, temperature):
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


@given(st.floats(0.55, 1.9), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_effective_temperature_recovers_a_rescaled_policy(tau, seed):
    """A policy whose logits are those of the initial one divided by tau has effective temperature tau."""
    logits = np.random.default_rng(seed).normal(0, 2, 50)
    grid = np.linspace(0.5, 2, 31)
    found = effective_temperature(
        grid, [_softmax_entropy(logits, t) for t in grid], _softmax_entropy(logits / tau, 1.0)
    )
    assert found == pytest.approx(tau, abs=0.01)


def test_effective_temperature_outside_the_sweep_and_bad_sweeps():
    assert math.isnan(effective_temperature([0.5, 1.0], [0.2, 0.4], 0.5))
    assert effective_temperature([0.5, 1.0, 1.5], [0.2, 0.19, 0.4], 0.3) == pytest.approx(1.25)
    with pytest.raises(ValueError, match="increase"):
        effective_temperature([1.0, 1.0], [0.2, 0.4], 0.3)


def test_entropy_aware_order_moves_the_task_that_needs_entropy_behind_the_collapsing_one():
    # 0 (math) collapses entropy everywhere; 1 (writing) raises its own; transfer alone slightly prefers writing first
    matrix = np.array([[0.0, 0.01], [-0.01, 0.0]])
    entropy = np.array([[1.0, 1.5], [0.4, 0.7], [1.1, 1.9]])
    assert orders.exact(matrix).order == (1, 0)
    assert orders.exact(entropy_aware(matrix, entropy, 0.1)).order == (0, 1)
    assert np.array_equal(entropy_aware(matrix, entropy, 0.0), matrix)
    assert entropy_aware(matrix, entropy, 0.1)[1, 0] == matrix[1, 0], "math does not need entropy: no price"

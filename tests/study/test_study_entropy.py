"""Effective temperature and the entropy-aware order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.curriculum import order as orders
from omni_fast.study.analysis_entropy import effective_temperature, entropy_aware


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


def test_effective_temperature_outside_the_sweep_and_of_a_noisy_one():
    assert math.isnan(effective_temperature([0.5, 1.0], [0.2, 0.4], 0.5))
    assert effective_temperature([0.5, 1.0, 1.5], [0.2, 0.19, 0.4], 0.3) == pytest.approx(1.25)


def test_entropy_aware_order_moves_the_task_that_needs_entropy_behind_the_collapsing_one():
    # 0 (math) collapses entropy everywhere; 1 (writing) raises its own; transfer alone slightly prefers writing first
    matrix = np.array([[0.0, 0.01], [-0.01, 0.0]])
    entropy = np.array([[1.0, 1.5], [0.4, 0.7], [1.1, 1.9]])
    assert orders.exact(matrix).order == (1, 0)
    assert orders.exact(entropy_aware(matrix, entropy, 0.1)).order == (0, 1)
    assert np.array_equal(entropy_aware(matrix, entropy, 0.0), matrix)
    assert entropy_aware(matrix, entropy, 0.1)[1, 0] == matrix[1, 0], "math does not need entropy: no price"

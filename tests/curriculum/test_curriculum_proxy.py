"""Proxies of transfer."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_fast.curriculum.proxy import agreement, cosine_matrix


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_agreement_of_a_matrix_with_itself_and_its_negative(k, seed):
    matrix = np.random.default_rng(seed).uniform(-0.1, 0.05, (k, k))
    same, opposite = agreement(matrix, 3 * matrix + 1), agreement(matrix, -matrix)
    assert (same.spearman, same.kendall, same.pairs) == pytest.approx((1, 1, 1)) and same.regret == pytest.approx(0)
    assert (opposite.spearman, opposite.pairs) == pytest.approx((-1, 0)) and opposite.regret >= -1e-12


def test_a_symmetric_proxy_leaves_every_pair_open():
    rng = np.random.default_rng(0)
    full = rng.uniform(-0.1, 0.05, (4, 4))
    cosines = cosine_matrix([rng.normal(size=32) for _ in range(4)])
    assert np.allclose(cosines, cosines.T) and np.allclose(np.diagonal(cosines), 1)
    assert agreement(full, cosines).pairs == pytest.approx(0.5)
    assert math.isnan(agreement(full, np.zeros((4, 4))).spearman)
    assert cosine_matrix([np.zeros(3), np.ones(3)])[0, 1] == 0.0

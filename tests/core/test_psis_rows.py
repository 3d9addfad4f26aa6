"""Smoothing many rows at once gives what smoothing them one by one gives."""

from __future__ import annotations

import numpy as np
import pytest
from test_psis import LAWS

from pyro_vi_kit.core.psis import psis_rows
from pyro_vi_kit.posterior.evaluation import smooth

ROWS = 40


def assert_same(log_w):
    found = psis_rows(log_w)
    for i, column in enumerate(log_w.T):
        one = smooth(column)
        for name in ("khat", "ess", "log_mean_weight", "log_mean_weight_se"):
            expected, value = getattr(one, name), getattr(found, name)[i]
            assert value == pytest.approx(expected, rel=1e-10, abs=1e-10), (name, i)


@pytest.mark.parametrize("draws", [1, 4, 20, 25, 100, 1000, 3000])
@pytest.mark.parametrize("law", LAWS)
def test_rows_are_smoothed_as_single_vectors(law, draws):
    rng = np.random.default_rng(draws)
    assert_same(np.stack([LAWS[law](rng, draws) for _ in range(ROWS)], 1))


def test_rows_of_all_kinds_stand_side_by_side():
    """Flat rows, flat tails, ties at the threshold, zeros, refused draws, and no weight at all."""
    rng = np.random.default_rng(0)
    usual = rng.standard_normal((500, 4))
    flat = np.full((500, 1), -3.2)
    flat_tail = np.where(rng.random((500, 1)) < 0.5, 0.0, -1.0)
    ties = np.round(rng.standard_normal((500, 3)), 1)
    zeros = np.where(rng.random((500, 2)) < 0.95, -np.inf, rng.standard_normal((500, 2)))
    refused = usual[:, :2].copy()
    refused[:3] = np.nan
    refused[5] = np.inf
    nothing = np.full((500, 1), -np.inf)
    far = np.concatenate([np.zeros((3, 1)), np.full((497, 1), -2000.0)])
    assert_same(np.concatenate([usual, flat, flat_tail, ties, zeros, refused, nothing, far], 1))

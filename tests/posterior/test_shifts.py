"""Moves of means and sds by weights and by chains, and their errors over repeats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vi_kit.core.psis import psis
from pyro_vi_kit.posterior.diagnostics.shifts import (
    by_chains,
    by_weights,
    flattened,
    smoothed_khats,
)

S = 2000


def ratios(rng, loc, scale):
    """Draws of N(loc, scale), and log weights for N(0, 1) in each dimension."""
    u = rng.standard_normal((S, len(scale)))
    z = loc + u * scale
    return z, (-0.5 * z**2 + 0.5 * u**2 + np.log(scale)).sum(1)


def test_weights_move_a_normal_to_where_it_belongs():
    """The corrected moments are 0 and 1: moves in corrected sds are -loc and -log(scale)."""
    loc, scale = np.array([0.3, 0.0]), np.array([1.0, 1.2])
    scores = []
    for seed in range(200):
        z, log_w = ratios(np.random.default_rng(seed), loc, scale)
        found = by_weights(z, psis(log_w))
        scores.append(
            [(found.mean + loc) / found.mean_se, (found.sd + np.log(scale)) / found.sd_se]
        )
    scores = np.array(scores)
    # The sd of 200 scores has a standard error of 0.05, their mean one of 0.07; smoothing pulls in the
    # tail, which costs a few hundredths more.
    assert np.all(np.abs(scores.std(0) - 1) < 0.25)
    assert np.all(np.abs(scores.mean(0)) < 0.3)


def test_even_weights_move_nothing_for_certain():
    z = np.random.default_rng(0).standard_normal((S, 3))
    found = by_weights(z, psis(np.zeros(S)))
    for part in found:
        np.testing.assert_allclose(part, 0.0, atol=1e-12)


def test_chains_errors_cover_over_repeats():
    """Chains of 5 independent states from N(0.2, 1.1), and draws of q = N(0, 1)."""
    scores = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        plain = rng.standard_normal((S, 1))
        states = 0.2 + 1.1 * rng.standard_normal((5, 400, 1))
        x = (states - plain.mean(0)) / plain.std(0)
        found = by_chains(x.mean(0), (x**2).mean(0), plain)
        scores.append(
            [
                (found.mean[0] - 0.2 / 1.1) / found.mean_se[0],
                (found.sd[0] - math.log(1.1)) / found.sd_se[0],
            ]
        )
    scores = np.array(scores)
    assert np.all(np.abs(scores.std(0) - 1) < 4 / math.sqrt(600))
    assert np.all(np.abs(scores.mean(0)) < 4 / math.sqrt(300) + 0.05)


def test_a_constant_does_not_move_and_no_move_is_infinite():
    z = np.stack([np.full(S, 7.0), np.r_[1.0, np.zeros(S - 1)]], 1)
    found = by_weights(z, psis(np.r_[-50.0, np.zeros(S - 1)]))
    assert found.mean[0] == found.sd[0] == found.mean_se[0] == 0.0
    assert all(np.isfinite(part).all() for part in found)


def test_disagreement_is_what_noise_does_not_explain():
    a = by_weights(np.random.default_rng(0).standard_normal((S, 1)), psis(np.zeros(S)))
    moved = a._replace(mean=np.array([0.5]), mean_se=np.array([0.1]))
    assert a.apart(moved, 3.0)[0] == pytest.approx(0.2)
    assert a.apart(moved, 6.0)[0] < 0


def test_numbers_lie_side_by_side():
    flat = flattened({"a": np.ones((4, 2, 3)), "b": np.arange(4)})
    assert flat.shape == (4, 7)
    np.testing.assert_array_equal(flat[:, 6], [0, 1, 2, 3])


def test_khats_say_which_number_is_wrong():
    """q is exact but for one sd of 0.6, whose weights have a tail of shape 1 - 0.36 = 0.64."""
    scale = np.array([1.0, 1.0, 0.6, 1.0])
    found = []
    for seed in range(10):
        z, log_w = ratios(np.random.default_rng(seed), np.zeros(4), scale)
        found.append(smoothed_khats(z, psis(log_w)))
    found = np.array(found)
    assert (found.argmax(1) == 2).sum() >= 8
    # A heuristic: single k-hats of what is left of noise scatter by half.
    assert found[:, 2].mean() > 0.5 > found[:, [0, 1, 3]].mean() + 0.3


def test_a_constant_has_no_khat():
    z, log_w = ratios(np.random.default_rng(0), np.zeros(1), np.ones(1) * 0.8)
    found = smoothed_khats(np.concatenate([z, np.ones_like(z)], 1), psis(log_w))
    assert np.isneginf(found[1])
    assert np.isfinite(found[0])

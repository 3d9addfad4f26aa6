"""Tests of uniformity: their size, their power, and simultaneous bands, all by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from pyro_vi_kit.validation.calibrate.calibration_tests import (
    PROBS,
    assess,
    band,
    bias,
    coverage_row,
    covered,
    dispersion,
    ecdf,
    holm,
    points_for,
    probability_inside,
    uniformity,
)

REPEATS = 3000


def draws(repeats, count, seed, shift=0.0, scale=1.0):
    """Probabilities of truths `[repeats, count]` where a normal guide is off by this much.

    The truth is N(0, 1), the guide N(shift, scale).
    """
    truth = np.random.default_rng(seed).standard_normal((repeats, count))
    return norm.cdf((truth - shift) / scale)


def four_errors(p, repeats):
    """Four standard errors of a share of so many repeats."""
    return 4.0 * np.sqrt(p * (1.0 - p) / repeats)


@pytest.mark.parametrize("test", [uniformity, lambda v: bias(v)[1], lambda v: dispersion(v)[1]])
@pytest.mark.parametrize("count", [25, 60])
def test_size_under_the_null(test, count):
    p = np.array([test(values) for values in draws(600, count, count)])
    for level in (0.05, 0.2):
        # At most the level; counts are discrete, so that it may be a little less.
        assert (p <= level).mean() <= level + four_errors(level, 600)
        assert (p <= level).mean() >= 0.6 * level - four_errors(level, 600)


@pytest.mark.parametrize("count", [20, 150])
def test_bands_hold_whole_curves(count):
    limits = band(count)
    outside = 0
    for values in draws(REPEATS, count, 5):
        curve = ecdf(values, limits.points)
        outside += bool(((curve < limits.low - 1e-12) | (curve > limits.high + 1e-12)).any())
    # Simultaneous at 95 % or, counts being discrete, a little above.
    assert outside / REPEATS <= 0.05 + four_errors(0.05, REPEATS)
    assert outside / REPEATS >= 0.03


def test_the_probability_to_stay_inside_is_that_of_simulation():
    level, count = 0.02, 40
    from scipy.stats import binom

    points = points_for(count)
    inside = 0
    for values in draws(REPEATS, count, 11):
        below = np.rint(ecdf(values, points) * count)
        tails = np.minimum(binom.cdf(below, count, points), binom.sf(below - 1, count, points))
        inside += bool((tails > level / 2).all())
    exact = probability_inside(count, level)
    assert inside / REPEATS == pytest.approx(exact, abs=four_errors(exact, REPEATS))


def test_the_test_and_the_band_agree():
    limits = band(60, 0.95)
    for values in draws(100, 60, 3, scale=0.8):
        curve = ecdf(values, limits.points)
        outside = bool(((curve < limits.low - 1e-12) | (curve > limits.high + 1e-12)).any())
        # The band is the widest whose probability is 95 % or more, so that the test rejects outside.
        assert outside == (uniformity(values) <= 0.05)


def test_power_and_direction():
    """With 200 simulations half a sd of shift, or sds that are 30 % off, are always seen."""
    for values in draws(20, 200, 1, shift=0.5):
        number = assess(values)
        assert number.p_bias < 1e-3
        assert number.directions(0.01)[0] == "biased up"
        # The guide is N(0.5, 1), so its own sd is 1: the mean score has an error of 1 / sqrt(200).
        assert number.bias == pytest.approx(0.5, abs=4 / np.sqrt(200))
    for scale, words in ((0.7, "too narrow"), (1.4, "too wide")):
        for values in draws(20, 200, 2, scale=scale):
            number = assess(values)
            assert number.p_dispersion < 1e-3
            assert number.directions(0.01) == [words]
            # The sd of a sd from N normal values: 1 / sqrt(2 N), relative.
            assert number.dispersion == pytest.approx(1 / scale, rel=4 / np.sqrt(400))


def test_bias_does_not_see_dispersion_nor_the_reverse():
    narrow = draws(1000, 60, 8, scale=0.5)
    assert np.mean([bias(v)[1] <= 0.05 for v in narrow]) <= 0.05 + four_errors(0.05, 1000)
    shifted = draws(1000, 60, 9, shift=0.7)
    assert np.mean([dispersion(v)[1] <= 0.05 for v in shifted]) <= 0.05 + four_errors(0.05, 1000)


def test_the_walk_by_hand():
    # Three on the same side: |walk| reaches 3 in 2 of 8 walks.
    assert bias(np.array([0.9, 0.8, 0.7]))[1] == pytest.approx(2 / 8)
    # + - +: reaches 1 always.
    assert bias(np.array([0.95, 0.1, 0.7]))[1] == pytest.approx(1.0)


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9, 0.8])).tolist() == pytest.approx([1.0, 1.0])


def test_coverage_against_the_normal():
    values = draws(1, 100_000, 4, scale=0.5)[0]
    for prob in PROBS:
        exact = 2 * norm.cdf(0.5 * norm.ppf(0.5 + prob / 2)) - 1
        assert covered(values, prob) == pytest.approx(exact, abs=four_errors(exact, 100_000))


def test_binomial_intervals_hold_the_share():
    hits = 0
    for values in draws(500, 50, 6):
        row = coverage_row(values, 0.9)
        hits += row["low"] <= 0.9 <= row["high"]
        assert row["low"] <= row["coverage"] <= row["high"]
    assert hits / 500 >= 0.95 - four_errors(0.95, 500)
    assert coverage_row(np.full(30, 0.5), 0.5)["high"] == 1.0
    assert coverage_row(np.full(30, 0.999), 0.5)["low"] == 0.0

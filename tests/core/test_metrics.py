"""Distances between draws against closed forms and against their own null distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vi_kit.core import metrics
from pyro_vi_kit.core.errors import OptionError


def _unit(dimensions: int) -> dict[str, np.ndarray]:
    return {"location": np.zeros(dimensions), "scale": np.ones(dimensions)}


def test_distance_of_shifted_draws_is_the_shift():
    a = np.random.default_rng(0).normal(size=(500, 1))
    assert metrics.sliced_wasserstein(a, a + 0.7, **_unit(1)) == pytest.approx(0.7)
    assert metrics.sliced_wasserstein(a, a, **_unit(1)) == 0


def test_distance_of_shifted_normals():
    draws, shift = 4000, 1.5
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(draws, 1)), rng.normal(shift, 1, (draws, 1))
    # W1 is at least the difference of the means, whose sd is sqrt(2 / draws), and exceeds it only
    # where sorted draws cross, which a shift of 1.5 sd leaves to the extreme tails.
    distance = metrics.sliced_wasserstein(a, b, **_unit(1))
    assert abs(distance - shift) < 4 * math.sqrt(2 / draws)


def test_distance_in_many_dimensions_is_the_mean_projected_shift():
    dimensions, shift = 5, np.array([1.0, 0, 0, 0, 0])
    a = np.random.default_rng(2).normal(size=(300, dimensions))
    distance = metrics.sliced_wasserstein(a, a + shift, **_unit(dimensions), directions=4000)
    # The first coordinate of a uniform direction has E|u| = Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))
    # and E u^2 = 1 / D.
    mean = math.gamma(dimensions / 2) / (math.sqrt(math.pi) * math.gamma((dimensions + 1) / 2))
    error = math.sqrt((1 / dimensions - mean**2) / 4000)
    assert abs(distance - mean) < 4 * error


def test_distance_by_the_definition():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    location, scale = np.array([1.0, 2, 3]), np.array([0.5, 1, 2])
    directions = np.random.default_rng(99).standard_normal((3, 256))
    total = 0.0
    for unit in (directions / np.sqrt((directions**2).sum(0))).T:
        projected = [sorted(((x - location) / scale) @ unit) for x in (a, b)]
        total += np.mean(np.abs(np.subtract(*projected)))
    distance = metrics.sliced_wasserstein(a, b, location=location, scale=scale)
    assert distance == pytest.approx(total / 256, rel=1e-12)


def test_distance_does_not_depend_on_order_or_units():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(100, 2)), rng.normal(size=(100, 2))
    distance = metrics.sliced_wasserstein(a, b, **_unit(2))
    shuffled = metrics.sliced_wasserstein(rng.permutation(b), rng.permutation(a), **_unit(2))
    assert shuffled == pytest.approx(distance, rel=1e-12)
    location, scale = np.array([7.0, -3]), np.array([10.0, 0.1])
    moved = metrics.sliced_wasserstein(
        a * scale + location, b * scale + location, location=location, scale=scale
    )
    assert moved == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize(
    ("b", "scale", "message"),
    [
        (np.zeros((5, 2)), [1, 1], "as many draws from each"),
        (np.zeros((4, 2)), [1, 0], "not positive in columns \\[1\\]"),
        (np.full((4, 2), np.nan), [1, 1], "8 of 8 values of b are not finite"),
        (np.zeros(4), [1, 1], "must be a matrix"),
    ],
)
def test_distance_refuses(b, scale, message):
    with pytest.raises(OptionError, match=message):
        metrics.sliced_wasserstein(np.zeros((4, 2)), b, location=[0, 0], scale=scale)


@pytest.mark.parametrize("available", [1200, 400], ids=["disjoint sets", "scaled half-sets"])
def test_null_is_that_of_exact_draws(available):
    draws, dimensions, trials = 400, 4, 40
    rng = np.random.default_rng(5)
    exact = [
        metrics.sliced_wasserstein(*rng.normal(size=(2, draws, dimensions)), **_unit(dimensions))
        for _ in range(trials)
    ]
    null = [
        metrics.sliced_wasserstein_null(
            rng.normal(size=(available, dimensions)), draws, repeats=4, seed=trial
        ).mean()
        for trial in range(trials)
    ]
    # Both are means over independent trials. Leaving the scaling out would be off by 41 %.
    error = math.sqrt((np.var(exact) + np.var(null)) / trials)
    assert abs(np.mean(exact) - np.mean(null)) < 4 * error
    assert 4 * error < 0.2 * np.mean(exact)


def test_a_wrong_approximation_is_outside_the_null():
    reference, approx = np.random.default_rng(6).normal(size=(2, 500, 3))
    null = metrics.sliced_wasserstein_null(reference, 500)
    # 50 % too wide in every direction is 0.5 * E|z| = 0.4 apart; the null is near 0.08.
    assert metrics.sliced_wasserstein(reference, 1.5 * approx, **_unit(3)) > 3 * null.max()


def test_null_is_reproducible_and_never_compares_draws_with_themselves():
    reference = np.random.default_rng(6).normal(size=(50, 2))
    first, second = (metrics.sliced_wasserstein_null(reference, 25, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (50,)
    assert first.min() > 0


def test_null_needs_a_reference():
    with pytest.raises(OptionError, match="at least 4 draws"):
        metrics.sliced_wasserstein_null(np.zeros((3, 1)), 10)


def test_errors_of_a_shifted_and_stretched_copy_are_exact():
    reference = np.random.default_rng(7).normal(3, 2, (1000, 2, 3))
    mean, sd = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    errors = metrics.compare_draws(reference, mean + 1.5 * (reference - mean) + 0.25 * sd)
    np.testing.assert_allclose(errors.mean_error, np.full((2, 3), 0.25))
    np.testing.assert_allclose(errors.sd_ratio, np.full((2, 3), 1.5))
    for level, error in zip((0.05, 0.5, 0.95), errors[2:], strict=True):
        score = (np.quantile(reference, level, axis=0) - mean) / sd
        np.testing.assert_allclose(error, 0.5 * score + 0.25)


def test_errors_of_exact_draws_are_within_monte_carlo_error():
    rng = np.random.default_rng(8)
    n, m = 8000, 2000
    errors = metrics.compare_draws(rng.normal(size=n), rng.normal(size=m))
    scale = math.sqrt(1 / n + 1 / m)
    assert abs(errors.mean_error) < 4 * scale
    # sd of a sample sd of normals: 1 / sqrt(2 n); of a quantile: sqrt(p (1 - p)) / density.
    assert abs(errors.sd_ratio - 1) < 4 * scale / math.sqrt(2)
    density = math.exp(-0.5 * 1.6449**2) / math.sqrt(2 * math.pi)
    tail_error = math.sqrt(0.05 * 0.95) / density
    assert abs(errors.q05_error) < 4 * scale * tail_error
    assert abs(errors.q95_error) < 4 * scale * tail_error
    assert abs(errors.q50_error) < 4 * scale * math.sqrt(math.pi / 2)


def test_constants_count_as_right_or_as_infinitely_wrong():
    rng = np.random.default_rng(9)
    ones = 1 + 1e-16 * rng.integers(-2, 3, (100, 3))
    approx = np.column_stack([np.ones(100), np.full(100, 0.5), rng.normal(1, 0.1, 100)])
    errors = metrics.compare_draws(ones, approx)
    np.testing.assert_array_equal(errors.mean_error[:2], [0, -np.inf])
    np.testing.assert_array_equal(errors.sd_ratio, [1, 1, np.inf])
    np.testing.assert_array_equal(errors.q95_error, [0, -np.inf, np.inf])


@pytest.mark.parametrize(
    ("approx", "message"),
    [
        (np.zeros((5, 3)), "draws of shape \\(3,\\) cannot be compared"),
        (np.zeros((1, 2)), "at least 2 draws"),
        (np.full((5, 2), np.inf), "not finite"),
    ],
)
def test_comparison_refuses(approx, message):
    with pytest.raises(OptionError, match=message):
        metrics.compare_draws(np.zeros((4, 2)), approx)


def test_mcse_and_interval():
    draws = np.random.default_rng(10).normal(5, 2, (10_000, 2))
    mcse = metrics.mcse_mean(draws)
    np.testing.assert_allclose(mcse, 0.02, rtol=4 / math.sqrt(2 * 10_000))
    assert np.all(np.abs(draws.mean(axis=0) - 5) < 4 * mcse)
    low, high = metrics.interval(np.arange(101), 0.9)
    assert (low, high) == (pytest.approx(5), pytest.approx(95))
    low, high = metrics.interval(draws)
    assert low.shape == high.shape == (2,)


@pytest.mark.parametrize("prob", [0, 1, 95])
def test_interval_refuses_what_is_no_probability(prob):
    with pytest.raises(OptionError, match="between 0 and 1"):
        metrics.interval(np.arange(5), prob)

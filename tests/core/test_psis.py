"""Pareto smoothing against ArviZ, against laws with a known tail, and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.export import arviz_major, import_arviz
from pyro_vi_kit.core.psis import khat_error, psis, resample, weighted_moments

SIZES = (100, 1000, 10_000)
LAWS = {
    "normal": lambda rng, size: rng.normal(0, 1, size),
    "wide normal": lambda rng, size: rng.normal(-300, 20, size),
    "student": lambda rng, size: rng.standard_t(3, size),
    "pareto 0.2": lambda rng, size: -0.2 * np.log(rng.random(size)),
    "pareto 0.9": lambda rng, size: -0.9 * np.log(rng.random(size)),
    "bounded": lambda rng, size: np.log(rng.random(size)),
}


def _arviz_psis(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    with np.errstate(over="ignore"):  # its profile likelihood overflows harmlessly for long tails
        smoothed, k = import_arviz().psislw(log_w.copy())
    return smoothed, float(k)


def _normal_ratios(scale: float, dim: int, shift: float = 0.0):
    """Log weights of standard normals under draws of narrower, wider or shifted ones."""

    def law(rng, size):
        u = rng.standard_normal((size, dim))
        return (-0.5 * (shift + scale * u) ** 2 + 0.5 * u**2 + math.log(scale)).sum(1)

    return law


SHAPES = LAWS | {
    "narrow in 1": _normal_ratios(0.6, 1),
    "narrow in 20": _normal_ratios(0.9, 20),
    "wide in 1": _normal_ratios(1.4, 1),
    "wide in 20": _normal_ratios(1.1, 20),
    "shifted": _normal_ratios(1.0, 3, 0.5),
    "cauchy": lambda rng, size: rng.standard_cauchy(size),
    "nearly even": lambda rng, size: 1e-3 * rng.standard_normal(size),
    "many ties": lambda rng, size: np.round(rng.normal(0, 1, size), 1),
    "two heaps": lambda rng, size: (
        np.where(rng.random(size) < 0.9, 0.0, 5.0) + rng.normal(size=size)
    ),
    "one giant": lambda rng, size: np.r_[rng.normal(size=size - 1), 30.0],
}


@pytest.mark.skipif(arviz_major() >= 1, reason="psislw moved in ArviZ 1.x; compared with 0.x")
@pytest.mark.parametrize("shape", SHAPES)
def test_khat_agrees_with_arviz_on_many_shapes(shape):
    for size in (50, 400, 4000, 16_000):
        log_w = SHAPES[shape](np.random.default_rng(size), size)
        expected, k = _arviz_psis(log_w)
        result = psis(log_w)
        assert result.khat == pytest.approx(k, abs=0.01)
        assert result.ess == pytest.approx(1 / np.sum(np.exp(2 * expected)), rel=0.01)


# Ties with the threshold are in the tail there, as excesses of zero; 0.23 and we leave them out. Most of
# a Cauchy's weights underflow, which it divides by.
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("many ties", "cauchy")])
def test_khat_agrees_with_arviz_1(shape):
    """ArviZ 1.x has it in arviz_stats, as ``psislw`` of log likelihoods: of minus log weights.

    Its tail has ``floor(3 sqrt(S))`` draws, where 0.23 and the paper round up: sizes that are squares.
    """
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    for size in (400, 1600, 10_000):
        log_w = SHAPES[shape](np.random.default_rng(size), size)
        with np.errstate(over="ignore"):
            _, k = array_stats.psislw(-log_w)
        assert psis(log_w).khat == pytest.approx(float(k), abs=0.01)


@pytest.mark.parametrize(
    "shape", ["normal", "pareto 0.2", "pareto 0.9", "narrow in 1", "narrow in 20"]
)
def test_khats_error_covers_over_repeated_draws(shape):
    size, repeats = 4000, 200
    found = [psis(SHAPES[shape](np.random.default_rng(seed), size)) for seed in range(repeats)]
    khats = np.array([each.khat for each in found])
    errors = np.array([each.khat_se for each in found])
    covered = np.mean(np.abs(khats - khats.mean()) < 2 * errors)
    # 95.4 % of normals; the share of 200 has a standard error of 1.5 %.
    assert covered > 0.954 - 3 * 0.015
    assert 0.8 < errors.mean() / khats.std() < 1.3


def test_khats_error_shrinks_with_draws_and_is_none_where_nothing_was_estimated():
    assert khat_error(0.7, 4000) == pytest.approx(0.12, abs=0.01)
    # The tail grows with the root of the draws: its error with their fourth root.
    assert khat_error(0.7, 64_000) == pytest.approx(khat_error(0.7, 4000) / 2, rel=0.05)
    assert khat_error(math.inf, 4000) == khat_error(-math.inf, 4000) == 0.0


@pytest.mark.skipif(arviz_major() >= 1, reason="psislw moved in ArviZ 1.x; compared with 0.x")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_agrees_with_arviz(law, size):
    for seed in range(10):
        log_w = LAWS[law](np.random.default_rng(seed), size)
        expected, k = _arviz_psis(log_w)
        result = psis(log_w)
        assert result.khat == pytest.approx(k, abs=1e-8)
        np.testing.assert_allclose(result.log_weights, expected, rtol=0, atol=1e-8)
        assert np.logaddexp.reduce(result.log_weights) == pytest.approx(0, abs=1e-12)
        assert result.ess == pytest.approx(1 / np.sum(np.exp(2 * expected)))


@pytest.mark.skipif(arviz_major() >= 1, reason="psislw moved in ArviZ 1.x; compared with 0.x")
def test_agrees_with_arviz_where_weights_are_zero():
    rng = np.random.default_rng(0)
    log_w = np.where(rng.random(1000) < 0.3, -np.inf, rng.normal(size=1000))
    expected, k = _arviz_psis(log_w)
    result = psis(log_w)
    assert result.khat == pytest.approx(k, abs=1e-8)
    np.testing.assert_allclose(result.log_weights, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_finds_the_tail_of_a_pareto_law(k):
    size = 10_000
    tail = math.ceil(3 * math.sqrt(size))
    khat = psis(-k * np.log(np.random.default_rng(1).random(size))).khat
    # Excesses over any threshold are exactly generalized Pareto with shape k; the maximum
    # likelihood estimate from `tail` of them has sd (1 + k) / sqrt(tail), and the prior adds 10
    # observations at 0.5. Four standard errors, and the estimator's O(1 / tail) bias on top.
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    assert abs(khat - expected) < 4 * (1 + k) / math.sqrt(tail) + 2 / tail


def _gaussian_ratios(rng: np.random.Generator, size: int, log_evidence: float) -> np.ndarray:
    """Log weights of N(0, 1), scaled by the evidence, under draws of N(0.3, 1.5)."""
    z = rng.normal(0.3, 1.5, size)
    log_q = -0.5 * ((z - 0.3) / 1.5) ** 2 - math.log(1.5)
    return log_evidence - 0.5 * z**2 - log_q


@pytest.mark.parametrize("log_evidence", [-1234.5, 0.0, 7.0])
def test_evidence_of_a_gaussian(log_evidence):
    result = psis(_gaussian_ratios(np.random.default_rng(2), 4000, log_evidence))
    assert abs(result.log_mean_weight - log_evidence) < 4 * result.log_mean_weight_se
    assert result.khat < 0.5


def test_evidence_standard_error_is_calibrated():
    repeats = 400
    results = [
        psis(_gaussian_ratios(np.random.default_rng(seed), 1000, 0.0)) for seed in range(repeats)
    ]
    scores = np.array([r.log_mean_weight / r.log_mean_weight_se for r in results])
    # The sd of `repeats` standard normals has a standard error of 1 / sqrt(2 repeats) = 0.035.
    assert abs(scores.std() - 1) < 4 / math.sqrt(2 * repeats)
    # The mean has one of 1 / sqrt(repeats) = 0.05; the log's bias, -se / 2, is 0.02 / 2.
    assert abs(scores.mean()) < 4 / math.sqrt(repeats) + 0.02


@pytest.mark.parametrize("size", [2, 10, 1000])
@pytest.mark.parametrize("level", [0.0, -1e4, 1e6])
@pytest.mark.parametrize("noise", [0.0, 1e-14])
def test_equal_weights_are_a_perfect_fit(size, level, noise):
    log_w = level + noise * np.random.default_rng(0).standard_normal(size)
    result = psis(log_w)
    assert result.khat == -math.inf
    assert result.ess == pytest.approx(size)
    assert result.log_mean_weight == pytest.approx(level, abs=1e-9)
    assert result.log_mean_weight_se < 1e-6
    np.testing.assert_allclose(result.log_weights, -math.log(size))


def test_a_flat_top_is_no_tail():
    log_w = np.where(np.arange(1000) < 400, -np.inf, 2.0)
    result = psis(log_w)
    assert result.khat == -math.inf
    assert result.ess == pytest.approx(600)
    assert result.log_mean_weight == pytest.approx(2 + math.log(0.6))


@pytest.mark.parametrize(
    "log_w",
    [
        [3.0],
        np.linspace(0, 1, 20),  # ceil(20 / 5) = 4 draws in the tail
        np.r_[np.full(996, -2000.0), 0.0, -1.0, -2.0, -3.0],  # the others underflow
        np.r_[np.zeros(999), 50.0],  # one draw above a flat body
    ],
)
def test_too_short_a_tail_is_not_trusted(log_w):
    result = psis(log_w)
    assert result.khat == math.inf
    assert np.logaddexp.reduce(result.log_weights) == pytest.approx(0, abs=1e-12)
    assert np.all(np.isfinite(np.exp(result.log_weights)))


@pytest.mark.parametrize("step", [1e-300, 1e-12, 1.0, 600.0])
def test_ties_and_extreme_steps_give_a_verdict(step):
    log_w = step * np.random.default_rng(0).integers(0, 4, 1000)
    result = psis(log_w)
    assert not math.isnan(result.khat)
    assert not np.isnan(result.log_weights).any()


@pytest.mark.parametrize(
    ("log_w", "message"),
    [
        ([0.0, np.nan, np.nan, np.inf], "2 NaN and 1 \\+inf among 4"),
        ([-np.inf, -np.inf], "all 2 importance weights are zero"),
        ([[0.0, 1.0]], "shape \\(1, 2\\)"),
        ([], "shape \\(0,\\)"),
    ],
)
def test_impossible_weights_are_refused(log_w, message):
    with pytest.raises(OptionError, match=message):
        psis(log_w)


def test_input_is_left_alone():
    log_w = np.random.default_rng(0).normal(size=200)
    before = log_w.copy()
    psis(log_w)
    np.testing.assert_array_equal(log_w, before)


def test_resampling_counts_are_the_rounded_expectations():
    log_w = np.random.default_rng(3).normal(size=50)
    expected = 777 * np.exp(log_w) / np.exp(log_w).sum()
    counts = np.bincount(resample(log_w, 777, np.random.default_rng(4)), minlength=50)
    # A systematic pick takes floor or ceil of each expectation, nothing else.
    assert np.all(np.abs(counts - expected) < 1 + 1e-9)


def test_resampling_is_unbiased():
    log_w, repeats = np.log([0.05, 0.15, 0.8]), 2000
    rng = np.random.default_rng(5)
    counts = np.mean(
        [np.bincount(resample(log_w, 7, rng), minlength=3) for _ in range(repeats)], axis=0
    )
    # Each count is floor or ceil of its expectation, so its sd is at most 1/2.
    np.testing.assert_allclose(counts, 7 * np.exp(log_w), atol=4 * 0.5 / math.sqrt(repeats))


def test_resampling_equal_weights_permutes_and_never_takes_a_zero_weight():
    picks = resample(np.zeros(100), 100, np.random.default_rng(0))
    assert sorted(picks) == list(range(100))
    assert not np.array_equal(picks, np.arange(100))
    log_w = np.r_[-np.inf, np.zeros(10), -np.inf, -np.inf]
    picks = resample(log_w, 1000, np.random.default_rng(1))
    assert set(picks) == set(range(1, 11))
    same = resample(log_w, 1000, np.random.default_rng(1))
    np.testing.assert_array_equal(picks, same)


def test_resampling_nothing_is_refused():
    with pytest.raises(OptionError, match="at least 1"):
        resample([0.0], 0, np.random.default_rng(0))


def test_weighted_moments():
    values = np.random.default_rng(6).normal(size=(500, 2, 3))
    mean, sd = weighted_moments(values, np.full(500, -3.0))
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(sd, values.std(axis=0))
    mean, sd = weighted_moments([1.0, 5.0, np.nan], [math.log(3), 0.0, -np.inf])
    assert mean == pytest.approx(2.0)
    assert sd == pytest.approx(math.sqrt(3.0))


def test_weighted_moments_need_matching_lengths():
    with pytest.raises(OptionError, match="3 log weights do not fit values of shape \\(2, 4\\)"):
        weighted_moments(np.zeros((2, 4)), np.zeros(3))

"""The log evidence by importance weights: its value, and whether its standard error is one."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact
from toys import gaussian, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.psis import psis
from pyro_vi_kit.posterior.corrections import evidence

REPEATS = 40


def fitted(model, guide):
    return vi.fit(model, guide=guide, seed=0, progress=False)


def regression():
    """A correlated regression with its evidence in closed form, for which mean_field is wrong."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    X[:, 2] = 0.7 * X[:, 1] + 0.7 * X[:, 2]
    y = X.sum(-1) + torch.randn(30, generator=generator, dtype=torch.float64)

    def model(X, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(X @ beta, 1.0).to_event(1), obs=y)

    return vi.Model(model, X, y), exact(X, y, prior_sd=2.0, noise_sd=1.0)[2]


def covered(errors, found):
    """How many of the repeats have the truth within two standard errors."""
    return sum(abs(value - errors) <= 2 * se for value, se in found)


# Of 40 repeats with a coverage of 95 % fewer than 33 are covered once in a thousand.
LEAST = 33


def test_two_standard_errors_cover_a_conjugate_evidence():
    model, truth = regression()
    posterior = fitted(model, "mean_field")
    found = [posterior.evidence(1000, seed=seed) for seed in range(REPEATS)]
    assert covered(truth, found) >= LEAST
    values = np.array([value for value, _ in found])
    # Unbiased to within four standard errors of the mean over repeats.
    assert abs(values.mean() - truth) <= 4 * values.std(ddof=1) / math.sqrt(REPEATS)
    # Not by being large: an sd of 40 values is known to 1 / sqrt(80), 11 %.
    assert np.mean([se for _, se in found]) <= 2.0 * values.std(ddof=1)


def test_an_exact_guide_is_weighed_against_the_mixture_it_is_drawn_from():
    """q is the posterior: all error is of the wide draws, and no weight is above 1 / (1 - share)."""
    model, _, _ = gaussian(4)
    posterior = fitted(model, "full_rank")
    weights = evidence.log_weights(posterior.approximation, 4000, seed=0)
    assert weights.max() <= -math.log1p(-evidence._WIDE) + 1e-9
    assert len(np.unique(weights.round(6))) > 1000
    found = [posterior.evidence(1000, seed=seed) for seed in range(REPEATS)]
    assert covered(0.0, found) >= LEAST


def heavy(depth=2.5):
    """A log scale with an exponential tail to the left, which a Gaussian's draws never see."""

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("data", -depth * scale)

    # The integral of 2 / (pi (1 + s^2)) exp(-depth s), by 400,000 midpoints.
    s = (np.arange(400_000) + 0.5) * 1e-4
    return vi.Model(model), math.log((2 / math.pi / (1 + s**2) * np.exp(-depth * s)).sum() * 1e-4)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_a_heavy_tail_is_found_and_covered(guide):
    model, truth = heavy()
    posterior = fitted(model, guide)
    found = [posterior.evidence(2000, seed=seed) for seed in range(REPEATS)]
    assert covered(truth, found) >= LEAST
    values = np.array([value for value, _ in found])
    assert abs(values.mean() - truth) <= 4 * values.std(ddof=1) / math.sqrt(REPEATS)


def test_undefended_weights_have_the_larger_error():
    """A Pareto tail of shape 0.6, whose variance is infinite: the mean of (1 - u)^-0.6 is 2.5."""
    rng = np.random.default_rng(0)
    found, plain = [], []
    for _ in range(200):
        log_w = -0.6 * np.log1p(-rng.random(4000))
        found.append(evidence.log_evidence(log_w))
        plain.append((psis(log_w).log_mean_weight, psis(log_w).log_mean_weight_se))
    truth = math.log(2.5)
    # Coverages of 200 repeats have standard errors of at most 3.5 %.
    assert covered(truth, found) >= 0.9 * 200
    assert covered(truth, plain) <= 0.9 * 200


def test_light_weights_have_the_plain_mean_and_error():
    log_w = np.random.default_rng(1).normal(0.0, 0.1, 4000)
    plain = psis(log_w)
    value, se = evidence.log_evidence(log_w)
    assert value == plain.log_mean_weight
    assert plain.log_mean_weight_se < se < 1.2 * plain.log_mean_weight_se


def test_a_constant_in_the_weights_is_one_in_the_evidence():
    log_w = np.random.default_rng(1).normal(0.0, 1.5, 4000)
    # One so small that a difference to it would lose all digits.
    log_w[7] = -1e17
    value, se = evidence.log_evidence(log_w)
    shifted, same = evidence.log_evidence(log_w - 700.0)
    assert shifted == pytest.approx(value - 700.0, abs=1e-9)
    assert same == pytest.approx(se, rel=1e-9)
    assert value == pytest.approx(1.5**2 / 2, abs=4 * se)


def test_equal_weights_have_no_error():
    assert evidence.log_evidence(np.full(100, -3.0)) == (pytest.approx(-3.0), pytest.approx(0.0))


def test_weights_that_may_have_no_mean_have_an_infinite_error():
    log_w = np.random.default_rng(0).standard_exponential(4000) * 1.3
    assert evidence.log_evidence(log_w)[1] == math.inf
    few = np.full(100, -np.inf)
    few[:3] = 0.0, 1.0, 2.0
    assert evidence.log_evidence(few)[1] == math.inf


def test_other_guides_are_weighed_as_they_are():
    posterior = vi.fit(local_model(), guide="amortized", seed=0, steps=5, progress=False)
    found = evidence.log_weights(posterior.approximation, 100, seed=4)
    np.testing.assert_array_equal(found, posterior.log_weights(100, seed=4))


def test_the_same_seed_gives_the_same_evidence():
    posterior = fitted(two_scales_model(), "full_rank")
    assert posterior.evidence(500, seed=1) == posterior.evidence(500, seed=1)
    assert posterior.evidence(500, seed=1) != posterior.evidence(500, seed=2)


def test_it_agrees_with_the_plain_mean_of_the_diagnostics():
    posterior = fitted(two_scales_model(), "full_rank")
    value, se = posterior.evidence(seed=0)
    plain, plain_se = posterior.log_evidence
    assert abs(value - plain) <= 4 * math.hypot(se, plain_se)


def test_a_point_estimate_has_none():
    posterior = fitted(gaussian(2)[0], "delta")
    with pytest.raises(OptionError, match="point estimate"):
        posterior.evidence()


def test_one_draw_has_no_error():
    posterior = fitted(gaussian(2)[0], "full_rank")
    with pytest.raises(OptionError, match="at least 2"):
        posterior.evidence(1)
    with pytest.raises(OptionError, match="integer of at least 1"):
        posterior.evidence(0)

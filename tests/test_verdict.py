"""The verdict's one word, from weights whose quality is known."""

import numpy as np
import pytest

from pyro_vi_kit.evaluation import smooth
from pyro_vi_kit.types import Status
from pyro_vi_kit.verdict import judge

CONVERGED = Status(True, "converged", "Done.")
S = 4000


def normal_against(scale, seed=0):
    """Draws of N(0, scale) and their log weights for the target N(0, 1)."""
    draws = scale * np.random.default_rng(seed).standard_normal(S)
    return draws, -0.5 * draws**2 + 0.5 * (draws / scale) ** 2 + np.log(scale)


def verdict(draws, log_w, status=CONVERGED, guide="mean_field"):
    return judge({"x": draws}, smooth(log_w), status, guide)


def test_the_target_itself_is_good():
    found = verdict(*normal_against(1.0))
    assert found.level == "good"
    assert found.advice == ""
    assert found.sites == {"x": "good"}


def test_an_sd_that_is_off_is_to_be_resampled():
    # Wide enough for its weights to be bounded, 25 % off in sd.
    found = verdict(*normal_against(1.25))
    assert found.level == "resample"
    assert found.sites == {"x": "resample"}
    assert "posterior.resample()" in found.advice
    assert "'full_rank'" in found.advice
    assert any("site 'x'" in reason for reason in found.reasons)


def test_weights_without_a_variance_are_rejected():
    # exp(E / 1.1) of exponential E has a Pareto tail of shape 0.91.
    rng = np.random.default_rng(1)
    found = verdict(rng.standard_normal(S), rng.standard_exponential(S) / 1.1)
    assert found.level == "reject"
    assert found.sites == {"x": "reject"}
    assert "Do not use it" in found.advice


def test_a_fit_that_stopped_early_is_never_good():
    status = Status(False, "budget", "The budget ran out.")
    found = verdict(*normal_against(1.0), status=status)
    assert found.level == "resample"
    assert "The budget ran out." in found.advice


def test_a_fit_that_diverged_is_rejected():
    status = Status(False, "diverged", "It diverged.")
    assert verdict(*normal_against(1.0), status=status).level == "reject"


@pytest.mark.parametrize("log_w", [np.full(S, -np.inf), np.full(S, np.nan), np.full(S, np.inf)])
def test_no_usable_weight_is_a_rejection_and_no_error(log_w):
    found = verdict(np.zeros(S), log_w)
    assert found.level == "reject"
    assert "k-hat inf" in str(found)


def test_draws_that_overflow_are_named():
    draws, log_w = normal_against(1.0)
    draws[0] = np.inf
    found = verdict(draws, log_w)
    assert found.level == "reject"
    assert any("not finite" in reason for reason in found.reasons)


def test_a_constant_site_does_not_move():
    draws, log_w = normal_against(1.0)
    found = judge({"x": draws, "one": np.ones((S, 2))}, smooth(log_w), CONVERGED, "full_rank")
    assert found.sites["one"] == "good"


def test_a_draw_that_the_model_refuses_has_weight_zero():
    _, log_w = normal_against(1.25)
    spoilt = log_w.copy()
    spoilt[:3] = np.nan, np.inf, -np.inf
    expected = smooth(np.concatenate([np.full(3, -np.inf), log_w[3:]]))
    assert smooth(spoilt).khat == expected.khat
    np.testing.assert_array_equal(smooth(spoilt).log_weights, expected.log_weights)

"""The verdict's one word, from fits whose quality is known."""

import math

import numpy as np
import pytest

from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.psis import Psis
from pyro_vi_kit.posterior.diagnostics.findings import Findings, is_close, needs_chains
from pyro_vi_kit.posterior.diagnostics.shifts import Shifts, by_weights, flattened, scale_of
from pyro_vi_kit.posterior.diagnostics.verdict import judge
from pyro_vi_kit.posterior.diagnostics.wording import Cure
from pyro_vi_kit.posterior.evaluation import gap_of, smooth

CONVERGED = Status(True, "converged", "Done.")
S = 4000


def normal_against(scale, seed=0):
    """Draws of N(0, scale) and their log weights for the target N(0, 1)."""
    draws = scale * np.random.default_rng(seed).standard_normal(S)
    return draws, -0.5 * draws**2 + 0.5 * (draws / scale) ** 2 + np.log(scale)


def findings(values, log_w, **more):
    """What the weights say, and whatever else is given."""
    flat = flattened(values)
    sites = [name for name, draws in values.items() for _ in range(draws[0].size)]
    smoothed = smooth(log_w)
    overflowing = tuple(name for name, draws in values.items() if not np.isfinite(draws).all())
    weights = by_weights(np.where(np.isfinite(flat), flat, 0.0), smoothed)
    return Findings(
        sites, sites, smoothed, gap_of(log_w, smoothed), weights, overflowing=overflowing, **more
    )


def verdict(draws, log_w, status=CONVERGED, guide="mean_field", cures=(), **more):
    return judge(findings({"x": draws}, log_w, **more), status, guide, cures)[0]


def moves(mean, sd, error=0.01):
    """Chains that move one number so far."""
    return Shifts(*(np.array([float(part)]) for part in (mean, error, sd, error)))


def heavy(seed=1):
    """Weights exp(E / 1.1) of exponential E, whose tail is Pareto's of shape 0.91, and normal draws."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(S), rng.standard_exponential(S) / 1.1


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
    assert any("'x'" in reason for reason in found.reasons)


def test_weights_without_a_variance_are_rejected():
    found = verdict(*heavy())
    assert found.level == "reject"
    assert found.sites == {"x": "reject"}
    assert "Do not use it" in found.advice


def test_chains_that_stay_vouch_for_uneven_weights():
    found = verdict(*heavy(), chains=moves(0.02, 0.02), memory=0.1)
    assert found.level == "good"
    assert any("short chains" in reason for reason in found.reasons)


def test_chains_that_remember_prove_nothing():
    found = verdict(*heavy(), chains=moves(0.02, 0.02), memory=0.9)
    assert found.level == "reject"
    assert any("did not forget" in reason for reason in found.reasons)


def test_chains_that_leave_reject_uneven_weights():
    assert verdict(*heavy(), chains=moves(0.3, 0.0), memory=0.1).level == "reject"


def test_what_may_be_the_noise_of_chains_is_no_rejection():
    assert verdict(*heavy(), chains=moves(0.15, 0.0, error=0.05), memory=0.1).level == "resample"


def test_weights_that_lead_where_chains_lead_can_be_used():
    draws, log_w = normal_against(1.25)
    agreeing = moves(0.0, math.log(1 / 1.25))
    assert verdict(draws, log_w, chains=agreeing, memory=0.1).level == "resample"


def test_weights_that_see_nothing_of_what_chains_see_are_rejected():
    """The blind spot: q is the target where it goes, and the chains go elsewhere."""
    found = verdict(*normal_against(1.0), chains=moves(0.6, 0.3), memory=0.1)
    assert found.level == "reject"


def test_numbers_are_judged_one_by_one():
    rng = np.random.default_rng(3)
    draws, log_w = normal_against(1.25)
    values = {"a": rng.standard_normal((S, 2)), "b": draws[:, None]}
    found, levels = judge(findings(values, log_w), CONVERGED, "full_rank")
    assert levels.tolist() == ["good", "good", "resample"]
    assert found.sites == {"a": "good", "b": "resample"}
    assert found.level == "resample"


def test_where_nothing_can_be_relied_on_smoothed_khats_tell_harmless_numbers():
    draws, log_w = heavy()
    values = {"a": draws, "b": draws}
    found = findings(values, log_w, khats=lambda: np.array([0.1, 0.9]))
    found = Findings(**{**vars(found), "weights": Shifts(*np.zeros((4, 2)))})
    result, levels = judge(found, CONVERGED, "full_rank")
    assert levels.tolist() == ["good", "reject"]
    assert result.level == "reject"


def test_a_fit_that_stopped_early_is_never_good():
    status = Status(False, "budget", "The budget ran out.")
    found = verdict(*normal_against(1.0), status=status)
    assert found.level == "resample"
    assert "The budget ran out." in found.advice


def test_a_fit_that_diverged_is_rejected():
    status = Status(False, "diverged", "It diverged.")
    assert verdict(*normal_against(1.0), status=status).level == "reject"


def test_a_mode_that_is_left_out_is_a_rejection():
    status = Status(True, "converged", "Done.", modes=2, missed=0.4)
    found = verdict(*normal_against(1.0), status=status)
    assert found.level == "reject"
    assert any("40 % of the mass" in reason for reason in found.reasons)
    assert "several" in found.advice
    covered = Status(True, "converged", "Done.", modes=2, missed=0.0)
    assert verdict(*normal_against(1.0), status=covered).level == "good"


def test_advice_names_the_site_and_what_it_depends_on():
    cure = Cure("theta", ("tau",), "scale")
    draws, log_w = heavy()
    found = judge(findings({"theta": draws}, log_w), CONVERGED, "mean_field", [cure])[0]
    assert "'theta' depends on 'tau' through its prior scale" in found.advice
    assert "LocScaleReparam(0.0)" in found.advice
    # A parent that is wrong has the same cure, and a site that has nothing to do with it none.
    for name, told in (("tau", True), ("beta", False)):
        found = judge(findings({name: draws}, log_w), CONVERGED, "mean_field", [cure])[0]
        assert ("LocScaleReparam" in found.advice) == told


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
    found = judge(findings({"x": draws, "one": np.ones((S, 2))}, log_w), CONVERGED, "full_rank")[0]
    assert found.sites["one"] == "good"


def states(probability, plain, given, trusted=True):
    """Findings of a normal that is right and of a state, by draws of q and weights that know better."""
    rng = np.random.default_rng(3)
    inside = (rng.random(S) < plain).astype(float)
    ratio = np.where(inside == 1, probability / plain, (1 - probability) / (1 - plain))
    flat = np.stack([rng.standard_normal(S), inside], 1)
    indicator, smoothed = np.array([False, True]), smooth(np.log(ratio))
    return Findings(
        ["x", "z = 1"],
        ["x", "z"],
        smoothed,
        0.05,
        by_weights(flat, smoothed, indicator),
        given=np.array([False, given]),
        units=np.where(indicator, scale_of(flat, indicator)[1], np.nan),
    )


@pytest.mark.parametrize("given", [False, True])
def test_the_probability_of_a_state_is_judged(given):
    """An inclusion at 0.080 where 0.198 is right, as the weights know."""
    found = states(0.198, 0.080, given)
    moved = found.weights.mean[1] * found.units[1]
    assert abs(moved - (0.198 - 0.080)) < 4 * found.weights.mean_se[1] * found.units[1]
    said, levels = judge(found, CONVERGED, "mean_field")
    assert said.sites == {"x": "good", "z": "resample"}
    assert list(levels) == ["good", "resample"]
    assert "the probability that z = 1 most: by 0.1" in str(said)


@pytest.mark.parametrize("given", [False, True])
def test_a_probability_that_is_right_is_good(given):
    said, _ = judge(states(0.081, 0.080, given), CONVERGED, "mean_field")
    assert said.sites == {"x": "good", "z": "good"}


@pytest.mark.parametrize(("given", "level"), [(True, "good"), (False, "resample")])
def test_what_may_be_noise_is_no_fault_of_a_state_that_follows_from_others(given, level):
    """A probability that chains see no better than to 0.1 sds, and that seems to move by as much."""
    draws, log_w = heavy()
    inside = (np.arange(S) < S // 2).astype(float)
    chains = Shifts(*(np.array(part) for part in ([0.0, 0.1], [0.01, 0.1], [0.0] * 2, [0.01, 0.0])))
    more = {"given": np.array([False, given]), "units": np.array([np.nan, 0.5])}
    found, _ = judge(
        findings({"x": draws, "z": inside}, log_w, chains=chains, memory=0.0, **more),
        CONVERGED,
        "full_rank",
    )
    assert found.sites == {"x": "good", "z": level}


def test_a_draw_that_the_model_refuses_has_weight_zero():
    _, log_w = normal_against(1.25)
    spoilt = log_w.copy()
    spoilt[:3] = np.nan, np.inf, -np.inf
    expected = smooth(np.concatenate([np.full(3, -np.inf), log_w[3:]]))
    assert smooth(spoilt).khat == expected.khat
    np.testing.assert_array_equal(smooth(spoilt).log_weights, expected.log_weights)


def weights_of(khat, ess):
    return Psis(np.full(S, -math.log(S)), khat, ess, 0.0, 0.01)


@pytest.mark.parametrize(
    ("khat", "ess", "gap", "wanted"),
    [
        (0.3, 0.99 * S, 0.01, False),
        (1.0, 0.99 * S, 0.01, True),  # even, but something may leak at the edges
        (0.3, 0.80 * S, 0.10, True),
        (0.3, 0.99 * S, 40.0, True),  # a share of q where p has nothing
    ],
)
def test_chains_are_asked_unless_weights_leave_no_doubt(khat, ess, gap, wanted):
    assert needs_chains(weights_of(khat, ess), gap) == wanted


def test_a_call_is_close_where_khat_counts_and_may_be_on_either_side():
    # The error of a k-hat of 0.6 from 4,000 draws is 0.11.
    assert is_close(weights_of(0.6, 0.5 * S), 0.2)
    assert not is_close(weights_of(0.3, 0.5 * S), 0.2)
    assert not is_close(weights_of(1.2, 0.5 * S), 0.2)
    assert not is_close(weights_of(0.6, 0.99 * S), 0.01)
    assert not is_close(weights_of(0.7, 20.0), 2.0)


def test_richer_guides_are_guides():
    names = guides.names()
    richer = {name: cls.richer for name, cls in guides.REGISTRY.items() if cls.richer}
    assert set(richer) | set(richer.values()) <= set(names)
    # From every guide the climb ends.
    for name in richer:
        seen = [name]
        while seen[-1] in richer:
            seen.append(richer[seen[-1]])
            assert len(seen) <= len(names)

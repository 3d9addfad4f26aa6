"""Forward KL of Gaussians by weighted moments."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, load, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.optimize.deterministic import moments
from pyro_vi_kit.optimize.stochastic import stochastic

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


def moments_of(posterior):
    with torch.no_grad():
        q = posterior.approximation.guide.families["latent"]()
        return q.mean, q.stddev


@pytest.mark.parametrize("guide", ["full_rank", "mean_field"])
def test_it_has_the_posteriors_own_moments(guide):
    """Of a normal posterior, within the default tolerance: 1e-4 nats are 0.014 sds."""
    model, mean, covariance = gaussian(3)
    posterior = vi.fit(model, guide, "forward_kl", seed=0)
    found, sd = moments_of(posterior)
    assert posterior.method == "moments"
    assert posterior.status.converged
    marginal = covariance.diagonal().sqrt()
    assert bool(((found - mean) / marginal).abs().max() < 0.015)
    assert bool((sd / marginal - 1).abs().max() < 0.015)
    if guide == "full_rank":
        assert posterior.bound == pytest.approx(0.0, abs=1e-3)
        assert posterior.verdict.level == "good"
    else:
        assert posterior.bound > 0.0 > posterior.elbo


def test_both_modes_of_a_hill_and_a_needle_are_covered():
    """2/3 N(0, 1/4) + 1/3 N(1/2, 1/100): mean 1/6, variance sum_i w_i (s_i^2 + m_i^2) - 1/36."""
    posterior = vi.fit(load("kl_direction").MODEL, "full_rank", "forward_kl", tol=1e-8, seed=0)
    mean, sd = moments_of(posterior)
    variance = 2 / 3 * 0.0625 + (1e-4 + 0.25) / 3 - 1 / 36
    assert float(mean[0]) == pytest.approx(1 / 6, abs=1e-3)
    assert float(sd[0]) == pytest.approx(variance**0.5, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "mean", "sd"), [(0.0, 0.024570, 0.265567), (0.5, 0.499910, 0.010552)]
)
def test_the_elbo_finds_either_mode_of_it(start, mean, sd):
    """Against quadrature (benchmarks/kl_direction.py). The s.e. of 4,096 x 400 draws is 4e-4 at most."""
    posterior = vi.fit(
        load("kl_direction").MODEL,
        "full_rank",
        vi.objectives.Elbo(4096),
        method="stochastic",
        estimator="score",
        init={"z": start},
        tol=1e-4,
        seed=0,
    )
    found, scale = moments_of(posterior)
    assert float(found[0]) == pytest.approx(mean, abs=1e-3)
    assert float(scale[0]) == pytest.approx(sd, abs=1e-3)


def test_the_same_seed_gives_the_same_numbers():
    first, second = (
        vi.fit(two_scales_model(), "full_rank", "forward_kl", seed=3) for _ in range(2)
    )
    assert torch.equal(moments_of(first)[0], moments_of(second)[0])


def funnel():
    scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (scale / 2).exp()).to_event(1))


def test_where_weights_are_too_uneven_it_says_so_or_steps_take_over():
    """Neal's funnel in 10 dimensions: no Gaussian's draws reach what its variance is made of."""
    asked = vi.fit(vi.Model(funnel), "full_rank", "forward_kl", method="moments", tol=1e-6, seed=0)
    assert asked.status.reason == "not converged"
    assert "method='stochastic'" in asked.status.advice
    with pytest.raises(OptionError, match="method='moments' needs objective 'forward_kl'"):
        vi.fit(vi.Model(funnel), "full_rank", "elbo", method="moments")


def test_moments_that_were_given_up_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(moments, "_LAST", moments._FIRST)
    monkeypatch.setattr(stochastic, "MAX_STEPS", 100)
    posterior = vi.fit(vi.Model(funnel), "full_rank", "forward_kl", seed=0)
    assert posterior.method == "stochastic"
    (note,) = posterior.status.notes
    assert "method='moments' was tried first and given up: " in note
    assert "weighted draws only" in note
    assert note in repr(posterior)
    assert posterior.attrs(0)["notes"] == note
    path = posterior.save(tmp_path / "fit.nc", draws=10)
    assert vi.load(path, posterior.model).status == posterior.status


@pytest.mark.parametrize(
    "options",
    [{"guide": "affine_coupling"}, {"steps": 10}, {"estimator": "score"}, {"guide": "low_rank"}],
    ids=str,
)
def test_other_guides_and_options_take_steps(options):
    guide = options.pop("guide", "full_rank")
    options = {"steps": 10} | options
    posterior = vi.fit(two_scales_model(), guide, "forward_kl", seed=0, **options)
    assert posterior.method == "stochastic"
    with pytest.raises(OptionError, match="method='moments' needs"):
        vi.fit(two_scales_model(), guide, "forward_kl", method="moments", **options)


def test_a_pyro_guide_is_refused():
    with pytest.raises(OptionError, match="method='moments' runs the Gaussian guides"):
        vi.fit(two_scales_model(), lambda *_: None, "elbo", method="moments")

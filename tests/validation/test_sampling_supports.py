"""NUTS where the support of a latent follows another latent, by every means of computing gradients."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi


def shrinking():
    """a ~ Gamma(2, 1) and b | a ~ Uniform(0, a): b is an Exponential(1), and a - b another."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, a))


def in_a_plate():
    """The same for two rows, on intervals [a - 1, a]: the rows' places in them are uniform."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("row", 2):
        pyro.sample("b", dist.Uniform(a - 1.0, a))


def heavy_above():
    """b ~ Pareto(a, 3) on [a, oo), whose mean is 3 a / 2."""
    a = pyro.sample("a", dist.LogNormal(0.0, 0.25))
    pyro.sample("b", dist.Pareto(a, 8.0))


ROUTES = {
    "c": ("nutpie", None),
    "script": ("nutpie", "off"),
    "pyro": ("pyro", "off"),
}


@pytest.mark.parametrize("route", ["c", "script", pytest.param("pyro", marks=pytest.mark.slow)])
def test_a_support_that_follows_a_latent(route, monkeypatch):
    sampler, compiling = ROUTES[route]
    if compiling is not None:
        monkeypatch.setenv("PYRO_VI_KIT_COMPILE", compiling)
    options = {"chains": 2, "draws": 1000, "sampler": sampler, "seed": 1}
    draws = vi.nuts(vi.Model(shrinking), **options).posterior
    # At least 200 effective draws, as `nuts` itself asks for; four standard errors.
    for values in (draws.b, draws.a - draws.b):
        assert bool((values > 0).all())
        assert abs(float(values.mean()) - 1.0) < 4 / 200**0.5
        # The sd of the sd of an exponential is sqrt(2) / sqrt(n).
        assert abs(float(values.std()) - 1.0) < 4 * 2**0.5 / 200**0.5


def test_in_a_plate_and_beyond_a_bound():
    draws = vi.nuts(vi.Model(in_a_plate), chains=2, draws=600, seed=0).posterior
    places = draws.a - draws.b
    assert bool(((places > 0) & (places < 1)).all())
    assert abs(float(places.mean()) - 0.5) < 4 * 12**-0.5 / 400**0.5
    draws = vi.nuts(vi.Model(heavy_above), chains=2, draws=600, seed=0).posterior
    ratio = draws.b / draws.a
    assert bool((ratio >= 1).all())
    # Of a Pareto(1, 8): mean 8 / 7, variance 8 / (49 x 6).
    assert abs(float(ratio.mean()) - 8 / 7) < 4 * math.sqrt(8 / 294) / 200**0.5


def test_guides_follow_it_too():
    """A flow on the same: the log evidence of a model without data is 0."""
    posterior = vi.fit(vi.Model(shrinking), "full_rank", seed=0)
    draws = posterior.resample(4000, seed=0)
    assert (draws["b"] < draws["a"]).all()
    estimate, error = posterior.log_evidence
    assert abs(estimate) < 4 * error + 0.02
    assert torch.isfinite(torch.as_tensor(draws["b"])).all()

"""Values by name: constrained, unconstrained and simulated ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import density_of, normal, points
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import nn

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import RandomStream

Y = torch.tensor([0.3, -1.2, 0.8, 2.0])
Y64 = Y.double()
DRAWS = 20_000


def model(y=None, n=4):
    m = pyro.sample("m", dist.Normal(1.0, 2.0))
    s = pyro.sample("s", dist.Gamma(3.0, 2.0))
    double = pyro.deterministic("double", 2 * m)
    with pyro.plate("datum", n):
        x = pyro.sample("x", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(x, s), obs=y)
    return double


def assert_moments(draws, mean, sd):
    """Within 4.5 standard errors: 1 in 10^5 runs would miss, and the seed is fixed."""
    error = sd / math.sqrt(len(draws))
    assert abs(float(draws.mean()) - mean) < 4.5 * error
    # The sd of the sample sd of a normal is sd / sqrt(2 n); twice that for heavier tails.
    assert abs(float(draws.std()) - sd) < 4.5 * 2 * error / math.sqrt(2)


def test_constrain_gives_latents_and_deterministics():
    density = density_of(model, Y)
    z = points(6)
    values = density.constrain(z)
    assert set(values) == {"m", "s", "double", "x"}
    torch.testing.assert_close(values["m"], z[:, 0])
    torch.testing.assert_close(values["s"], z[:, 1].exp())
    torch.testing.assert_close(values["double"], 2 * z[:, 0])
    torch.testing.assert_close(values["x"], z[:, 2:])
    torch.testing.assert_close(density.constrain(density.block.unpack(z)), values)


def test_unconstrain_starts_what_is_left_out_at_the_origin():
    density = density_of(model, Y)
    z = density.unconstrain({"s": 2.0, "x": [1.0, 2.0, 3.0, 4.0]})
    expected = torch.tensor([0.0, math.log(2.0), 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(z, expected)


def test_predictive_draws_have_the_moments_of_the_likelihood():
    density = density_of(model, Y)
    z = torch.zeros(DRAWS, 6, dtype=torch.float64)
    z[:, 1] = math.log(3.0)
    z[:, 2:] = torch.arange(4.0)
    with RandomStream(0):
        draws = density.simulate(z)
    assert draws["y"].shape == (DRAWS, 4)
    for i in range(4):
        assert_moments(draws["y"][:, i], i, 3.0)
    torch.testing.assert_close(draws["x"], z[:, 2:])


def test_prior_draws_have_the_moments_of_the_prior():
    density = density_of(model, Y)
    with RandomStream(0):
        # No batching rule for gamma draws, so that these are made one by one.
        draws = density.simulate(None, draws=DRAWS // 20)
    assert_moments(draws["m"], 1.0, 2.0)
    assert_moments(draws["double"], 2.0, 4.0)
    assert_moments(draws["s"], 1.5, math.sqrt(3) / 2)
    assert_moments(draws["x"][:, 0], 1.0, math.sqrt(5))
    # Var y = Var m + 1 + E s^2, and E s^2 = 3 / 4 + 9 / 4.
    assert_moments(draws["y"][:, 3], 1.0, math.sqrt(4 + 1 + 3))
    assert torch.corrcoef(draws["x"].T)[0, 1] > 0.7


def test_half_cauchy_priors_are_drawn_at_once():
    """vmap has no rule for them. Quantiles within 4 standard errors, sqrt(p (1 - p) / n) / density."""
    runs = 0

    def heavy(y):
        nonlocal runs
        runs += 1
        scale = pyro.sample("scale", dist.HalfCauchy(5.0))
        loc = pyro.sample("loc", dist.Cauchy(1.0, 2.0))
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

    density = density_of(heavy, torch.tensor(0.0))
    runs = 0
    with RandomStream(0):
        draws = density.simulate(None, draws=DRAWS)
    assert runs == 1
    for name, half, loc, scale in (("scale", True, 0.0, 5.0), ("loc", False, 1.0, 2.0)):
        for p in (0.25, 0.5, 0.9):
            exact = loc + scale * math.tan(math.pi * (p / 2 if half else p - 0.5))
            slope = (2 if half else 1) / (math.pi * scale * (1 + ((exact - loc) / scale) ** 2))
            error = math.sqrt(p * (1 - p) / DRAWS) / slope
            assert abs(float(draws[name].quantile(p)) - exact) < 4 * error


def test_predictions_at_new_arguments():
    density = density_of(model, Y)
    with RandomStream(0):
        draws = density.simulate(None, vi.Model(model, None, 7), draws=5)
    assert draws["y"].shape == (5, 7)


def test_simulations_differ_between_particles_and_repeat_with_the_seed():
    density = density_of(model, Y)
    z = points(6)[:1].expand(5, 6)
    draws = []
    for seed in (0, 0, 1):
        with RandomStream(seed):
            draws.append(density.simulate(z)["y"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 20


def test_the_users_state_is_untouched_also_when_the_model_raises():
    def fragile(n):
        w = pyro.param("w", torch.ones(1))
        pyro.sample("m", dist.Normal(w, 1.0).to_event(1))
        if n > 1:
            raise ValueError("too many")

    density = density_of(fragile, 1)
    rng = torch.get_rng_state()
    with RandomStream(0), pytest.raises(ModelError, match="ValueError: too many"):
        density.simulate(None, vi.Model(fragile, 2))
    with pytest.raises(ModelError, match="ValueError: too many"):
        density_of(fragile, 2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() is torch.float32
    assert not pyro.get_param_store().keys()


def test_an_improper_prior_cannot_be_simulated_but_its_predictions_can():
    def improper():
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(m, 1.0).expand([4]).to_event(1), obs=Y)

    density = density_of(improper)
    with pytest.raises(ModelError, match="cannot be sampled"):
        density.simulate(None, draws=2)
    assert density.simulate(points(1))["y"].shape == (5, 4)


def test_discrete_data_are_simulated():
    def counts():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("datum", 3):
            pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([1.0, 0.0, 4.0]))

    density = density_of(counts)
    with RandomStream(0):
        draws = density.simulate(torch.full((DRAWS, 1), math.log(2.5)).double())["y"]
    assert_moments(draws[:, 0], 2.5, math.sqrt(2.5))


def test_the_log_likelihood_is_one_number_per_observation():
    density = density_of(model, Y)
    z = points(6)
    expected = normal(Y64, z[:, 2:], z[:, 1:2].exp())
    torch.testing.assert_close(density.log_likelihood(z), {"y": expected})


def test_a_reparameterised_site_comes_back_as_deterministic():
    def centred():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 4):
            x = pyro.sample("x", dist.Normal(m, 2.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    density = density_of(pyro.poutine.reparam(centred, config={"x": LocScaleReparam(0.0)}))
    z = points(5)
    x = z[:, :1] + 2 * z[:, 1:]
    expected = normal(z).sum(-1) + normal(Y64, x).sum(-1)
    torch.testing.assert_close(density.log_prob(z), expected)
    torch.testing.assert_close(density.constrain(z)["x"], x)
    assert density.structure.sites["x"].kind == "deterministic"


def test_partly_observed_data():
    seen = torch.tensor([True, False, True, True])

    def partly():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 4):
            pyro.sample("y", dist.Normal(m, 2.0), obs=Y, obs_mask=seen)

    density = density_of(partly)
    assert [site.name for site in density.latents] == ["m", "y_unobserved"]
    z = points(5)
    m, y = z[:, :1], z[:, 1:]
    # Where a row was observed, its latent stands idle and gets a density of its own.
    parts = torch.where(seen, normal(Y64, m, 2.0) + normal(y), normal(y, m, 2.0))
    torch.testing.assert_close(density.log_prob(z), normal(z[:, 0]) + parts.sum(-1))
    torch.testing.assert_close(density.constrain(z)["y"], torch.where(seen, Y64, y))


def test_learned_parameters_are_held_only_inside_the_context():
    network = nn.Linear(1, 1)

    def with_network():
        net = pyro.module("net", network)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m + net(torch.ones(1)), 1.0).to_event(1), obs=Y[:1])

    density = density_of(with_network)
    own = network.weight
    with density.learned({**density.params, "net$$$weight": torch.full((1, 1), 3.0)}):
        assert float(network.weight) == 3.0
    assert network.weight is own

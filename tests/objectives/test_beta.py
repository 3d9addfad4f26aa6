"""The beta-weighted ELBO: its weights by hand, its optimum in closed form, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import load, local_and_global_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.objectives import Beta, Elbo, evaluate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


def test_the_weights_are_the_likelihood_and_the_rest_times_beta():
    guide = perturb(guides.make("full_rank", two_scales_model()))
    torch.manual_seed(0)
    draw = guide.draw(4)
    likelihood = guide.density.log_likelihood(draw.z)["y"].sum(-1)
    rest = guide.weigh(draw).shared - likelihood
    found = Beta(beta=2.5).weights(guide, draw).shared
    torch.testing.assert_close(found, likelihood + 2.5 * rest)


def test_a_factor_is_likelihood():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(z**4))

    guide = guides.make("mean_field", vi.Model(model))
    draw = guide.draw(3)
    rest = guide.weigh(draw).shared + draw.z["z"] ** 4
    found = Beta(beta=3.0).weights(guide, draw).shared
    torch.testing.assert_close(found, -(draw.z["z"] ** 4) + 3.0 * rest)


def test_beta_one_is_the_elbo_also_on_minibatches():
    guide = perturb(guides.make("amortized", local_and_global_model(), hidden=4))
    index = {"datum": torch.tensor([0, 3])}
    draw = guide.draw(5, index)
    found = Beta(beta=1.0).weights(guide, draw, Batch(index))
    expected = guide.weigh(draw, None, index)
    torch.testing.assert_close(evaluate(Beta(), found), evaluate(Elbo(), expected))


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_the_optimum_is_the_posterior_of_a_tempered_likelihood(beta):
    """z ~ N(0, 1), y ~ N(z, 1), 5 data: precision 1 + 5 / beta, mean sum(y) / beta over it."""
    y = torch.tensor([0.5, 1.5, 1.0, 2.0, 0.2])

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    posterior = vi.fit(vi.Model(model, y), "mean_field", Beta(beta=beta, particles=16), seed=0)
    with torch.no_grad():
        q = posterior.approximation.guide.families["latent"]()
    precision = 1.0 + 5.0 / beta
    # Stick-the-landing is exact here; what is left is Adam's distance, 0.01 nats at the most, which is
    # sqrt(0.02) sds of a mean.
    slack = math.sqrt(0.02 / precision)
    assert float(q.mean) == pytest.approx(float(y.sum()) / beta / precision, abs=slack)
    assert float(q.stddev) == pytest.approx(precision**-0.5, rel=0.1)
    assert posterior.bound != posterior.elbo


def test_a_sum_over_discrete_sites_is_refused():
    with pytest.raises(OptionError, match=r"discrete site 'upper'.*objective='elbo'"):
        vi.fit(load("mixture_clusters").MODEL, "mean_field", "beta")


def test_stock_pyro_has_only_beta_one():
    assert Beta(beta=1.0).stock_loss().num_particles == 10
    with pytest.raises(OptionError, match="'beta' has no loss in stock Pyro"):
        vi.fit(two_scales_model(), "mean_field", "beta", engine="pyro")


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan, "4", True])
def test_beta_must_be_positive(beta):
    with pytest.raises(OptionError, match="beta must be a positive number"):
        Beta(beta=beta)

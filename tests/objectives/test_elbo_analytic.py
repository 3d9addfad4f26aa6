"""The closed form of KL(q || prior): which sites have one, its value, and that no Jacobian is lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from toys import local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, ElboAnalytic, evaluate
from pyro_vi_kit.objectives.priors import normal_priors

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

GAUSSIAN = ("mean_field", "low_rank", "full_rank")
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)


def mixed(y):
    """Sites with and without a fixed normal prior in unconstrained space."""
    normal = pyro.sample("normal", dist.Normal(1.0, 2.0))
    pyro.sample("positive", dist.LogNormal(0.5, 0.3))
    pyro.sample("vector", dist.MultivariateNormal(torch.ones(2), COVARIANCE))
    pyro.sample("half", dist.HalfNormal(1.0))
    pyro.sample("child", dist.Normal(normal, 1.0))
    pyro.sample("learned", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0))
    with poutine.scale(scale=2.0):
        pyro.sample("scaled", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=torch.tensor(False)):
        pyro.sample("masked", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("row", dist.Normal(torch.zeros(len(y)), 1.0))
        pyro.sample("y", dist.Normal(normal, 1.0), obs=y)


def priors_only():
    """Normal in unconstrained space as a whole: N(1, 2), log N(0.5, 0.3), and a correlated pair."""
    pyro.sample("normal", dist.Normal(1.0, 2.0))
    pyro.sample("positive", dist.LogNormal(0.5, 0.3))
    pyro.sample("vector", dist.MultivariateNormal(torch.ones(2), COVARIANCE))


def prior_of_all():
    covariance = torch.block_diag(torch.tensor(4.0), torch.tensor(0.09), COVARIANCE)
    return torch.distributions.MultivariateNormal(torch.tensor([1.0, 0.5, 1.0, 1.0]), covariance)


def test_which_sites_qualify():
    density = Density(vi.Model(mixed, torch.zeros(3)))
    found, reasons = normal_priors(density)
    assert [prior.site for prior in found] == ["normal", "positive", "vector", "row"]
    assert reasons["half"] == "its prior is HalfNormal"
    assert "depends on other latents" in reasons["child"]
    assert "learned parameters" in reasons["learned"]
    assert reasons["scaled"] == reasons["masked"] == "its prior is scaled or masked"


@pytest.mark.parametrize("name", GAUSSIAN)
def test_without_data_it_is_the_divergence_from_the_prior_without_noise(name):
    guide = perturb(guides.make(name, vi.Model(priors_only)), size=0.3)
    q = guide.families["latent"]()
    covariance = q.variance.diag() if name == "mean_field" else q.covariance_matrix
    normal = torch.distributions.MultivariateNormal(q.mean, covariance)
    expected = -torch.distributions.kl_divergence(normal, prior_of_all())
    torch.manual_seed(0)
    weights = ElboAnalytic(5).weights(guide, guide.draw(5))
    torch.testing.assert_close(weights.shared, expected.expand(5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_with_data_it_is_the_elbo(name):
    """The same draws: the difference has mean zero, at 4 s.e. of 4,000 of them."""
    guide = perturb(guides.make(name, two_scales_model()))
    torch.manual_seed(1)
    with torch.no_grad():
        draw = guide.draw(4000)
        gap = ElboAnalytic().weights(guide, draw).shared - guide.weigh(draw).shared
    assert float(gap.abs().max()) > 0.1
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(4000)


def test_a_fit_reaches_the_elbo_and_says_so():
    model = two_scales_model()
    found = vi.fit(model, "mean_field", "elbo_analytic", seed=0)
    expected = vi.fit(model, "mean_field", "elbo", seed=0)
    assert found.status.converged
    assert found.record.estimator == "pathwise"
    assert found.bound == found.elbo
    # Tolerances of 0.01 nats each, and the errors of both estimates.
    slack = 0.02 + 4 * math.hypot(found.elbo_se, expected.elbo_se)
    assert found.elbo == pytest.approx(expected.elbo, abs=slack)


def test_without_a_site_it_is_refused_with_the_reasons():
    model = vi.Model(lambda: pyro.sample("s", dist.HalfNormal(1.0)))
    with pytest.raises(OptionError, match=r"'s': its prior is HalfNormal.*objective='elbo'"):
        vi.fit(model, "mean_field", "elbo_analytic")


@pytest.mark.parametrize("guide", ["affine_coupling", "amortized", "delta"])
def test_a_guide_that_is_no_normal_is_refused(guide):
    model = local_model() if guide == "amortized" else two_scales_model()
    with pytest.raises(OptionError, match="objective"):
        vi.fit(model, guide, "elbo_analytic")


def test_stick_the_landing_is_refused():
    with pytest.raises(OptionError, match="trained by estimator='pathwise' or estimator='score'"):
        vi.fit(two_scales_model(), "mean_field", "elbo_analytic", estimator="dreg")


def test_the_bound_of_the_same_weights_is_the_elbo_where_nothing_is_known():
    """`evaluate` on its weights is what is trained; the K = 1 ELBO is reported."""
    guide = perturb(guides.make("mean_field", two_scales_model()))
    torch.manual_seed(3)
    draw = guide.draw(6)
    weights = ElboAnalytic(6).weights(guide, draw)
    assert evaluate(ElboAnalytic(6), weights) == evaluate(Elbo(6), weights)

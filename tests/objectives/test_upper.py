"""Upper bounds: what they are of, where they end, wake-wake for learned parameters, and refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, local_and_global_model, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.objectives import ChiSquare, Elbo, ForwardKl, Iwae

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

UPPER = (ForwardKl(), ChiSquare(), ChiSquare(n=1.5))
each_upper = pytest.mark.parametrize("objective", UPPER, ids=repr)


@each_upper
def test_the_bounds_are_in_order(objective):
    """ELBO <= importance-weighted <= CUBO_n, and the forward KL's between: for any weights."""
    log_w = 2.0 * torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    middle, upper = Iwae().bound(log_w), objective.bound(log_w)
    assert bool((Elbo().bound(log_w) < middle).all())
    assert bool((middle < upper).all())


@each_upper
def test_a_look_prefers_even_weights_and_weights_that_are_large(objective):
    """A guide whose draws all miss has a low upper bound, and must not look good for it."""
    even, uneven = torch.zeros(50), torch.linspace(-5.0, 5.0, 50)
    uneven = uneven - torch.logsumexp(uneven, 0) + math.log(50)
    looks = [float(objective.look(log_w)) for log_w in (even, uneven, even - 100.0)]
    assert looks[0] > looks[1] > looks[2]


@each_upper
def test_a_draw_of_no_density_does_no_harm(objective):
    log_w = torch.tensor([0.3, -math.inf, 0.1])
    assert bool(objective.bound(log_w).isfinite())
    assert bool(objective.path(log_w).isfinite().all())
    assert bool(objective.score(log_w).isfinite().all())


@pytest.mark.parametrize("estimator", ["dreg", "score"])
def test_the_forward_kl_of_independent_normals_has_the_marginal_sds(estimator):
    """A correlated normal: reverse KL would give 1 / sqrt(precision_ii), half as wide."""
    covariance = torch.tensor([[1.0, 0.85], [0.85, 1.0]])
    model = vi.Model(lambda: pyro.sample("z", dist.MultivariateNormal(torch.ones(2), covariance)))
    posterior = vi.fit(model, "mean_field", ForwardKl(500), estimator=estimator, seed=0)
    assert posterior.method == "stochastic"
    with torch.no_grad():
        q = posterior.approximation.guide.families["latent"]()
    # The bias of 500 weighted draws is a few per cent; 1 / sqrt(precision_ii) = 0.53.
    assert bool((q.stddev - 1.0).abs().max() < 0.08)
    assert bool((q.mean - 1.0).abs().max() < 0.08)
    expected = 0.5 * math.log(1.0 / (1.0 - 0.85**2))
    assert posterior.bound == pytest.approx(expected, abs=0.05)
    assert posterior.elbo < 0.0 < posterior.bound


def test_chi_square_is_wider_than_the_elbo_and_bounds_the_evidence_from_above():
    model = gaussian(2)[0]
    wide = vi.fit(model, "mean_field", ChiSquare(particles=500), seed=0)
    narrow = vi.fit(model, "mean_field", "elbo", seed=0)
    sds = [
        p.approximation.guide.families["latent"]().stddev.detach().prod() for p in (wide, narrow)
    ]
    assert sds[0] > sds[1]
    assert narrow.elbo < 0.0 < wide.bound


def learned(y):
    """z_i ~ N(theta, 1), y_i ~ N(z_i, 1): the most likely theta is the mean of y."""
    theta = pyro.param("theta", torch.tensor(0.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(theta, 1.0).expand([len(y)]))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@pytest.mark.parametrize("objective", [ForwardKl(20), ChiSquare(particles=20)], ids=repr)
def test_learned_parameters_go_up_the_importance_weighted_bound(objective):
    """An upper bound would take theta away from the data. Evidence: N(2, 2) for each of y."""
    y = 2.0 + torch.linspace(-1.5, 1.5, 30)
    posterior = vi.fit(vi.Model(learned, y), "amortized", objective, seed=0, dtype=torch.float64)
    assert float(posterior.approximation.params["theta"]) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", ["forward_kl", "chi_square"])
def test_what_it_is_not_defined_for_is_refused(name):
    with pytest.raises(OptionError, match="share one draw of the globals"):
        vi.fit(local_and_global_model(), "amortized", name)
    with pytest.raises(OptionError, match="trained by estimator='dreg' or estimator='score'"):
        vi.fit(two_scales_model(), "mean_field", name, estimator="pathwise")
    with pytest.raises(OptionError, match="no loss in stock Pyro"):
        vi.fit(two_scales_model(), "mean_field", name, engine="pyro")
    with pytest.raises(OptionError, match="needs a guide with spread"):
        vi.fit(two_scales_model(), "delta", name)
    with pytest.raises(OptionError, match="at least 2"):
        vi.objectives.make(name, particles=1)


def test_rows_can_be_refined_by_it():
    posterior = vi.fit(local_model(n=3), "amortized", ForwardKl(20), seed=0, steps=200)
    refined = posterior.refine(steps=100)
    assert refined.record.estimator == "dreg"
    assert refined.record.objective == posterior.record.objective
    # The posterior is normal: both are the evidence, but for 64 replicates of 20 draws.
    assert refined.bound == pytest.approx(refined.elbo, abs=0.01)


@pytest.mark.parametrize("n", [1.0, 0.5, math.inf, math.nan, "2", True])
def test_n_must_be_above_one(n):
    with pytest.raises(OptionError, match="n must be a finite number above 1"):
        ChiSquare(n=n)


@pytest.mark.slow
def test_a_saved_fit_keeps_its_objective(tmp_path):
    model = two_scales_model()
    posterior = vi.fit(model, guides.MeanField(), ChiSquare(n=3.0, particles=8), steps=20, seed=0)
    posterior.save(tmp_path / "fit.nc")
    assert vi.load(tmp_path / "fit.nc", model).record.objective == posterior.record.objective

"""Guides that are found by a search: Laplace's approximation and Pathfinder."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from toys import gaussian, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.optimize.deterministic.modes import hessian
from pyro_vi_kit.optimize.deterministic.pathfinder import along

pytestmark = pytest.mark.usefixtures("float64")


def family_of(posterior):
    with torch.no_grad():
        return posterior.approximation.guide.families["latent"]()


def two_modes():
    """Modes at -2 and 2, alike but for a prior that prefers the right one by 0.4 nats."""
    x = pyro.sample("x", dist.Normal(0.1, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.2), obs=torch.tensor(4.0))


def undetermined():
    a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))


def no_mode():
    """The density rises without end as the sd falls to 0."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    x = pyro.sample("x", dist.Normal(0.0, s).expand([9]).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(9))


# -- laplace ----------------------------------------------------------------------------------


def test_laplace_sits_at_the_unconstrained_mode():
    posterior = vi.fit(two_scales_model(), "laplace", seed=0)
    assert posterior.status.converged
    assert posterior.status.modes == 1
    family, density = family_of(posterior), posterior.density
    _, gradient = density.log_prob_and_grad(family.mean[None])
    # Whitened: the distance to the mode in sds.
    assert float((family.scale_tril.T @ gradient[0]).norm()) < 1e-4
    precision = -hessian(density, family.mean)
    torch.testing.assert_close(family.precision_matrix, precision, rtol=1e-6, atol=1e-8)


def test_laplace_is_exact_on_a_gaussian():
    model, mean, covariance = gaussian(4)
    posterior = vi.fit(model, "laplace", seed=0)
    family = family_of(posterior)
    torch.testing.assert_close(family.mean, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(family.covariance_matrix, covariance, rtol=1e-6, atol=1e-8)
    assert posterior.elbo == pytest.approx(0.0, abs=1e-6)
    assert posterior.verdict.level == "good"


def test_laplace_takes_the_mode_of_the_highest_evidence_and_tells_of_others():
    posterior = vi.fit(vi.Model(two_modes), "laplace", seed=0)
    assert posterior.status.converged
    assert posterior.status.modes == 2
    assert "2 modes" in posterior.status.advice
    assert float(family_of(posterior).mean) > 1.5


def test_a_singular_hessian_is_told():
    posterior = vi.fit(vi.Model(undetermined), "laplace", seed=0)
    assert posterior.status.converged
    assert "singular in 1 of 2 directions, and a jitter" in posterior.status.advice
    mean = family_of(posterior).mean
    assert float(mean.sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_hierarchical_sd_at_zero_is_no_mode():
    posterior = vi.fit(vi.Model(no_mode), "laplace", seed=0)
    assert not posterior.status.converged
    assert "may have no mode" in posterior.status.advice


# -- pathfinder -------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 3, 20])
def test_the_low_rank_form_is_bfgs(history):
    """Against the textbook's recursion (Nocedal & Wright 2006, 6.17), from the same diagonal."""
    generator = torch.Generator().manual_seed(0)
    _, mean, covariance = gaussian(5)
    precision = torch.linalg.inv(covariance)
    path = mean + torch.randn(8, 5, generator=generator)
    gradients = (mean - path) @ precision
    found = list(along(path, gradients, history))[-1]
    expected = (found.sd**2).diag()
    steps, changes = path.diff(dim=0), -gradients.diff(dim=0)
    for s, y in list(zip(steps, changes, strict=True))[-history:]:
        turn = torch.eye(5) - torch.outer(s, y) / (s @ y)
        expected = turn @ expected @ turn.T + torch.outer(s, s) / (s @ y)
    dense = found.dense()
    ours = dense.scale_tril @ dense.scale_tril.T
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dense.loc, path[-1] + expected @ gradients[-1])
    noise = torch.randn(4, 5, generator=generator)
    normal = torch.distributions.MultivariateNormal(dense.loc, scale_tril=dense.scale_tril)
    torch.testing.assert_close(found.log_q(noise), normal.log_prob(found.reparameterise(noise)))


def test_pathfinder_is_near_a_gaussian_posterior():
    model, mean, covariance = gaussian(4)
    posterior = vi.fit(model, "pathfinder", seed=0)
    assert posterior.status.converged
    error = (family_of(posterior).mean.detach() - mean) / covariance.diagonal().sqrt()
    assert float(error.abs().max()) < 0.1
    # The evidence is 0: nats by which the mixture's ELBO falls short.
    assert -0.1 < posterior.elbo <= 4 * posterior.elbo_se
    assert posterior.verdict.level in ("good", "resample")


def test_pathfinder_covers_both_modes():
    posterior = vi.fit(vi.Model(two_modes), "pathfinder", seed=0)
    right = float((posterior.resample(4000, seed=0)["x"] > 0).mean())
    # By quadrature the right mode holds 0.599 of the mass. Resampling without replacement from 40,000
    # draws: s.e. 0.008.
    grid = torch.linspace(-4, 4, 20_001)
    mass = (-0.5 * (grid - 0.1) ** 2 - 0.5 * ((grid**2 - 4) / 0.2) ** 2).exp()
    exact = float(mass[grid > 0].sum() / mass.sum())
    assert right == pytest.approx(exact, abs=0.04)


def test_one_starting_point_makes_one_path():
    posterior = vi.fit(vi.Model(two_modes), "pathfinder", seed=0, init={"x": 1.5})
    assert posterior.status.advice.startswith("Paths: 1,")
    assert (posterior.sample(200, seed=0)["x"] > 0).all()

"""Learned parameters of the model under every bound: their gradient, and where fits end."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import estimators

GROUPS, ROWS = 20, 5
_generator = torch.Generator().manual_seed(0)
LEVELS = 3.0 * torch.randn(GROUPS, 1, generator=_generator, dtype=torch.float64)
Y = LEVELS + 2.09 * torch.randn(GROUPS, ROWS, generator=_generator, dtype=torch.float64)


def levels(y):
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    a = pyro.sample("a", dist.Normal(torch.zeros(len(y)), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(a.unsqueeze(-1), s).to_event(2), obs=y)


def rows(y):
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("row", len(y)):
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(a.unsqueeze(-1), s).to_event(1), obs=y)


def log_likelihood(s):
    """Of the residual sd, the levels integrated out."""
    covariance = 9.0 * torch.ones(ROWS, ROWS) + s**2 * torch.eye(ROWS)
    return dist.MultivariateNormal(torch.zeros(ROWS), covariance.double()).log_prob(Y).sum()


@pytest.mark.parametrize("estimator", ["pathwise", "dreg", "score"])
@pytest.mark.parametrize("objective", ["elbo", "iwae", "renyi"])
@pytest.mark.parametrize(("model", "guide"), [(levels, "mean_field"), (rows, "amortized")])
def test_the_gradient_is_that_of_the_bound(model, guide, objective, estimator):
    """Whatever an estimator leaves out or scales is of the guide: by differences on the same draws."""
    density = Density(vi.Model(model, Y[:4]))
    trained, bound = guides.make(guide, density, seed=1), objectives.make(objective, particles=4)
    share = guide == "amortized" and bound.multi_sample
    if estimators.obstacle(trained, bound, estimator):
        pytest.skip("not defined here")

    def estimate(move):
        params = {n: (v.detach() + move).requires_grad_() for n, v in density.params.items()}
        torch.manual_seed(3)
        found, loss = estimators.surrogate(
            trained, bound, 4, Batch(params=params), share=share, estimator=estimator
        )
        return float(found), -float(torch.autograd.grad(loss, [params["s"]])[0])

    gradient = estimate(0.0)[1]
    difference = (estimate(1e-5)[0] - estimate(-1e-5)[0]) / 2e-5
    assert gradient == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("objective", ["elbo", "iwae", "renyi"])
def test_a_fit_ends_at_maximum_likelihood(guide, objective):
    """Both guides contain the posterior, so that every bound is the evidence at its optimum."""
    grid = torch.linspace(1.2, 3.2, 401)
    best = max(grid.tolist(), key=lambda s: float(log_likelihood(s)))
    posterior = vi.fit(vi.Model(levels, Y), guide, objective, seed=0, progress=False)
    assert posterior.status.converged
    # A likelihood 0.02 nats below its best is 0.2 standard errors, of 0.17, away.
    assert abs(float(posterior.parameters["s"]) - best) < 0.035
    assert abs(posterior.bound - float(log_likelihood(best))) < 0.1

"""The density of every kind of support, against formulas written out by hand, Jacobian included."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import (
    assert_agrees,
    beta,
    density_of,
    gamma,
    normal,
    points,
    sigmoid_jacobian,
    stick_breaking,
)
from pyro.distributions import constraints

Y = torch.tensor([0.3, -1.2, 0.8])


def scalar():
    x = pyro.sample("x", dist.Normal(1.0, 2.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(0.7))


def scalar_by_hand(z):
    return normal(z[0], 1.0, 2.0) + normal(torch.tensor(0.7), z[0], 0.5)


def vector():
    x = pyro.sample("x", dist.Normal(torch.arange(3.0), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=Y)


def vector_by_hand(z):
    return (normal(z, torch.arange(3.0), 2.0) + normal(Y.double(), z, 0.5)).sum()


def covariance():
    # Made anew, since a closed-over float32 matrix would be factorised in float32.
    return torch.tensor([[2.0, 0.5], [0.5, 1.0]])


def multivariate():
    x = pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -1.0]), covariance()))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.2))


def multivariate_by_hand(z):
    c = covariance()
    residual = z - torch.tensor([1.0, -1.0])
    determinant = c[0, 0] * c[1, 1] - c[0, 1] ** 2
    inverse = torch.stack([c[1, 1], -c[0, 1], -c[0, 1], c[0, 0]]).reshape(2, 2) / determinant
    log_p = -0.5 * residual @ inverse @ residual - 0.5 * determinant.log() - math.log(2 * math.pi)
    return log_p + normal(torch.tensor(0.2), z.sum(), 1.0)


def matrix():
    x = pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.5).to_event(2))
    pyro.sample("y", dist.Normal(x @ torch.ones(3), 1.0).to_event(1), obs=torch.tensor([1.0, 2.0]))


def matrix_by_hand(z):
    x = z.reshape(2, 3)
    return normal(x, 0.0, 1.5).sum() + normal(torch.tensor([1.0, 2.0]), x.sum(-1), 1.0).sum()


def dirichlet():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.5, 2.0, 0.7, 3.0])))
    pyro.sample("y", dist.Normal(p[0], 1.0), obs=torch.tensor(0.2))


def dirichlet_by_hand(z):
    a = torch.tensor([1.5, 2.0, 0.7, 3.0])
    p, log_det = stick_breaking(z)
    constant = math.lgamma(7.2) - sum(math.lgamma(v) for v in (1.5, 2.0, 0.7, 3.0))
    log_p = constant + ((a - 1) * p.log()).sum()
    return log_p + log_det + normal(torch.tensor(0.2), p[0], 1.0)


def positive():
    g = pyro.sample("g", dist.Gamma(2.5, 1.5))
    h = pyro.sample("h", dist.HalfNormal(3.0))
    ln = pyro.sample("ln", dist.LogNormal(0.5, 0.8))
    pyro.sample("y", dist.Normal(g + h, ln), obs=torch.tensor(0.2))


def positive_by_hand(z):
    g, h, ln = z.exp()
    prior = gamma(g, 2.5, 1.5) + math.log(2) + normal(h, 0.0, 3.0) + normal(z[2], 0.5, 0.8) - z[2]
    return prior + z.sum() + normal(torch.tensor(0.2), g + h, ln)


def interval():
    b = pyro.sample("b", dist.Beta(2.0, 3.5))
    u = pyro.sample("u", dist.Uniform(-1.0, 3.0))
    pyro.sample("y", dist.Normal(b * u, 1.0), obs=torch.tensor(0.2))


def interval_by_hand(z):
    b, u = torch.sigmoid(z[0]), -1 + 4 * torch.sigmoid(z[1])
    # Uniform: -log 4 + (log 4 + log of the sigmoid's slope).
    prior = beta(b, 2.0, 3.5) + sigmoid_jacobian(z[0]) + sigmoid_jacobian(z[1])
    return prior + normal(torch.tensor(0.2), b * u, 1.0)


def bounded_below():
    x = pyro.sample("x", dist.Pareto(2.0, 3.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.2))


def bounded_below_by_hand(z):
    x = 2.0 + z[0].exp()
    log_p = math.log(3.0) + 3.0 * math.log(2.0) - 4.0 * x.log()
    return log_p + z[0] + normal(torch.tensor(0.2), x, 1.0)


def ordered():
    prior = dist.ImproperUniform(constraints.ordered_vector, (), (3,))
    c = pyro.sample("c", prior)
    pyro.sample("y", dist.Normal(c, 1.0).to_event(1), obs=Y)


def ordered_points(z):
    return torch.stack([z[0], z[0] + z[1].exp(), z[0] + z[1].exp() + z[2].exp()])


def ordered_by_hand(z):
    return z[1] + z[2] + normal(Y.double(), ordered_points(z)).sum()


def transformed_to_ordered():
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    ordered_normal = dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
    c = pyro.sample("c", ordered_normal)
    pyro.sample("y", dist.Normal(c, 1.0).to_event(1), obs=Y)


def transformed_to_ordered_by_hand(z):
    # The Jacobian of the prior's own transform cancels that of the unconstraining one.
    return normal(z, 0.0, 2.0).sum() + normal(Y.double(), ordered_points(z)).sum()


def improper():
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("datum", 3):
        pyro.sample("y", dist.Normal(x, s), obs=Y)


def improper_by_hand(z):
    return z[1] + normal(Y.double(), z[0], z[1].exp()).sum()


def dependent_interval():
    a = pyro.sample("a", dist.HalfNormal(2.0))
    x = pyro.sample("x", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.2))


def dependent_interval_by_hand(z):
    a = z[0].exp()
    x = a * torch.sigmoid(z[1])
    prior = math.log(2) + normal(a, 0.0, 2.0) + z[0] + sigmoid_jacobian(z[1])
    return prior + normal(torch.tensor(0.2), x, 1.0)


def dependent_below():
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    prior = dist.ImproperUniform(constraints.greater_than(low), (), ())
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.2))


def dependent_below_by_hand(z):
    return normal(z[0]) + z[1] + normal(torch.tensor(0.2), z[0] + z[1].exp(), 1.0)


def correlation():
    L = pyro.sample("L", dist.LKJCholesky(2, 3.0))
    pyro.sample("y", dist.Normal(L[1, 0], 1.0), obs=torch.tensor(0.2))


def correlation_by_hand(z):
    r = torch.tanh(z[0])
    # LKJ(eta = 3) in two dimensions: p(r) = (1 - r^2)^(eta - 1) / B(eta, eta) / 2^(2 eta - 1), and
    # of the Cholesky factor's free entry the same, since L[1, 0] = r.
    constant = 2 * math.lgamma(3.0) - math.lgamma(6.0) + 5 * math.log(2.0)
    log_p = 2.0 * (1 - r**2).log() - constant
    return log_p + (1 - r**2).log() + normal(torch.tensor(0.2), r, 1.0)


CASES = [
    (scalar, scalar_by_hand, 1),
    (vector, vector_by_hand, 3),
    (multivariate, multivariate_by_hand, 2),
    (matrix, matrix_by_hand, 6),
    (dirichlet, dirichlet_by_hand, 3),
    (positive, positive_by_hand, 3),
    (interval, interval_by_hand, 2),
    (bounded_below, bounded_below_by_hand, 1),
    (ordered, ordered_by_hand, 3),
    (transformed_to_ordered, transformed_to_ordered_by_hand, 3),
    (improper, improper_by_hand, 2),
    (dependent_interval, dependent_interval_by_hand, 2),
    (dependent_below, dependent_below_by_hand, 2),
    (correlation, correlation_by_hand, 1),
]
each_case = pytest.mark.parametrize(
    ("model", "hand", "dim"), CASES, ids=[case[0].__name__ for case in CASES]
)


@each_case
def test_value_and_gradient(model, hand, dim):
    assert_agrees(density_of(model), hand, dim)


@each_case
def test_unconstrain_undoes_constrain(model, hand, dim):
    density = density_of(model)
    for z in points(dim, seed=1):
        values = {name: value[0] for name, value in density.constrain(z[None]).items()}
        torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-9, atol=1e-9)


@each_case
def test_every_batching_that_is_chosen_is_the_loop(model, hand, dim):
    density = density_of(model)
    z = points(dim, seed=2)
    chosen = density.log_prob_and_grad(z)
    density.batching = "loop"
    torch.testing.assert_close(chosen, density.log_prob_and_grad(z), rtol=1e-10, atol=1e-10)


def test_the_jacobian_can_be_left_out():
    density = density_of(positive)
    z = points(3)
    expected = density.log_prob(z) - z.sum(-1)
    torch.testing.assert_close(density.log_prob(z, jacobian=False), expected)


def test_which_sites_are_improper_or_have_a_support_of_their_own_at_each_run():
    sites = density_of(improper).structure.sites
    assert [name for name, site in sites.items() if site.improper] == ["x", "s"]
    assert density_of(dependent_interval).structure.sites["x"].transform is None
    assert density_of(interval).structure.sites["u"].transform is not None

"""Models with discrete latents in a data plate, and their ELBOs by exhaustive enumeration."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

Y = torch.tensor([-1.2, 0.4, 1.9], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CENTRES = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
NODES = 16


def by_index(y):
    """m ~ N(0, 1), z_i ~ Categorical over three centres, y_i ~ N(m + centre, 1)."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Categorical(PRIOR))
        pyro.sample("y", dist.Normal(m + CENTRES[z], 1.0), obs=y[index])


def by_weights(y):
    """The same with one-hot rows."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.OneHotCategorical(PRIOR))
        pyro.sample("y", dist.Normal(m + z @ CENTRES, 1.0), obs=y[index])


def two_clusters(y):
    """z_i ~ Bernoulli(0.4) tells which of two means a datum has."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor([-1.0, 1.0]), 3.0).to_event(1))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
        pyro.sample("y", dist.Normal(torch.where(z == 1, mu[1], mu[0]), 1.0), obs=y[index])


def codes(y):
    """Everything at once in a row: two bits, a category and a number; and a global."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        b = pyro.sample("b", dist.Bernoulli(0.3 * y.new_ones(2)).to_event(1))
        z = pyro.sample("z", dist.Categorical(PRIOR.to(y)))
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        mean = m + CENTRES.to(y)[z] + e + b.sum(-1)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def groups(y, group):
    """Each datum has the state of its group, whose plate is another one."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 3):
        z = pyro.sample("z", dist.Categorical(PRIOR))
    with pyro.plate("datum", len(y)) as index:
        pyro.sample("y", dist.Normal(m + CENTRES[z][group[index]], 1.0), obs=y[index])


def clusters(n=24, seed=0, dtype=torch.float64):
    """Data of `two_clusters`, and the model."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    y = y + torch.where(torch.arange(n) % 5 < 2, 1.2, -1.2)
    return y, vi.Model(two_clusters, y.to(dtype))


def exact_bound(guide, multi=1):
    """The bound of q over `by_index` or `by_weights` in the guide's parameters, by enumeration.

    Expectations over m are by Gauss-Hermite quadrature, those over states by sums: of single states
    for the ELBO, of pairs for the importance-weighted bound per datum with two particles.
    """
    q_m = guide.families["global"]()
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights) / math.sqrt(2 * math.pi)
    m = q_m.mean + q_m.stddev * nodes[:, None]
    log_q = guide.families["local"].table.rows.log_softmax(-1)
    rows, states = log_q.shape
    log_p = []
    for s in range(states):
        one = torch.zeros(NODES, rows, states)
        one[..., s] = 1.0
        terms = guide.density.terms({"m": m[:, 0], "z": one})
        log_p.append(terms.local["datum"])
        shared = terms.shared
    log_w = torch.stack(log_p, -1) - log_q  # [nodes, rows, states]
    if multi == 1:
        local = (log_q.exp() * log_w).sum(-1)
    else:
        pair = torch.logaddexp(log_w[..., :, None], log_w[..., None, :]) - math.log(2)
        both = log_q.exp()[:, :, None] * log_q.exp()[:, None, :]
        local = (both * pair).sum((-2, -1))
    return (weights * (shared - q_m.log_prob(m) + local.sum(-1))).sum()


def coordinate_ascent(y, sweeps=500):
    """The best mean field of `two_clusters`: its ELBO, P(z = 1), and the means; closed-form updates."""
    mean, var = torch.tensor([-1.0, 1.0]).to(y), torch.ones(2).to(y)
    prior_mean, prior_var = torch.tensor([-1.0, 1.0]).to(y), 9.0
    log_prior = torch.tensor([0.6, 0.4]).to(y).log()
    for _ in range(sweeps):
        fit = -0.5 * ((y[:, None] - mean) ** 2 + var) - 0.5 * math.log(2 * math.pi)
        r = (log_prior + fit).softmax(-1)
        precision = 1 / prior_var + r.sum(0)
        mean, var = (prior_mean / prior_var + (r * y[:, None]).sum(0)) / precision, 1 / precision
    fit = -0.5 * ((y[:, None] - mean) ** 2 + var) - 0.5 * math.log(2 * math.pi)
    kl = 0.5 * ((var + (mean - prior_mean) ** 2) / prior_var - 1 - (var / prior_var).log()).sum()
    elbo = (r * (log_prior + fit - r.log())).sum() - kl
    return float(elbo), r[:, 1], mean

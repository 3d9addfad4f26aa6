"""A mixture of two normals, the components ordered by their means.

y ~ theta N(mu1, sigma1) + (1 - theta) N(mu2, sigma2), mu ~ N(0, 2) with mu1 < mu2,
sigma ~ HalfNormal(2), theta ~ Beta(5, 5). Data: posteriordb, 1,000 simulated values.

What is hard: little, once the order has removed label switching. The reference does not normalise
the ordered prior (it leaves out a factor of 2), so here it is an improper uniform site on ordered
vectors times a factor: "mu" cannot be sampled from the prior, and its transform changes the
density.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

import pyro_vi_kit as vi

POSTERIOR = "low_dim_gauss_mix-low_dim_gauss_mix"
UNCONSTRAINED = ("mu", "sigma", "theta")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def low_dim_gauss_mix(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1 - theta], -1)
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma))
    with pyro.plate("observation", len(y)):
        return pyro.sample("y", mixture, obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(
    low_dim_gauss_mix,
    DATA["y"],
    dims={"mu": ["component"], "sigma": ["component"]},
    name=POSTERIOR,
)

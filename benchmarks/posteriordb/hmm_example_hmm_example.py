"""A hidden Markov model of two states with normal emissions, the states summed out.

y_t | state k ~ N(mu_k, 1), theta1 and theta2 (the rows of the transition matrix) ~ Dirichlet(1, 1),
mu1 ~ N(3, 1), mu2 ~ N(10, 1) with 0 < mu1 < mu2. Data: posteriordb, 100 simulated steps.

What is hard: a long chain of small operations when written as a loop; as a pairwise product of
matrices it is seven steps deep. mu1 and mu2 - mu1 are correlated (-0.89 in logs).

Two conventions of the reference. Its forward algorithm has no initial-state probabilities: the
first value enters as N(y_1; mu_k, 1) in each state, which makes the likelihood a factor and not the
density of a proper HMM. And the prior of mu is not normalised for order and positivity: the
positive steps mu1 and mu2 - mu1 are an improper uniform site, times a factor at mu.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

import pyro_vi_kit as vi

POSTERIOR = "hmm_example-hmm_example"
UNCONSTRAINED = ("theta1", "theta2", "mu_steps")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def log_matrix_product(x):
    """The product of a chain of matrices of logs, [..., T, S, S] to [..., S, S], pair by pair."""
    while x.shape[-3] > 1:
        even = x.shape[-3] // 2 * 2
        left, right = x[..., 0:even:2, :, :], x[..., 1:even:2, :, :]
        pairs = (left[..., None] + right[..., None, :, :]).logsumexp(-2)
        x = torch.cat([pairs, x[..., even:, :, :]], -3)
    return x[..., 0, :, :]


def hmm(y):
    theta1 = pyro.sample("theta1", dist.Dirichlet(y.new_ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(y.new_ones(2)))
    mu_steps = pyro.sample("mu_steps", dist.ImproperUniform(constraints.positive, (), (2,)))
    mu = pyro.deterministic("mu", mu_steps.cumsum(-1), event_dim=1)
    prior = dist.Normal(y.new_tensor([3.0, 10.0]), 1.0)
    pyro.factor("mu_prior", prior.log_prob(mu).sum(-1))

    emission = dist.Normal(mu[..., None, :], 1.0).log_prob(y[:, None])  # [..., N, state]
    transition = torch.stack([theta1, theta2], -2).log()  # [..., from, to]
    steps = transition[..., None, :, :] + emission[..., 1:, None, :]
    paths = emission[..., 0, :, None] + log_matrix_product(steps)
    pyro.factor("y", paths.logsumexp((-2, -1)))


DATA = load(POSTERIOR)
MODEL = vi.Model(
    hmm,
    DATA["y"],
    dims={
        "theta1": ["state"],
        "theta2": ["state"],
        "mu_steps": ["state"],
        "mu": ["state"],
    },
    name=POSTERIOR,
)

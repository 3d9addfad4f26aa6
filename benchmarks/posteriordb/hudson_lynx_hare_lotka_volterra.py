"""Hares and lynxes: the Lotka-Volterra equations, observed once a year with log-normal error.

u' = (theta1 - theta2 v) u, v' = (-theta3 + theta4 u) v from (u, v) = z_init at year 0;
theta1 and theta3 ~ N(1, 0.5), theta2 and theta4 ~ N(0.05, 0.05), all positive,
z_init ~ LogNormal(log 10, 1), sigma ~ LogNormal(-1, 1), y ~ LogNormal(log z, sigma).
Data: the Hudson Bay Company's pelts, 1900 to 1920, through posteriordb.

What is hard: an ordinary differential equation inside the density (Runge-Kutta of order 4 with
fixed steps, about 6,000 operations), correlations of 0.8 to 0.95 among all four rates, and
parameters far from the posterior for which the populations explode.

The reference does not normalise theta's truncation, so theta is an improper uniform site on
positive vectors times a factor: it cannot be sampled from the prior.
"""

import math
import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

import pyro_vi_kit as vi

POSTERIOR = "hudson_lynx_hare-lotka_volterra"
UNCONSTRAINED = ("theta", "z_init", "sigma")

STEPS_PER_YEAR = 16  # the log joint is then 5e-7 from its limit; with 12 it is 2e-6

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def log_populations(theta, z_init, n_years):
    """Log hares and log lynxes at years 1 to n_years, [..., n_years, 2].

    In logs the populations stay positive; addcmul and add save a third of the operations.
    """
    growth = torch.stack([theta[..., 0], -theta[..., 2]], -1)
    interaction = torch.stack([-theta[..., 1], theta[..., 3]], -1)

    def velocity(log_z):
        return torch.addcmul(growth, interaction, log_z.exp().flip(-1))

    h = 1 / STEPS_PER_YEAR
    log_z, years = z_init.log(), []
    for _ in range(n_years):
        for _ in range(STEPS_PER_YEAR):
            k1 = velocity(log_z)
            k2 = velocity(torch.add(log_z, k1, alpha=h / 2))
            k3 = velocity(torch.add(log_z, k2, alpha=h / 2))
            k4 = velocity(torch.add(log_z, k3, alpha=h))
            slope = torch.add(k1 + k4, k2 + k3, alpha=2)
            log_z = torch.add(log_z, slope, alpha=h / 6)
        years.append(log_z)
    return torch.stack(years, -2)


def lotka_volterra(y_init, y):
    theta = pyro.sample("theta", dist.ImproperUniform(constraints.positive, (), (4,)))
    prior = dist.Normal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05]))
    pyro.factor("theta_prior", prior.log_prob(theta).sum(-1))
    log_ten, minus_one = y.new_full((2,), math.log(10)), y.new_full((2,), -1.0)
    z_init = pyro.sample("z_init", dist.LogNormal(log_ten, 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(minus_one, 1.0).to_event(1))

    log_z = log_populations(theta, z_init, len(y))
    pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma).to_event(1), obs=y_init)
    noisy = dist.LogNormal(log_z, sigma[..., None, :]).to_event(2)
    return pyro.sample("y", noisy, obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(
    lotka_volterra,
    DATA["y_init"],
    DATA["y"],
    dims={
        "theta": ["rate"],
        "z_init": ["species"],
        "sigma": ["species"],
        "y_init": ["species"],
        "y": ["year", "species"],
    },
    coords={"species": ["hare", "lynx"]},
    name=POSTERIOR,
)

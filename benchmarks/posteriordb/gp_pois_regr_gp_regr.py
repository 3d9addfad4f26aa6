"""Gaussian-process regression on 11 points, the function integrated out.

y ~ N(0, K), K = alpha^2 exp(-(x - x')^2 / (2 rho^2)) + sigma I, rho ~ Gamma(25, 4),
alpha ~ HalfNormal(2), sigma ~ HalfNormal(1). sigma is the *variance* of the noise, as in the
reference. Data: posteriordb, simulated.

What is hard: a density through a Cholesky factor; otherwise the three logs are mildly skewed and
nearly uncorrelated, since 11 points say little beyond the prior.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

POSTERIOR = "gp_pois_regr-gp_regr"
UNCONSTRAINED = ("rho", "alpha", "sigma")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def gp_regr(x, y=None):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
    distance = (x[:, None] - x) / rho
    noise = sigma * torch.eye(len(x), dtype=x.dtype, device=x.device)
    covariance = alpha**2 * (-0.5 * distance**2).exp() + noise
    return pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(gp_regr, DATA["x"], DATA["y"], dims={"y": ["point"]}, name=POSTERIOR)

"""Bayesian linear regression, near-conjugate.

y ~ N(X beta, sigma), beta ~ N(0, 10), sigma ~ HalfNormal(10).
Data: posteriordb, 100 simulated rows.

What is hard: the scales. beta's posterior standard deviations are a thousandth of its values and a
ten-thousandth of its prior's, so an optimiser without preconditioning takes for ever to get there.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "sblri-blr"
UNCONSTRAINED = ("beta", "sigma")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def blr(X, y=None):
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("observation", len(X)):
        return pyro.sample("y", dist.Normal((X * beta).sum(-1), sigma), obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(blr, DATA["X"], DATA["y"], dims={"beta": ["coefficient"]}, name=POSTERIOR)

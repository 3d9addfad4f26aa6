"""Eight schools, non-centred.

y ~ N(theta, sigma), theta = mu + tau theta_trans, theta_trans ~ N(0, 1), mu ~ N(0, 5),
tau ~ HalfCauchy(5). Data: Rubin (1981) through posteriordb.

What is hard: little beyond the heavy right tail of tau.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "eight_schools-eight_schools_noncentered"
UNCONSTRAINED = ("theta_trans", "mu", "tau")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def eight_schools_noncentered(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(eight_schools_noncentered, DATA["sigma"], DATA["y"], name=POSTERIOR)

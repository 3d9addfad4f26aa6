"""Eight schools, centred.

y ~ N(theta, sigma), theta ~ N(mu, tau), mu ~ N(0, 5), tau ~ HalfCauchy(5). Data: Rubin (1981)
through posteriordb.

What is hard: a funnel between tau and the effects; the best Gaussian's k-hat is above 0.7.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "eight_schools-eight_schools_centered"
UNCONSTRAINED = ("theta", "mu", "tau")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def eight_schools_centered(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(eight_schools_centered, DATA["sigma"], DATA["y"], name=POSTERIOR)

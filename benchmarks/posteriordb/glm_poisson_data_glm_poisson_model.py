"""Counts of breeding falcons over 40 years: a Poisson regression on a cubic in time.

C ~ Poisson(exp(alpha + beta1 t + beta2 t^2 + beta3 t^3)), alpha ~ U(-20, 20), beta ~ U(-10, 10).
Data: Kery and Schaub (2011) through posteriordb; t is standardised.

What is hard: powers of t correlate, and under the wide uniform priors the posterior is narrow in
the logit coordinates (standard deviations of 0.003 to 0.009) and lies up to 140 of them from 0.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "GLM_Poisson_Data-GLM_Poisson_model"
UNCONSTRAINED = ("alpha", "beta1", "beta2", "beta3")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def glm_poisson(year, C=None):
    alpha = pyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta1 = pyro.sample("beta1", dist.Uniform(-10.0, 10.0))
    beta2 = pyro.sample("beta2", dist.Uniform(-10.0, 10.0))
    beta3 = pyro.sample("beta3", dist.Uniform(-10.0, 10.0))
    log_rate = alpha + beta1 * year + beta2 * year**2 + beta3 * year**3
    with pyro.plate("year", len(year)):
        return pyro.sample("C", dist.Poisson(log_rate.exp()), obs=C)


DATA = load(POSTERIOR)
MODEL = vi.Model(glm_poisson, DATA["year"], DATA["C"], name=POSTERIOR)

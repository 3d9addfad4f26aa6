"""Children's test scores from the mother's schooling, her IQ and their interaction, in raw units.

score ~ N(beta1 + beta2 hs + beta3 iq + beta4 hs iq, sigma), beta flat, sigma ~ HalfCauchy(2.5).
Data: Gelman and Hill (2006) through posteriordb, 434 children.

What is hard: nothing is standardised, so coefficients correlate up to 0.99 and differ a
hundredfold in scale; and the flat prior is improper: it has density 1 and cannot be sampled, so
the log evidence is defined up to that convention.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints

import pyro_vi_kit as vi

POSTERIOR = "kidiq-kidscore_interaction"
UNCONSTRAINED = ("beta", "sigma")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def kidscore_interaction(mom_hs, mom_iq, kid_score=None):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (4,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    main = beta[..., 0] + beta[..., 1] * mom_hs + beta[..., 2] * mom_iq
    mean = main + beta[..., 3] * mom_hs * mom_iq
    with pyro.plate("child", len(mom_hs)):
        return pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


DATA = load(POSTERIOR)
MODEL = vi.Model(
    kidscore_interaction,
    DATA["mom_hs"],
    DATA["mom_iq"],
    DATA["kid_score"],
    dims={"beta": ["coefficient"]},
    coords={"coefficient": ["intercept", "mom_hs", "mom_iq", "mom_hs:mom_iq"]},
    name=POSTERIOR,
)

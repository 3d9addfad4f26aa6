"""Dogs learning to avoid a shock: a logistic regression on each dog's own history.

y ~ Bernoulli(logit = beta1 + beta2 avoided + beta3 shocked), beta ~ N(0, 100), where y = 1 is a
shock and the counts are of the dog's earlier trials. Data: Gelman and Hill (2006) through
posteriordb, 30 dogs of 25 trials.

What is hard: priors hundreds of times wider than the posterior, and a k-hat of up to 1 that says
little here: importance weights keep 99 % of the draws.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "dogs-dogs"
UNCONSTRAINED = ("beta",)

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def dogs(y):
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(3), 100.0).to_event(1))
    n_shocked = y.cumsum(-1) - y
    n_avoided = (1 - y).cumsum(-1) - (1 - y)
    logits = beta[..., 0] + beta[..., 1] * n_avoided + beta[..., 2] * n_shocked
    with pyro.plate("dog", y.shape[-2], dim=-2), pyro.plate("trial", y.shape[-1], dim=-1):
        return pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


DATA = load(POSTERIOR)
MODEL = vi.Model(
    dogs,
    DATA["y"],
    dims={"beta": ["coefficient"]},
    coords={"coefficient": ["intercept", "avoided", "shocked"]},
    name=POSTERIOR,
)

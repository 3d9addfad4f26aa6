"""Poisson regression: executions in 17 states of the US in 1997.

Data: statsmodels' ``cpunish`` (Gill 2001, "Generalized Linear Models: A Unified Approach"): per state
the number of executions, median income, poverty, the share of black citizens, violent crime, whether it
is a southern state, and an index of education. Covariates are standardised, income, crime and shares
after a logarithm.

What is hard: 17 rows for seven coefficients, and one state (Texas, 37 executions) that pulls at all of
them; the posterior is close to normal and strongly correlated.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import cpunish

import pyro_vi_kit as vi

LOGGED = ("INCOME", "PERPOVERTY", "PERBLACK", "VC100k96")


def poisson_glm(X, y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), 1.0).to_event(1))
    # Not X @ beta: this form also takes the batch dimensions of Pyro's vectorised particles.
    log_rate = intercept + (X * beta).sum(-1)
    with pyro.plate("state", len(X)):
        return pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def load():
    frame: Any = cpunish.load_pandas().data
    names = [name for name in frame.columns if name != "EXECUTIONS"]
    columns = [np.log(frame[n]) if n in LOGGED else frame[n] for n in names]
    X = np.stack(columns, 1)
    X = (X - X.mean(0)) / X.std(0)
    dtype = torch.get_default_dtype()
    counts = frame["EXECUTIONS"].to_numpy(copy=True)
    return torch.tensor(X, dtype=dtype), torch.tensor(counts, dtype=dtype), names


X, Y, COVARIATES = load()

MODEL = vi.Model(
    poisson_glm,
    X,
    Y,
    dims={"beta": ["covariate"]},
    coords={"covariate": [name.lower() for name in COVARIATES]},
)

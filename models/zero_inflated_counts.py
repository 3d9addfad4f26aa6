"""Counts with more zeros than a Poisson has: a zero-inflated Poisson regression.

Data: 120 rows, simulated with NumPy's ``default_rng(4)``: log rate 0.5 + 0.7 x, and 35 % of the
counts set to zero.

What is hard: little; a zero can come from either part, so that the rate of structural zeros and the
intercept correlate.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def zero_inflated_counts(x, y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    with pyro.plate("row", len(x)):
        rate = (intercept + slope * x).exp()
        return pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def simulate(rows=120, seed=4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    y = rng.poisson(np.exp(0.5 + 0.7 * x)) * (rng.random(rows) > 0.35)
    dtype = torch.get_default_dtype()
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


X, Y = simulate()

MODEL = vi.Model(zero_inflated_counts, X, Y)

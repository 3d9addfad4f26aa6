"""Regression through the origin: one slope, unit noise, a unit normal prior.

Data: 20 points simulated with NumPy's ``default_rng(0)``: x ~ N(0, 1), y ~ N(0.8 x, 1).

What is hard: nothing. The posterior is Gaussian with a closed form, so every Gaussian guide must
find it exactly, its ELBO must equal the log evidence, and its k-hat must be at the floor.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

PRIOR_SD = 1.0
NOISE_SD = 1.0


def gaussian_regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("observation", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, NOISE_SD), obs=y)


def simulate(n=20, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = rng.normal(0.8 * x, NOISE_SD)
    dtype = torch.get_default_dtype()
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


MODEL = vi.Model(gaussian_regression, *simulate())

"""Straight-line regression: intercept and slope, unit noise, unit normal priors.

Data: 20 points simulated with NumPy's ``default_rng(1)``: x ~ N(2, 1), y ~ N(0.5 + 0.8 x, 1).

What is hard: x is not centred, so intercept and slope are strongly negatively correlated. The
posterior is Gaussian with a closed form: full_rank is exact, mean_field keeps the means and
understates both standard deviations by a factor that is known exactly.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

PRIOR_SD = 1.0
NOISE_SD = 1.0


def gaussian_regression_2d(x, y=None):
    intercept = pyro.sample("intercept", dist.Normal(0.0, PRIOR_SD))
    slope = pyro.sample("slope", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("observation", len(x)):
        return pyro.sample("y", dist.Normal(intercept + slope * x, NOISE_SD), obs=y)


def simulate(n=20, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 1.0, size=n)
    y = rng.normal(0.5 + 0.8 * x, NOISE_SD)
    dtype = torch.get_default_dtype()
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


MODEL = vi.Model(gaussian_regression_2d, *simulate())

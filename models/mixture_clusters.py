"""Two clusters of noisy measurements, each assignment a discrete latent that is summed out.

Data: 80 measurements with known errors, simulated with NumPy's ``default_rng(0)`` from two normal
clusters at -1 (30 %) and 2 (70 %).

What is hard: the assignments are discrete, one for each measurement; the density sums them out, and
the posterior draws them afterwards. The second mean is written as the first plus a positive gap, so
that the clusters cannot change names.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def mixture_clusters(error, y=None):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    low = pyro.sample("low", dist.Normal(0.0, 3.0))
    gap = pyro.sample("gap", dist.LogNormal(0.5, 0.7))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("measurement", len(error)):
        upper = pyro.sample("upper", dist.Bernoulli(share))
        sd = (spread**2 + error**2).sqrt()
        return pyro.sample("y", dist.Normal(low + gap * upper, sd), obs=y)


def simulate(n=80, seed=0):
    rng = np.random.default_rng(seed)
    error = rng.uniform(0.1, 0.5, n)
    centre = np.where(rng.random(n) < 0.7, 2.0, -1.0)
    y = rng.normal(centre, np.sqrt(0.6**2 + error**2))
    dtype = torch.get_default_dtype()
    return torch.tensor(error, dtype=dtype), torch.tensor(y, dtype=dtype)


ERROR, Y = simulate()

MODEL = vi.Model(mixture_clusters, ERROR, Y)

"""A hidden Markov model of counts, written with pyro.markov: calm and busy days of four sites.

Data: counts of 4 series over 15 days with known hours of observation, simulated with NumPy's
``default_rng(1)``: rates of 1 and 5 an hour, and a state that lasts with probability 0.85.

What is hard: 60 discrete states that depend on each other in time. They are summed out along the chain,
and drawn afterwards. Each day is a site of its own, so that a step visits 30 of them: long chains are
better written as ``dist.DiscreteHMM``.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def hmm(hours, y=None):
    stay = pyro.sample("stay", dist.Beta(torch.ones(2) * 8.0, 2.0).to_event(1))
    low = pyro.sample("low", dist.LogNormal(0.0, 1.0))
    gap = pyro.sample("gap", dist.LogNormal(1.0, 1.0))
    counts = []
    with pyro.plate("series", hours.shape[0]):
        p_busy = torch.tensor(0.5)
        for t in pyro.markov(range(hours.shape[1])):
            busy = pyro.sample(f"busy_{t}", dist.Bernoulli(p_busy))
            rate = (low + gap * busy) * hours[:, t]
            observed = None if y is None else y[:, t]
            counts.append(pyro.sample(f"y_{t}", dist.Poisson(rate), obs=observed))
            p_busy = torch.where(busy > 0, stay[..., 1], 1.0 - stay[..., 0])
    return counts


def simulate(series=4, days=15, seed=1):
    rng = np.random.default_rng(seed)
    hours = rng.uniform(0.5, 2.0, (series, days))
    y = np.empty((series, days))
    busy = rng.random(series) < 0.5
    for t in range(days):
        y[:, t] = rng.poisson(np.where(busy, 5.0, 1.0) * hours[:, t])
        busy = busy ^ (rng.random(series) > 0.85)
    dtype = torch.get_default_dtype()
    return torch.tensor(hours, dtype=dtype), torch.tensor(y, dtype=dtype)


HOURS, Y = simulate()

MODEL = vi.Model(hmm, HOURS, Y, dims={"stay": ["state"]}, coords={"state": ["calm", "busy"]})

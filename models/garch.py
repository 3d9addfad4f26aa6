"""GARCH(1, 1): a variance that remembers yesterday's return and yesterday's variance.

Data: 150 daily returns, simulated with NumPy's ``default_rng(2)``, omega = 0.2, alpha = 0.2 and
beta = 0.6. The model is given each day's previous return as an input.

What is hard: the variance is a Python loop over the days. The loop makes a list and the returns are one
vector site: a site for each day would take many times longer. The support of beta depends on alpha,
so that the process is stationary.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def garch(previous, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    omega = pyro.sample("omega", dist.HalfNormal(1.0))
    alpha = pyro.sample("alpha", dist.Uniform(0.0, 1.0))
    beta = pyro.sample("beta", dist.Uniform(0.0, 1.0 - alpha))
    variance = [omega / (1.0 - alpha - beta)]
    for r in previous[1:]:
        variance.append(omega + alpha * (r - mu) ** 2 + beta * variance[-1])
    returns = dist.Normal(mu.unsqueeze(-1), torch.stack(variance, -1).sqrt()).to_event(1)
    return pyro.sample("y", returns, obs=y)


def simulate(days=150, omega=0.2, alpha=0.2, beta=0.6, seed=2):
    rng = np.random.default_rng(seed)
    variance, returns = omega / (1 - alpha - beta), []
    for _ in range(days):
        returns.append(rng.normal(0.0, np.sqrt(variance)))
        variance = omega + alpha * returns[-1] ** 2 + beta * variance
    dtype = torch.get_default_dtype()
    return torch.tensor([0.0, *returns[:-1]], dtype=dtype), torch.tensor(returns, dtype=dtype)


PREVIOUS, Y = simulate()

MODEL = vi.Model(garch, PREVIOUS, Y, dims={"y": ["day"]})

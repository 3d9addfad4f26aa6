"""Intercepts and slopes that vary between groups, and correlate: an LKJ prior on the correlation.

Data: 12 groups of 10 rows, simulated with NumPy's ``default_rng(3)``: intercepts and slopes with
standard deviations 1 and 0.5 and a correlation of -0.6.

What is hard: the Cholesky factor of a correlation matrix as a latent, scales that few groups inform, and
24 group effects, here in the non-centred form.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

GROUPS = 12


def correlated_regression(group, x, y=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("group", GROUPS):
        standard = pyro.sample("standard", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    spread = (scale.unsqueeze(-1) * factor) @ standard.unsqueeze(-1)
    effect = pyro.deterministic("effect", mean + spread.squeeze(-1), event_dim=1)
    with pyro.plate("row", len(x)):
        chosen = effect[..., group.long(), :]
        loc = chosen[..., 0] + chosen[..., 1] * x
        return pyro.sample("y", dist.Normal(loc, noise), obs=y)


def simulate(rows=10, seed=3):
    rng = np.random.default_rng(seed)
    covariance = [[1.0, -0.6 * 0.5], [-0.6 * 0.5, 0.25]]
    effect = rng.multivariate_normal([1.0, 0.5], covariance, GROUPS)
    group = np.repeat(np.arange(GROUPS), rows)
    x = rng.normal(size=len(group))
    y = rng.normal(effect[group, 0] + effect[group, 1] * x, 0.5)
    return [torch.tensor(values, dtype=torch.get_default_dtype()) for values in (group, x, y)]


GROUP, X, Y = simulate()

MODEL = vi.Model(
    correlated_regression,
    GROUP,
    X,
    Y,
    coords={"coefficient": ["intercept", "slope"]},
    dims={name: ["coefficient"] for name in ("mean", "scale", "standard", "effect")},
)

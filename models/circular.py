"""Directions in radians that turn with a covariate: a von Mises regression.

Data: 60 directions, simulated with NumPy's ``default_rng(6)``: mean direction 0.8 + 2 atan(0.7 x),
concentration 4 (Fisher and Lee 1992, "Regression models for an angular response").

What is hard: the mean direction is an angle. Its unconstrained form is an interval of one turn, from -pi
to pi, so that a posterior across its ends would have two modes.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def circular(x, y=None):
    mu = pyro.sample("mu", dist.VonMises(0.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 0.5))
    with pyro.plate("row", len(x)):
        direction = mu + 2.0 * torch.atan(slope * x)
        return pyro.sample("y", dist.VonMises(direction, concentration), obs=y)


def simulate(rows=60, seed=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    y = rng.vonmises(0.8 + 2.0 * np.arctan(0.7 * x), 4.0)
    y = (y + np.pi) % (2 * np.pi) - np.pi
    dtype = torch.get_default_dtype()
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


X, Y = simulate()

MODEL = vi.Model(circular, X, Y)

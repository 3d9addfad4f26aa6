"""Gaussian process regression: the flow of the Nile, 1871-1970.

Data: statsmodels' ``nile`` (Durbin & Koopman 2001): yearly volume at Aswan, standardised.

What is hard: the process itself is integrated out, which leaves three hyperparameters and a dense
covariance of all years. Length scale, amplitude and noise explain the same wiggles, so that they trade
places: the flow fell at once in 1899, which a short length scale with little noise explains as well as a
long one with much.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import nile

import pyro_vi_kit as vi

JITTER = 1e-5


def gp_regression(x, y=None):
    length = pyro.sample("length", dist.InverseGamma(3.0, 30.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / length[..., None, None]
    kernel = amplitude[..., None, None] ** 2 * (-0.5 * distance**2).exp()
    covariance = kernel + (noise[..., None, None] ** 2 + JITTER) * torch.eye(len(x))
    # One row of a plate's batch dims for each particle, and none without particles.
    mean = x.new_zeros(len(x))
    return pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=y)


def load():
    frame: Any = nile.load_pandas().data
    volume = frame["volume"].to_numpy(copy=True)
    dtype = torch.get_default_dtype()
    x = torch.tensor(frame["year"].to_numpy(copy=True), dtype=dtype)
    return x, torch.tensor((volume - volume.mean()) / volume.std(), dtype=dtype)


X, Y = load()

MODEL = vi.Model(gp_regression, X, Y, dims={"y": ["year"]}, coords={"year": X.long().tolist()})

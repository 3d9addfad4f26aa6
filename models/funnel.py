"""Neal's funnel in ten dimensions: a log variance, and nine normals that have it.

Data: none. The model is its own prior, with log evidence 0 (Neal 2003, "Slice sampling", section 8).

What is hard: the nine are wide where v is large and narrow where it is small, so that no Gaussian fits
both ends. v is standard normal times 3, which a good guide must find from the shape alone.
"""

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def funnel(dim=10):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    sd = (v / 2).exp().unsqueeze(-1)
    return pyro.sample("x", dist.Normal(torch.zeros(dim - 1), sd).to_event(1))


MODEL = vi.Model(funnel)

"""A broad hill and a needle: what the best single Gaussian is depends on the direction of the KL.

Data: none; the target is 2/3 N(0, sd 1/4) + 1/3 N(1/2, sd 1/100), with the part as a discrete latent
that is summed out. Its evidence is 1.

What is hard: forward KL(p || q) has one optimum, which covers both; reverse KL(q || p), the ELBO, has
two, one on each. No single Gaussian is right, and the verdict says so.
"""

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

WEIGHTS = (2 / 3, 1 / 3)
LOCS = (0.0, 0.5)
SCALES = (0.25, 0.01)


def kl_direction():
    part = pyro.sample("part", dist.Categorical(torch.tensor(WEIGHTS))).long()
    pyro.sample("z", dist.Normal(torch.tensor(LOCS)[part], torch.tensor(SCALES)[part]))


MODEL = vi.Model(kl_direction)

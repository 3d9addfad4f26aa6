"""Four equal modes in two dimensions, at (s, s), (s, -s), (-s, s) and (-s, -s), each of sd 0.7.

Data: none. The model is its own prior, with log evidence 0. ``MODEL`` has s = 2; other distances are
``vi.Model(gaussian_mixture_target, 3.0)``.

What is hard: the farther the modes are apart, the rarer a fit by reverse KL finds them all; one that
finds a single mode is log 4 = 1.39 nats short and does not see it.
"""

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

SD = 0.7
CORNERS = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))


def gaussian_mixture_target(s=2.0):
    modes = dist.Normal(s * torch.tensor(CORNERS), SD).to_event(1)
    even = dist.Categorical(logits=torch.zeros(len(CORNERS)))
    return pyro.sample("x", dist.MixtureSameFamily(even, modes))


MODEL = vi.Model(gaussian_mixture_target)

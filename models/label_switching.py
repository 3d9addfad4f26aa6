"""Two clusters that may change names: a posterior with two equal modes.

Data: 500 points, simulated with NumPy's ``default_rng(0)`` from N(-6, 1) and N(6, 1) with weights 0.4
and 0.6.

What is hard: nothing says which mean is the first, and the weight is uniform, so that each mode of the
posterior has a mirror image of the same mass. A guide with one mode keeps one of them and misses
log 2 = 0.693 nats; ``guide="mixture"`` has both.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def label_switching(x, y=None):
    weight = pyro.sample("weight", dist.Uniform(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 10.0).to_event(1))
    cluster = dist.Categorical(torch.stack([weight, 1.0 - weight], -1))
    with pyro.plate("point", len(x)):
        mixture = dist.MixtureSameFamily(cluster, dist.Normal(mean, 1.0))
        return pyro.sample("y", mixture, obs=y)


def simulate(n=500, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.normal(np.where(rng.random(n) < 0.4, -6.0, 6.0), 1.0)
    return torch.tensor(y, dtype=torch.get_default_dtype())


Y = simulate()

MODEL = vi.Model(label_switching, torch.zeros_like(Y), Y, dims={"mean": ["cluster"]})

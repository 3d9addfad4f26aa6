"""A first measurement that is missing in a third of the rows, imputed with obs_mask.

Data: 60 rows, simulated with NumPy's ``default_rng(5)``: y is 1 + 0.8 x with noise of sd 0.5, and a
follow-up is 0.5 + 0.9 y with noise of sd 0.3. A third of y is missing at random; its place holds 0.

What is hard: obs_mask makes a latent for every row, also for those that were observed. Where it has no
influence it is given a standard normal density, which changes nothing else.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def missing_data(x, seen, follow_up, y=None):
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("row", len(x)):
        first = dist.Normal(a[..., 0] + b[..., 0] * x, sd[..., 0])
        # NaN would do as a mark of what is missing, but not as a value: its gradient is NaN.
        first = pyro.sample("y", first, obs=y, obs_mask=None if y is None else seen > 0)
        second = dist.Normal(a[..., 1] + b[..., 1] * first, sd[..., 1])
        pyro.sample("follow_up", second, obs=follow_up)
    return first


def simulate(rows=60, seed=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    y = rng.normal(1.0 + 0.8 * x, 0.5)
    follow_up = rng.normal(0.5 + 0.9 * y, 0.3)
    seen = rng.random(rows) > 1 / 3
    arrays = x, seen, follow_up, np.where(seen, y, 0.0)
    return [torch.tensor(values, dtype=torch.get_default_dtype()) for values in arrays]


X, SEEN, FOLLOW_UP, Y = simulate()

MODEL = vi.Model(
    missing_data, X, SEEN, FOLLOW_UP, Y, dims={name: ["outcome"] for name in ("a", "b", "sd")}
)

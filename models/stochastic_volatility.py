"""Stochastic volatility of US inflation: how uncertain was it in each quarter?

Data: statsmodels' ``macrodata``, quarterly inflation 1959-2009 (percent a year, 202 changes from one
quarter to the next).

What is hard: a latent log variance for each quarter, 202 of them, each a step away from the one before
(Stock & Watson 2007, "Why has US inflation become harder to forecast?"). The steps are non-centred;
their size sigma is still strongly tied to all of them.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import macrodata

import pyro_vi_kit as vi


def stochastic_volatility(quarters, y=None):
    start = pyro.sample("start", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    shock = pyro.sample("shock", dist.Normal(torch.zeros(quarters), 1.0).to_event(1))
    log_variance = start.unsqueeze(-1) + sigma.unsqueeze(-1) * shock.cumsum(-1)
    # An sd between e^-10 and e^10 is room enough, and far more than single precision has.
    log_variance = log_variance.clamp(-20.0, 20.0)
    return pyro.sample("y", dist.Normal(0.0, (log_variance / 2).exp()).to_event(1), obs=y)


def load():
    frame: Any = macrodata.load_pandas().data
    change = frame["infl"].diff().to_numpy(copy=True)[1:]
    named = zip(frame["year"], frame["quarter"], strict=True)
    names = [f"{year:.0f}q{quarter:.0f}" for year, quarter in named][1:]
    return torch.tensor(change, dtype=torch.get_default_dtype()), names


Y, QUARTERS = load()

MODEL = vi.Model(
    stochastic_volatility,
    len(Y),
    Y,
    dims={"shock": ["quarter"], "y": ["quarter"]},
    coords={"quarter": QUARTERS},
)

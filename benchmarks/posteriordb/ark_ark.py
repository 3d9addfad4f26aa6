"""An autoregression of order 5, given its first five values.

y_t ~ N(alpha + sum_k beta_k y_(t-k), sigma) for t > 5, alpha and beta ~ N(0, 10),
sigma ~ HalfCauchy(2.5). Data: posteriordb, a simulated series of 200.

What is hard: neighbouring lags are nearly the same column, so their coefficients correlate down
to -0.63. The series is one vectorised site on a matrix of lags, not a loop of 195 sites.
"""

import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

POSTERIOR = "arK-arK"
UNCONSTRAINED = ("alpha", "beta", "sigma")

# By path, so that this file loads from any directory.
load = runpy.run_path(str(Path(__file__).with_name("_data.py")))["load"]


def ar_k(y, order=5):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(order), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, order, 1)[:-1].flip(-1)  # row t holds y[t-1], ..., y[t-order]
    mean = alpha + (lags * beta).sum(-1)
    with pyro.plate("time", len(y) - order):
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y[order:])


DATA = load(POSTERIOR)
MODEL = vi.Model(
    ar_k,
    DATA["y"],
    dims={"beta": ["lag"]},
    coords={"lag": range(1, 6)},
    name=POSTERIOR,
)

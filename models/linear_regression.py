"""Linear regression on correlated columns, with known noise and a normal prior.

Data: 100 rows simulated with NumPy's ``default_rng(2)``: 8 unit-variance columns, each correlated
0.9 with its neighbour (a first-order autoregression across columns), beta ~ N(0, 1),
y ~ N(X beta, 0.5).

What is hard: neighbouring coefficients are almost exchangeable, so the posterior (Gaussian, with a
closed form) has correlations of -0.4 to -0.7 between neighbours and mean_field understates the
standard deviations about threefold; full_rank is exact. The update of beta is in closed form too:
``vi.fit(MODEL, "mean_field", method="cavi")``.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

PRIOR_SD = 2.0
NOISE_SD = 0.5
NEIGHBOUR_CORRELATION = 0.9


def linear_regression(X, y=None):
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), PRIOR_SD).to_event(1))
    # Not X @ beta: this form also takes the batch dimensions of Pyro's vectorised particles.
    mean = (X * beta).sum(-1)
    with pyro.plate("observation", len(X)):
        return pyro.sample("y", dist.Normal(mean, NOISE_SD), obs=y)


def update_beta(q, X, y):
    """One sweep: the optimal normal factor of each coefficient given the others, one after the other."""
    mean = q["beta"].mean.clone()
    precision = X.square().sum(0) / NOISE_SD**2 + 1 / PRIOR_SD**2
    for d in range(len(mean)):
        residual = y - X @ mean + X[:, d] * mean[d]
        mean[d] = X[:, d] @ residual / NOISE_SD**2 / precision[d]
    return dist.Normal(mean, precision.rsqrt()).to_event(1)


def simulate(n=100, n_coefficients=8, seed=2):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, n_coefficients))
    for d in range(1, n_coefficients):
        fresh = np.sqrt(1 - NEIGHBOUR_CORRELATION**2)
        X[:, d] = NEIGHBOUR_CORRELATION * X[:, d - 1] + fresh * X[:, d]
    beta = rng.normal(size=n_coefficients)
    y = rng.normal(X @ beta, NOISE_SD)
    dtype = torch.get_default_dtype()
    return torch.tensor(X, dtype=dtype), torch.tensor(y, dtype=dtype)


MODEL = vi.Model(
    linear_regression,
    *simulate(),
    updates={"beta": update_beta},
    dims={"beta": ["coefficient"]},
    coords={"coefficient": [f"x{d}" for d in range(8)]},
)

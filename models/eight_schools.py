"""Eight schools, non-centred: effects of coaching on test scores in eight schools.

Data: Rubin (1981), "Estimation in parallel randomized experiments"; the estimated effect and its
standard error for each school.

What is hard: little. Eight noisy estimates say next to nothing about tau, so its posterior is
skewed with a heavy right tail; the non-centred effects are close to independent normals, which
makes this the form that Gaussian guides can fit (compare eight_schools_centered).
"""

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

SCHOOLS = (
    "Choate",
    "Deerfield",
    "Phillips Andover",
    "Phillips Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "St. Paul's",
    "Mt. Hermon",
)


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

MODEL = vi.Model(eight_schools, SIGMA, Y, coords={"school": SCHOOLS})

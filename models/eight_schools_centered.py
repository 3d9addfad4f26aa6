"""Eight schools, centred: effects of coaching on test scores in eight schools.

Data: Rubin (1981), "Estimation in parallel randomized experiments"; the estimated effect and its
standard error for each school.

What is hard: the posterior is that of eight_schools, in coordinates where it is a funnel: as tau
goes to 0 the school effects collapse onto mu. No Gaussian follows both the neck and the mouth, and
k-hat of the best one is above 0.7.
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


def eight_schools_centered(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

MODEL = vi.Model(eight_schools_centered, SIGMA, Y, coords={"school": SCHOOLS})

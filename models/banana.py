"""A banana in two dimensions: a wide normal, bent along a parabola.

Data: none. The model is its own prior, with log evidence 0 (Haario, Saksman & Tamminen 1999, "Adaptive
proposal distribution for random walk Metropolis algorithm", curvature 0.03).

What is hard: x2 follows the square of x1, so that the two do not correlate and yet depend on each other:
full_rank can do no more than mean_field. The means are 0, the sds 10 and 4.36.
"""

import pyro
import pyro.distributions as dist

import pyro_vi_kit as vi

CURVATURE = 0.03


def banana():
    x1 = pyro.sample("x1", dist.Normal(0.0, 10.0))
    return pyro.sample("x2", dist.Normal(CURVATURE * (x1**2 - 100.0), 1.0))


MODEL = vi.Model(banana)

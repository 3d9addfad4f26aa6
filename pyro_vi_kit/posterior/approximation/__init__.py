"""A trained guide as something to draw from and to weigh: over a Density, or by Pyro's traces."""

from pyro_vi_kit.posterior.approximation.base import Approximation, Weighed
from pyro_vi_kit.posterior.approximation.of_density import GuideApproximation
from pyro_vi_kit.posterior.approximation.of_traces import TraceApproximation, TrainedGuide
from pyro_vi_kit.posterior.approximation.summed import (
    SummedApproximation,
    approximation_of,
    marginal_of,
)

__all__ = [
    "Approximation",
    "GuideApproximation",
    "SummedApproximation",
    "TraceApproximation",
    "TrainedGuide",
    "Weighed",
    "approximation_of",
    "marginal_of",
]

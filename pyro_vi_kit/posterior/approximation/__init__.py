"""A trained guide as something to draw from and to weigh: over a Density, or by Pyro's traces."""

from pyro_vi_kit.posterior.approximation.choice import approximation_of, marginal_of
from pyro_vi_kit.posterior.approximation.of_density import GuideApproximation
from pyro_vi_kit.posterior.approximation.of_traces import TraceApproximation
from pyro_vi_kit.posterior.approximation.protocol import Approximation, Weighed
from pyro_vi_kit.posterior.approximation.summed import SummedApproximation
from pyro_vi_kit.posterior.approximation.trained import TrainedGuide

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

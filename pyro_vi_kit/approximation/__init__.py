"""A trained guide as something to draw from and to weigh: over a Density, or by Pyro's traces."""

from pyro_vi_kit.approximation.choice import approximation_of, marginal_of
from pyro_vi_kit.approximation.of_density import GuideApproximation
from pyro_vi_kit.approximation.of_traces import TraceApproximation
from pyro_vi_kit.approximation.protocol import Approximation, Weighed
from pyro_vi_kit.approximation.summed import SummedApproximation
from pyro_vi_kit.approximation.trained import TrainedGuide

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

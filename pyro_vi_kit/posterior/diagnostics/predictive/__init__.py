"""Posterior predictive checks: does the fitted model make data like those that were observed?"""

from pyro_vi_kit.posterior.diagnostics.predictive.check import Comparison, comparisons, table
from pyro_vi_kit.posterior.diagnostics.predictive.replicates import (
    Replicated,
    Replicates,
    replicate,
)

__all__ = ["Comparison", "Replicated", "Replicates", "comparisons", "replicate", "table"]

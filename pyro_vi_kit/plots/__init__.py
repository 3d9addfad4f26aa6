"""Pictures: marginals beside the reference, how the bound went, the data among predictions, calibration.

Needs matplotlib.
"""

from pyro_vi_kit.plots.calibration import coverage, expected_coverage, rank_ecdf
from pyro_vi_kit.plots.losses import losses
from pyro_vi_kit.plots.marginals import marginals
from pyro_vi_kit.plots.predictive import predictive

__all__ = [
    "coverage",
    "expected_coverage",
    "losses",
    "marginals",
    "predictive",
    "rank_ecdf",
]

"""Pictures: marginals beside the reference, how the bound went, calibration. Needs matplotlib."""

from pyro_vi_kit.plots.calibration import coverage, expected_coverage, rank_ecdf
from pyro_vi_kit.plots.losses import losses
from pyro_vi_kit.plots.marginals import marginals

__all__ = ["coverage", "expected_coverage", "losses", "marginals", "rank_ecdf"]

"""Pictures of fits: marginals beside the reference, how the bound went, and the data among predictions.

Needs matplotlib.
"""

from pyro_vi_kit.plots.losses import losses
from pyro_vi_kit.plots.marginals import marginals
from pyro_vi_kit.plots.predictive import predictive

__all__ = ["losses", "marginals", "predictive"]

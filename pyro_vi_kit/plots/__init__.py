"""Pictures of fits: marginals beside the reference, and how the bound went. Needs matplotlib."""

from pyro_vi_kit.plots.losses import losses
from pyro_vi_kit.plots.marginals import marginals

__all__ = ["losses", "marginals"]

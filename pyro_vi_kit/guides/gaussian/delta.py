"""Point estimate: the mode of the constrained density (MAP)."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import Family, PointMass
from pyro_vi_kit.guides.spec import GuideSpec


@dataclass(frozen=True)
class Delta(GuideSpec):
    """Point estimate: the mode of the constrained density, as Pyro's AutoDelta (no Jacobian).

    It has no spread, and so no ELBO, k-hat, verdict or evidence.
    """

    name = "delta"
    about = About(
        does="one point, no spread",
        cost="D",
        use="a mode to start from, or to compare with",
        paper="none: maximum a posteriori",
    )
    methods = ("lbfgs", "stochastic")
    richer = "mean_field"
    per_datum = "delta"
    point = True

    def family(self, dim: int) -> Family:
        """The family over `[D]`."""
        return PointMass(dim)

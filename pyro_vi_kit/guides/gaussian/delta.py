"""Point estimate: the mode of the constrained density (MAP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import Family, PointMass
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.model.log_density import Density


@dataclass(frozen=True)
class Delta:
    """Point estimate: the mode of the constrained density, as Pyro's AutoDelta (no Jacobian).

    It has no spread, and so no ELBO, k-hat, verdict or evidence.
    """

    name: ClassVar[str] = "delta"
    about: ClassVar[About] = About(
        does="one point, no spread",
        cost="D",
        use="a mode to start from, or to compare with",
        paper="none: maximum a posteriori",
    )

    def build(self, density: Density) -> Guide:
        """The guide for this model, at the origin of unconstrained space."""
        return Guide(self.name, density, {density.block: self.family(density.dim)}, point=True)

    def family(self, dim: int) -> Family:
        """The family over `[D]`."""
        return PointMass(dim)

"""One multivariate normal in unconstrained space (Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro_vi_kit.density import Density
from pyro_vi_kit.guides.adaptor import Guide
from pyro_vi_kit.guides.families import DenseNormal
from pyro_vi_kit.guides.mean_field import require_positive


@dataclass(frozen=True)
class FullRank:
    """One multivariate normal in unconstrained space: exact for Gaussian posteriors.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If `init_scale` is not positive.
    """

    name: ClassVar[str] = "full_rank"

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)

    def build(self, density: Density) -> Guide:
        """The guide for this model, centred on the origin of unconstrained space."""
        family = DenseNormal(density.dim, self.init_scale)
        return Guide(self.name, density, {density.block: family})

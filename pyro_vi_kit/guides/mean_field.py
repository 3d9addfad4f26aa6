"""Independent normals in unconstrained space (Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from pyro_vi_kit.density import Density
from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.guides.adaptor import Guide
from pyro_vi_kit.guides.families import DiagonalNormal, Family
from pyro_vi_kit.registry import About


@dataclass(frozen=True)
class MeanField:
    """Independent normals in unconstrained space: cheap, blind to correlation, sds too small.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If `init_scale` is not positive.
    """

    name: ClassVar[str] = "mean_field"
    about: ClassVar[About] = About(
        does="independent normals: no correlation, sds too small where there is some",
        cost="D",
        use="a first look, or many thousand latents",
        paper="Kucukelbir et al. 2017",
    )

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)

    def build(self, density: Density) -> Guide:
        """The guide for this model, centred on the origin of unconstrained space."""
        return Guide(self.name, density, {density.block: self.family(density.dim)})

    def family(self, dim: int) -> Family:
        """The family over `[D]`."""
        return DiagonalNormal(dim, self.init_scale)


def require_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise OptionError(f"{name}: {option} must be a positive number, got {value!r}")

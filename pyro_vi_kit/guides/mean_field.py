"""Independent normals in unconstrained space (Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from pyro_vi_kit.density import Density
from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.guides.adaptor import Guide
from pyro_vi_kit.guides.discrete import Discrete, require_discrete, with_tables
from pyro_vi_kit.guides.families import DiagonalNormal, Family
from pyro_vi_kit.registry import About


@dataclass(frozen=True)
class MeanField:
    """Independent normals in unconstrained space: cheap, blind to correlation, sds too small.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.
        discrete: Discrete sites in a data plate that are not summed out: ``"score"``, trained by the
            score function, ``"relaxed"`` or a `Relaxed`, for all of them; or a dict by site, the others
            being summed out. Each gets a table of logits, one row per datum.

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
    discrete: Discrete | None = None

    def __post_init__(self) -> None:
        require_discrete(self.name, self.discrete)
        require_positive(self.name, "init_scale", self.init_scale)

    def build(self, density: Density) -> Guide:
        """The guide for this model, centred on the origin of unconstrained space."""
        return with_tables(self, density, self.init_scale)

    def family(self, dim: int) -> Family:
        """The family over `[D]`."""
        return DiagonalNormal(dim, self.init_scale)


def require_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise OptionError(f"{name}: {option} must be a positive number, got {value!r}")

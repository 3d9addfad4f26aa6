"""Independent normals in unconstrained space (Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import require_one_of
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.discrete import Discrete
from pyro_vi_kit.guides.families import DiagonalNormal, Family
from pyro_vi_kit.guides.pyro_guide import METHODS, Guide
from pyro_vi_kit.guides.spec import GuideSpec
from pyro_vi_kit.guides.supports.support_family import SupportFamily
from pyro_vi_kit.model.log_density import Density

Families = Literal["normal", "support"]


@dataclass(frozen=True)
class MeanField(GuideSpec):
    """Independent normals in unconstrained space: cheap, blind to correlation, sds too small.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.
        families: ``normal``: all latents are normal in unconstrained space. ``support``: by the support
            of each site, Gamma on a half-line, Beta on an interval, Dirichlet on a simplex, von Mises
            where the prior is one, normal elsewhere (Figurnov et al. 2018). Supports that no family
            fits, or that move with other latents or the data, keep the normal; the status of a fit
            names them.
        discrete: Discrete sites in a data plate that are not summed out: ``"score"``, trained by the
            score function, ``"relaxed"`` or a `Relaxed`, for all of them; or a dict by site, the others
            being summed out. Each gets a table of logits, one row per datum.

    Raises:
        OptionError: If `init_scale` is not positive or `families` not known.
    """

    name = "mean_field"
    about = About(
        does="independent normals: no correlation, sds too small where there is some",
        cost="D",
        use="a first look, or many thousand latents",
        paper="Kucukelbir et al. 2017",
    )
    methods = METHODS
    richer = "full_rank"
    per_datum = "mean_field"

    init_scale: float = 0.1
    families: Families = "normal"
    discrete: Discrete | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.name, "families", self.families, get_args(Families))
        if self.families == "support" and self.discrete is not None:
            raise OptionError(
                f"{self.name}: discrete= goes with families='normal': leave one of them out"
            )

    def build(self, density: Density) -> Guide:
        """The guide for this model, centred on the origin of unconstrained space."""
        if self.families == "support":
            family = SupportFamily(density.block, self.init_scale)
            return self.of_families(density, {density.block: family})
        return super().build(density)

    def family(self, dim: int) -> Family:
        """The family over `[D]`, where sites are not told apart.

        Raises:
            OptionError: If families are to follow the supports of sites.
        """
        if self.families == "support":
            raise OptionError(
                f"{self.name}: families='support' is for latents that are held for all rows at once; "
                "leave batch_size= out, or use families='normal'"
            )
        return DiagonalNormal(dim, self.init_scale)

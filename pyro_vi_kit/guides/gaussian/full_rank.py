"""One multivariate normal in unconstrained space (Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.discrete import Discrete
from pyro_vi_kit.guides.families import DenseNormal, Family
from pyro_vi_kit.guides.spec import GuideSpec, require_dense


@dataclass(frozen=True)
class FullRank(GuideSpec):
    """One multivariate normal in unconstrained space: exact for Gaussian posteriors.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.
        discrete: Discrete sites in a data plate that are not summed out: ``"score"``, trained by the
            score function, ``"relaxed"`` or a `Relaxed`, for all of them; or a dict by site, the others
            being summed out. Each gets a table of logits, one row per datum.

    Raises:
        OptionError: If `init_scale` is not positive.
    """

    name = "full_rank"
    about = About(
        does="one Gaussian, any linear correlation",
        cost="D^2",
        use="the default: most posteriors with enough data",
        paper="Kucukelbir et al. 2017",
    )
    methods = ("lbfgs", "moments", "stochastic")
    richer = "affine_coupling"
    per_datum = "full_rank"

    init_scale: float = 0.1
    discrete: Discrete | None = None

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for a dense covariance.
        """
        require_dense(self.name, dim)
        return DenseNormal(dim, self.init_scale)

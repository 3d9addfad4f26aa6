"""The mode: as a point, and with the Gaussian of the curvature there (Tierney & Kadane 1986)."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import DenseNormal, Family, PointMass
from pyro_vi_kit.guides.spec import GuideSpec, require_dense


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


@dataclass(frozen=True)
class Laplace(GuideSpec):
    """The Gaussian of the log density's curvature at its mode in unconstrained space.

    A fit searches for the mode and maximises no bound. Of several modes it takes the one of the highest
    evidence by this very approximation.

    Args:
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If `init_scale` is not positive.
    """

    name = "laplace"
    about = About(
        does="one Gaussian around the mode: blind to skewness, exact for Gaussian posteriors",
        cost="no steps: a search, then D gradients and D^3",
        use="much data and few latents, or where nothing may take long",
        paper="Tierney & Kadane 1986",
    )
    methods = ("lbfgs",)
    richer = "full_rank"

    init_scale: float = 0.1

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for a dense covariance.
        """
        require_dense(self.name, dim)
        return ModeNormal(dim, self.init_scale)


class ModeNormal(DenseNormal):
    """A multivariate normal that a fit puts on a mode."""

    searched = True

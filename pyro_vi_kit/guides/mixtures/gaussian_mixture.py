"""A mixture of Gaussians in unconstrained space: for posteriors with several modes.

Reverse KL with one component per mode covers them all, where any single Gaussian keeps one. Fits on
the ELBO hold one set of draws for each component, weighted by its weight (Morningstar et al. 2021;
`optimize/deterministic/mixtures.py`); everything else differentiates draws of the mixture as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import require_count, require_one_of
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import Family, GaussianFamily
from pyro_vi_kit.guides.mixtures.normal_mixture import NormalMixture
from pyro_vi_kit.guides.spec import GuideSpec

Covariance = Literal["full", "diagonal"]

_COMPONENTS = 4
# As `auto` takes it: of components, and dimensions above which full covariances of each are too dear.
_MANY, _MANY_DIMS = 8, 200
# The Jacobian of a draw takes C D^2 numbers with full covariances, and D^2 with diagonal ones.
_MAX_DIM = {"full": 200, "diagonal": 1000}
# How far apart the parts of a Gaussian are put, in its sds: the mixture still looks like one.
_APART = 0.8


@dataclass(frozen=True)
class Mixture(GuideSpec):
    """A mixture of Gaussians: covers several modes, which every one-mode guide keeps one of.

    Args:
        components: K. By default as many as searches from several points find modes, from 2 to 8; four
            where they find one, and in a loop of your own.
        covariance: Of each component: ``full``, up to 200 dimensions, or ``diagonal``, up to 1,000.
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "mixture"
    about = About(
        does="K Gaussians: several modes, heavy or bent tails roughly",
        cost="K x D^2, diagonal K x D",
        use="several modes, labels that switch",
        paper="Morningstar et al. 2021",
    )
    methods = ("lbfgs", "stochastic")
    after = "affine_coupling"
    per_datum = "mixture"
    covers_modes = True

    components: int | None = None
    covariance: Covariance = "full"
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.components is not None:
            require_count(self.name, "components", self.components)
        require_one_of(self.name, "covariance", self.covariance, get_args(Covariance))

    @classmethod
    def candidates(cls, dim: int, modes: int) -> Sequence[GuideSpec]:
        """See `GuideSpec.candidates`; several modes may be more than searches have found."""
        mixture = cls(covariance="full" if dim <= _MANY_DIMS else "diagonal")
        return (mixture,) if modes == 1 else (mixture, replace(mixture, components=_MANY))

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large.
        """
        self.require_room(dim)
        count = self.components or _COMPONENTS
        return GaussianMixture(dim, count, self.init_scale, diagonal=self.covariance == "diagonal")

    def require_room(self, dim: int) -> None:
        """Refuse more dimensions than a draw's gradient has room for.

        Raises:
            OptionError: If D is too large.
        """
        if dim > _MAX_DIM[self.covariance]:
            other = "covariance='diagonal'" if dim <= _MAX_DIM["diagonal"] else "guide='mean_field'"
            raise OptionError(
                f"guide 'mixture' with {self.covariance} covariances takes at most "
                f"{_MAX_DIM[self.covariance]:,} unconstrained dimensions, and this model has {dim:,}: "
                f"use {other}"
            )


class GaussianMixture(GaussianFamily):
    """K normals, each in units of a frame of its own, which is what it was started from.

    Args:
        dim: D.
        components: K.
        scale: Initial standard deviation; means are as far apart.
        diagonal: Whether covariances are diagonal.
    """

    def __init__(self, dim: int, components: int, scale: float, *, diagonal: bool) -> None:
        super().__init__()
        self.diagonal = diagonal
        self.centre: Tensor
        self.unit: Tensor
        one = torch.ones(components, dim)
        self.register_buffer("centre", torch.zeros(components, dim))
        self.register_buffer("unit", one if diagonal else one.diag_embed())
        self.logits = nn.Parameter(torch.zeros(components))
        # Components that are alike would stay alike.
        self.loc = nn.Parameter(scale * torch.randn(components, dim))
        self.log_diagonal = nn.Parameter(torch.full((components, dim), scale).log())
        if not diagonal:
            self.lower = nn.Parameter(torch.zeros(components, dim, dim))

    @property
    def components(self) -> int:
        """K."""
        return len(self.logits)

    @property
    def strata(self) -> int:
        """K."""
        return self.components

    def forward(self, context: Tensor | None = None) -> NormalMixture:
        """The distribution, event shape `[D]`."""
        own = self.log_diagonal.exp()
        if self.diagonal:
            return NormalMixture(
                self.logits,
                self.centre + self.unit * self.loc,
                self.unit * own,
                validate_args=False,
            )
        locs = self.centre + (self.unit @ self.loc.unsqueeze(-1))[..., 0]
        scales = self.unit @ (self.lower.tril(-1) + own.diag_embed())
        return NormalMixture(self.logits, locs, scales, validate_args=False)

    @torch.no_grad()
    def become(self, logits: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        """Take on these components, which become the frames: `[K]`, `[K, D]`, `[K, D, D]`."""
        self.centre.copy_(locs)
        self.unit.copy_(conditional_sds(scale_trils) if self.diagonal else scale_trils)
        self.logits.copy_(logits.log_softmax(-1))
        self.loc.zero_()
        self.log_diagonal.zero_()
        if not self.diagonal:
            self.lower.zero_()

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Split this Gaussian in K parts that lie apart, and together look like it."""
        locs, scale_trils = split(loc, scale_tril, self.components)
        self.become(torch.zeros_like(self.logits), locs, scale_trils)

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move all means, in frames that are still the unit ones."""
        self.loc.add_(loc - self.loc.mean(0))


def split(
    loc: Tensor, scale_tril: Tensor, parts: int, directions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normals whose equal mixture has this mean and covariance, apart in one plane.

    Args:
        loc: `[D]`.
        scale_tril: `[D, D]`.
        parts: K.
        directions: Two orthonormal ones `[D, 2]` in units of the Gaussian (one, `[D, 1]`, where D = 1);
            the first coordinates by default.

    Returns:
        Means `[K, D]` and Cholesky factors `[K, D, D]`.
    """
    dim = len(loc)
    if directions is None:
        directions = torch.eye(dim, dtype=loc.dtype, device=loc.device)[:, : min(dim, 2)]
    offsets = _offsets(parts, directions.shape[1]).to(directions) @ directions.T
    left = torch.eye(dim, dtype=loc.dtype, device=loc.device) - offsets.T @ offsets / parts
    factor = scale_tril @ torch.linalg.cholesky(left)
    return loc + offsets @ scale_tril.T, factor.expand(parts, -1, -1).clone()


def _offsets(parts: int, dims: int) -> Tensor:
    """Points of mean zero, `[K, dims]`: on a circle, or on a line for two or in one dimension."""
    if parts > 2 and dims > 1:
        angles = 2.0 * math.pi * torch.arange(parts, dtype=torch.float64) / parts
        return _APART * torch.stack([angles.cos(), angles.sin()], -1)
    line = torch.linspace(-1.0, 1.0, parts, dtype=torch.float64) if parts > 1 else torch.zeros(1)
    size = line.square().mean().sqrt().clamp_min(1e-12)
    offsets = torch.zeros(parts, dims, dtype=torch.float64)
    offsets[:, 0] = _APART * line / size
    return offsets


def conditional_sds(scale_trils: Tensor) -> Tensor:
    """Sds of the nearest diagonal Gaussians by reverse KL, `[K, D]`, from factors `[K, D, D]`."""
    return torch.cholesky_inverse(scale_trils).diagonal(dim1=-2, dim2=-1).rsqrt()

"""A normal with low-rank plus diagonal covariance (Ong, Nott & Smith 2018)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.discrete import Discrete
from pyro_vi_kit.guides.families import Family, GaussianFamily
from pyro_vi_kit.guides.spec import GuideSpec


@dataclass(frozen=True)
class LowRank(GuideSpec):
    """One normal whose covariance is diagonal plus low rank: the strongest correlations, cheaply.

    Args:
        rank: Directions of correlation, at most D; by default about the square root of D, as in Pyro's
            AutoLowRankMultivariateNormal: parameters and cost then grow as D^1.5.
        init_scale: Initial standard deviation, in unconstrained units.
        discrete: Discrete sites in a data plate that are not summed out: ``"score"``, trained by the
            score function, ``"relaxed"`` or a `Relaxed`, for all of them; or a dict by site, the others
            being summed out. Each gets a table of logits, one row per datum.

    Raises:
        OptionError: If an option is not positive, or `rank` is no integer.
    """

    name = "low_rank"
    about = About(
        does="one Gaussian with the strongest few directions of correlation",
        cost="D^1.5 (D x rank)",
        use="too many latents for full_rank",
        paper="Ong, Nott & Smith 2018",
    )
    methods = ("lbfgs", "stochastic")
    after = "mean_field"
    richer = "full_rank"
    per_datum = "full_rank"

    rank: int | None = None
    init_scale: float = 0.1
    discrete: Discrete | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0
        if self.rank is not None and not whole:
            raise OptionError(
                f"{self.name}: rank must be a positive integer, got {told(self.rank)}"
            )

    def family(self, dim: int) -> Family:
        """The family over `[D]`."""
        rank = min(self.rank or math.ceil(math.sqrt(dim)), dim)
        return LowRankNormal(dim, rank, self.init_scale)


class OneStream(dist.LowRankMultivariateNormal):
    """Torch's, with the noise of diagonal and factor drawn together.

    Torch draws the one for the whole batch and then the other, so that K draws at once are not those
    that K single draws are from the same random state.
    """

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`."""
        dim, rank = self.cov_factor.shape[-2:]
        shape = (*sample_shape, *self.batch_shape, dim + rank)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        wide = (self.cov_factor @ noise[..., dim:, None])[..., 0]
        return self.loc + self.cov_diag.sqrt() * noise[..., :dim] + wide


class LowRankNormal(GaussianFamily):
    """A normal of covariance `unit (diag(exp(2 log_diagonal)) + factor factor^T) unit`.

    The frame (`centre`, `unit`, one number per dimension) is what the family was started from.

    Args:
        dim: D.
        rank: Columns of the factor.
        scale: Initial standard deviation.
    """

    gaussian = "low_rank"

    def __init__(self, dim: int, rank: int, scale: float) -> None:
        super().__init__()
        self.centre: Tensor
        self.unit: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.ones(dim))
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_diagonal = nn.Parameter(torch.full((dim,), scale).log())
        # Not zero, which is a saddle: the columns have to part.
        self.factor = nn.Parameter(0.1 * scale * torch.randn(dim, rank))

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        return OneStream(
            self.centre + self.unit * self.loc,
            self.unit[:, None] * self.factor,
            (self.unit * self.log_diagonal.exp()).square(),
        )

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take this Gaussian's conditional sds as the frame, and its widest directions in them."""
        unit = torch.cholesky_inverse(scale_tril).diagonal().rsqrt()
        columns = widest(scale_tril / unit[:, None], self.factor.shape[1])
        self.become(loc, unit, unit[:, None] * columns)

    @torch.no_grad()
    def become(self, loc: Tensor, sd: Tensor, factor: Tensor) -> None:
        """Take on mean `[D]`, diagonal sds `[D]` and factor `[D, rank]`; the sds become the frame."""
        self.centre.copy_(loc)
        self.unit.copy_(sd)
        self.loc.zero_()
        self.log_diagonal.zero_()
        self.factor.copy_(factor / sd[:, None])

    @torch.no_grad()
    def take_over(self, known: Family) -> bool:
        """See `GaussianFamily.take_over`; independent normals are of rank zero."""
        if not isinstance(known, GaussianFamily) or known.gaussian != "diagonal":
            return super().take_over(known)
        now: Any = known()
        # Not zero, which is a saddle: the columns have to part.
        columns = 0.1 * torch.randn_like(self.factor) / self.factor.shape[1] ** 0.5
        self.become(now.mean, now.stddev, now.stddev[:, None] * columns)
        return True

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move the mean, in a frame that is still the unit one."""
        self.loc.copy_(loc)


def widest(scale_tril: Tensor, rank: int) -> Tensor:
    """The factor `[D, rank]` that, beside an identity, gives the widest directions their variance.

    As in probabilistic principal components (Tipping & Bishop 1999) with noise 1: an eigenvalue v of
    the covariance becomes a column of length sqrt(v - 1).
    """
    values, vectors = torch.linalg.eigh(scale_tril @ scale_tril.T)
    # Never quite zero: a column of zeros would stay one.
    return vectors[:, -rank:] * (values[-rank:] - 1.0).clamp_min(1e-4).sqrt()

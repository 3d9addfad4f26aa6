"""One multivariate t in unconstrained space: a Gaussian with heavy tails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import require_positive
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import DenseNormal, Family, GaussianFamily
from pyro_vi_kit.guides.spec import GuideSpec, require_dense
from pyro_vi_kit.guides.supports.gamma_draws import NOISE, gamma_draws

# Below, a t has no variance, and summaries no sds.
MIN_DF = 2.0
_FIRST_DF = 10.0


@dataclass(frozen=True)
class StudentT(GuideSpec):
    """One multivariate t: a full scale matrix, and tails that keep importance weights bounded.

    Args:
        df: Degrees of freedom, above 2; learned when None.
        init_scale: Initial scale, in unconstrained units.

    Raises:
        OptionError: If `df` is not above 2, or `init_scale` is not positive.
    """

    name = "student_t"
    about = About(
        does="one bump, any linear correlation, tails heavier than a Gaussian's",
        cost="D^2",
        use="heavy-tailed posteriors, or as a proposal for resampling",
        paper="Lange, Little & Taylor 1989; Figurnov et al. 2018",
    )
    richer = "affine_coupling"
    per_datum = "full_rank"

    df: float | None = None
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.df is None:
            return
        require_positive(self.name, "df", self.df)
        if self.df <= MIN_DF:
            raise OptionError(
                f"{self.name}: df must be above {MIN_DF:g}, where a t has a variance, "
                f"got {told(self.df)}"
            )

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for a dense scale matrix.
        """
        require_dense(self.name, dim)
        return DenseT(dim, self.init_scale, self.df)


class ScaleMixture(dist.MultivariateStudentT):
    """Pyro's, with all noise of a draw in one stretch of normals, so that steps can be recorded."""

    symmetric = True

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`, in the degrees of freedom too."""
        noise = t_noise((*sample_shape, *self.batch_shape), self.loc)
        y = t_draws(self.df, noise)
        scale_tril: Any = self.scale_tril
        return self.loc + (scale_tril @ y.unsqueeze(-1)).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        """The centre, `[*batch, D]`."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Of each coordinate, `[*batch, D]`."""
        scale_tril: Any = self.scale_tril
        return scale_tril.square().sum(-1) * (self.df / (self.df - 2.0)).unsqueeze(-1)


def t_noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normals for t draws, `[*shape, D + 16]`."""
    width = like.shape[-1] + NOISE
    return torch.randn(*shape, width, dtype=like.dtype, device=like.device)


def t_draws(df: Tensor, noise: Tensor) -> Tensor:
    """Standard multivariate t draws `[..., D]` from noise `[..., D + 16]`."""
    x, rest = noise.split([noise.shape[-1] - NOISE, NOISE], -1)
    return x * (0.5 * df / gamma_draws(0.5 * df, rest)).sqrt().unsqueeze(-1)


class DenseT(GaussianFamily):
    """A multivariate t over an affine map in units of a frame.

    It holds the Gaussians only in the limit. Started from one, it has its mean and covariance.

    Args:
        dim: D.
        scale: Initial scale.
        df: Degrees of freedom; learned when None.
    """

    def __init__(self, dim: int, scale: float, df: float | None) -> None:
        super().__init__()
        self.affine = DenseNormal(dim, scale)
        self._dim = dim
        first = torch.tensor((_FIRST_DF if df is None else df) - MIN_DF).log()
        self.log_excess: Tensor
        if df is None:
            self.log_excess = nn.Parameter(first)
        else:
            self.register_buffer("log_excess", first)

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, above 2; a scalar."""
        return MIN_DF + self.log_excess.exp()

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        loc, scale_tril = self.affine.moments()
        return ScaleMixture(self.df, loc, scale_tril)

    def draw(
        self,
        shape: tuple[int, ...],
        context: Tensor | None = None,
        *,
        detached: bool = False,
        mirrored: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `Family.draw`; the density without going back from the draws to the noise."""
        loc, scale_tril = self.affine.moments()
        df = self.df
        count = shape[0] // 2 if mirrored else shape[0]
        y = t_draws(df, t_noise((count, *shape[1:]), loc))
        y = torch.cat([y, -y]) if mirrored else y
        value = loc + y @ scale_tril.T
        square = y.square().sum(-1)
        log_q = _log_density(df, square, self._dim) - scale_tril.diagonal().log().sum()
        if not detached:
            return value, log_q
        with torch.no_grad():
            slope = -((df + self._dim) / (df + square)).unsqueeze(-1) * y
            slope = torch.linalg.solve_triangular(scale_tril, slope, upper=False, left=False)
        # Zero, with the slope of log q at constant parameters.
        return value, log_q.detach() + ((value - value.detach()) * slope).sum(-1)

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take on the mean and covariance of this Gaussian."""
        df = self.df
        self.affine.start_from(loc, scale_tril * ((df - 2.0) / df).sqrt())

    def centre_on(self, loc: Tensor) -> None:
        """Move the centre."""
        self.affine.centre_on(loc)


def _log_density(df: Tensor, square: Tensor, dim: int) -> Tensor:
    """Log density of a standard multivariate t at squared lengths `[...]`, nats."""
    half = 0.5 * (df + dim)
    constant = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * dim * (math.pi * df).log()
    return constant - half * torch.log1p(square / df)

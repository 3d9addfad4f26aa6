"""Variational families: modules whose `forward(context=None)` returns a distribution.

A family knows a vector of numbers and nothing of sites. `forward` without a context is the same
distribution for all; with a context `[B, F]` it is one distribution per row (amortized).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import detach
from torch import Tensor, nn


class Table(nn.Module):
    """The numbers of each datum, as they are: one row of a table `[N, p]`.

    Args:
        numbers: `[N, p]`.

    Attributes:
        held: Rows `[B, p]` that stand in for those of a minibatch, while an engine holds them.
    """

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(numbers.clone())
        self.held: Tensor | None = None

    def forward(self, numbers: Tensor) -> Tensor:
        """The numbers themselves."""
        return numbers

    def pick(self, index: Tensor | None) -> Tensor:
        """The rows of a minibatch, `[B, p]`; all when None."""
        if self.held is not None:
            return self.held
        return self.rows if index is None else self.rows[index]


class Family(nn.Module, ABC):
    """A variational family over `[D]`, or `[B, d]` with a context.

    Attributes:
        reparameterised: Whether draws are differentiable in the parameters; one that is not is trained
            by the score function alone.
        searched: Whether a fit finds it by a search of the log density, and not by steps on a bound.
        gaussian: Which Gaussians its members are, where they are all Gaussians of one kind: L-BFGS on
            fixed draws then finds the best of them, and hands it over by `GaussianFamily.start_from`.
        scored: Whether some latents are discrete and trained by the score function.
        relaxed: Whether some are discrete, and softened while training.
        conditioned: Whether it sees the draws of the globals.
        kept: Sites that are normal in unconstrained space because no family fits their support.
    """

    reparameterised: bool = True
    searched: ClassVar[bool] = False
    gaussian: ClassVar[Literal["diagonal", "dense", "low_rank", "blocks"] | None] = None
    scored: bool = False
    relaxed: bool = False
    conditioned: bool = False
    kept: tuple[str, ...] = ()

    @property
    def strata(self) -> int:
        """Components of a mixture, each of which has draws of its own; 0 for no mixture."""
        return 0

    @property
    def table(self) -> Table | None:
        """The table, where each datum has numbers of its own."""
        return None

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""

    def draw(
        self,
        shape: tuple[int, ...],
        context: Tensor | None = None,
        *,
        detached: bool = False,
        mirrored: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Reparameterised draws `[*shape, D]` and log q at them, nats.

        Args:
            shape: Of the draws, before the rows of the context.
            context: `[B, F]`, one distribution per row.
            detached: Take log q at constant parameters: its gradient flows through the draws alone.
            mirrored: Make the second half of an even number of draws the mirror image of the first,
                where the distribution is symmetric.
        """
        return drawn_from(
            self(context),
            shape,
            detached=detached,
            mirrored=mirrored,
            reparameterised=self.reparameterised,
        )


def drawn_from(
    distribution: TorchDistribution,
    shape: tuple[int, ...],
    *,
    detached: bool = False,
    mirrored: bool = False,
    reparameterised: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draws of a distribution and its log density at them, nats; see `Family.draw`."""
    if mirrored and _is_symmetric(distribution):
        half = distribution.rsample((shape[0] // 2, *shape[1:]))
        value = torch.cat([half, 2.0 * distribution.mean - half])
    else:
        value = (distribution.rsample if reparameterised else distribution.sample)(shape)
    # The copy shares no cache with the original, whose way back to the noise knows parameters.
    density = detach(distribution) if detached else distribution
    return value, density.log_prob(value)


def _is_symmetric(distribution: TorchDistribution) -> bool:
    """Whether it is its own mirror image about the mean, as a normal distribution is."""
    if getattr(distribution, "symmetric", False):
        return True
    normals = (dist.MultivariateNormal, dist.LowRankMultivariateNormal)
    base = getattr(distribution, "base_dist", None)
    return isinstance(distribution, normals) or (
        isinstance(distribution, dist.Independent) and isinstance(base, dist.Normal)
    )


class GaussianFamily(Family):
    """A family that can be started from a Gaussian: what a closed-form or L-BFGS fit hands over."""

    @abstractmethod
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the member nearest to N(loc, scale_tril scale_tril^T); `[D]`, `[D, D]`."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and Cholesky factor of the covariance `[D, D]`, where it is a Gaussian."""
        q: Any = self()
        return q.mean, q.stddev.diag() if self.gaussian == "diagonal" else q.scale_tril

    @torch.no_grad()
    def take_over(self, known: Family) -> bool:
        """Become what the simpler family of an earlier fit is; whether that can be said."""
        if not isinstance(known, GaussianFamily) or known.gaussian != "dense":
            return False
        self.start_from(*known.moments())
        return True

    @abstractmethod
    def centre_on(self, loc: Tensor) -> None:
        """Move the mean of an untrained member to `loc`, `[D]`."""


class PointMass(Family):
    """All mass at one point."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        return dist.Delta(self.loc, event_dim=1)


class DiagonalNormal(GaussianFamily):
    """Independent normals, in units of a fixed frame.

    The frame (`centre`, `unit`) is what the family was started from. Parameters are measured in it, so
    one optimiser step means the same whether a latent lives on the scale of 0.001 or 1,000.
    """

    gaussian = "diagonal"

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.centre: Tensor
        self.unit: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.ones(dim))
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((dim,), scale).log())

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        loc = self.centre + self.unit * self.loc
        return dist.Normal(loc, self.unit * self.log_scale.exp()).to_event(1)

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take this Gaussian as the frame; parameters go back to zero."""
        # The reverse-KL optimal diagonal for a Gaussian has the precision's diagonal, not the
        # covariance's: sd_i = 1 / sqrt(precision_ii).
        precision = torch.cholesky_inverse(scale_tril)
        self.centre.copy_(loc)
        self.unit.copy_(precision.diagonal().rsqrt())
        self.loc.zero_()
        self.log_scale.zero_()

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move the mean, in a frame that is still the unit one."""
        self.loc.copy_(loc)


class DenseNormal(GaussianFamily):
    """One multivariate normal, by the Cholesky factor of its covariance in units of a fixed frame.

    The frame (`centre`, `unit`, a lower triangle) is what the family was started from: in its units a
    strongly correlated, badly scaled posterior is round.
    """

    gaussian = "dense"

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.centre: Tensor
        self.unit: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.eye(dim))
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_diagonal = nn.Parameter(torch.full((dim,), scale).log())
        self.lower = nn.Parameter(torch.zeros(dim, dim))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and Cholesky factor of the covariance `[D, D]`."""
        tril = self.lower.tril(-1) + self.log_diagonal.exp().diag()
        return self.centre + self.unit @ self.loc, self.unit @ tril

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        loc, scale_tril = self.moments()
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take this Gaussian as the frame; parameters go back to zero."""
        self.centre.copy_(loc)
        self.unit.copy_(scale_tril)
        self.loc.zero_()
        self.log_diagonal.zero_()
        self.lower.zero_()

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move the mean, in a frame that is still the unit one."""
        self.loc.copy_(loc)

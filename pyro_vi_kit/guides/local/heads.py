"""From a row of numbers to a distribution over one datum's latents."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn


class Head(nn.Module, ABC):
    """Reads a distribution over `[d]` off p numbers, for as many data as there are rows.

    Distributions are in units of a fixed frame (`centre`, `unit`, a number for each of the d latents),
    so that one optimiser step means the same for a latent on the scale of 0.001 and one on the scale
    of 1,000.

    Args:
        dim: d.

    Attributes:
        size: p.
        scored: Whether some of the latents are discrete and trained by the score function.
        relaxed: Whether some are discrete, and softened while training.
        strata: Components of each distribution, where it is a mixture; 0 for any other.
    """

    size: int
    scored: bool = False
    relaxed: bool = False
    strata: int = 0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.centre: Tensor
        self.unit: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.ones(dim))

    @abstractmethod
    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The distributions, batch shape `[...]`, event shape `[d]`, of numbers `[..., p]`."""

    @abstractmethod
    def initial(self, scale: float) -> Tensor:
        """Numbers `[p]` of an untrained datum: centred on the frame, sd ``scale`` of its units."""

    @torch.no_grad()
    def frame(self, centre: Tensor, unit: Tensor) -> None:
        """Measure in these units from now on: `[d]` each."""
        self.centre.copy_(centre)
        self.unit.copy_(unit)

    @torch.no_grad()
    def reframe(self, numbers: Tensor, centre: Tensor, unit: Tensor) -> Tensor:
        """Measure in these units from now on, and give the same distributions' numbers in them.

        Args:
            numbers: `[..., p]` in the present frame.
            centre: `[d]`.
            unit: `[d]`.
        """
        shift, factor = (self.centre - centre) / unit, self.unit / unit
        self.frame(centre, unit)
        return self._converted(numbers, shift, factor)

    @abstractmethod
    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        """Numbers of distributions that are stretched by a factor and then moved: `[d]` each."""


class PointHead(Head):
    """All mass at one point: its position."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.size = dim

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The point of each datum."""
        return dist.Delta(self.centre + self.unit * numbers, event_dim=1)

    def initial(self, scale: float) -> Tensor:
        """The frame's centre."""
        return self.centre.new_zeros(self.size)

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        return shift + factor * numbers


class NormalHead(Head):
    """Independent normals: means, then log standard deviations."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.size = 2 * dim

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The normals of each datum."""
        loc, log_scale = numbers.split(self.dim, -1)
        loc, scale = self.centre + self.unit * loc, self.unit * log_scale.exp()
        return dist.Normal(loc, scale).to_event(1)

    def initial(self, scale: float) -> Tensor:
        """Mean zero, this sd."""
        numbers = self.centre.new_zeros(self.size)
        numbers[self.dim :] = torch.tensor(scale, device=numbers.device).log()
        return numbers

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        loc, log_scale = numbers.split(self.dim, -1)
        return torch.cat([shift + factor * loc, log_scale + factor.log()], -1)


class DenseHead(Head):
    """One multivariate normal: means, log diagonal and lower triangle of its Cholesky factor."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.size = 2 * dim + dim * (dim - 1) // 2
        self.places: Tensor
        rows, columns = torch.tril_indices(dim, dim, -1)
        self.register_buffer("places", rows * dim + columns, persistent=False)

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The normal of each datum."""
        dim = self.dim
        loc, log_diagonal, below = numbers.split([dim, dim, self.size - 2 * dim], -1)
        flat = numbers.new_zeros(*numbers.shape[:-1], dim * dim)
        lower = flat.index_copy(-1, self.places, below).unflatten(-1, (dim, dim))
        scale_tril = self.unit[:, None] * (lower + torch.diag_embed(log_diagonal.exp()))
        return dist.MultivariateNormal(self.centre + self.unit * loc, scale_tril=scale_tril)

    def initial(self, scale: float) -> Tensor:
        """Mean zero, this sd, no correlation."""
        numbers = self.centre.new_zeros(self.size)
        numbers[self.dim : 2 * self.dim] = torch.tensor(scale, device=numbers.device).log()
        return numbers

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        dim = self.dim
        loc, log_diagonal, below = numbers.split([dim, dim, self.size - 2 * dim], -1)
        rows = torch.div(self.places, dim, rounding_mode="floor")
        parts = [shift + factor * loc, log_diagonal + factor.log(), below * factor[rows]]
        return torch.cat(parts, -1)

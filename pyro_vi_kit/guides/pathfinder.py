"""Multi-path Pathfinder (Zhang, Carpenter, Gelman & Vehtari 2022): Gaussians on the ways to modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.density import Density
from pyro_vi_kit.guides.adaptor import Guide
from pyro_vi_kit.guides.affine_coupling import require_count
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.full_rank import require_dense
from pyro_vi_kit.guides.mean_field import require_positive
from pyro_vi_kit.registry import About

_LOG_TWO_PI = 1.8378770664093453


@dataclass(frozen=True)
class Pathfinder:
    """Multi-path Pathfinder: searches for modes, and the best Gaussian along each search's way.

    The distribution is the mixture of these Gaussians, weighted by their evidence as their ELBOs tell
    it. The importance resampling that completes the method is `Posterior.resample`, with the density of
    the whole mixture in the weights.

    Args:
        paths: Number of searches, K.
        history: Steps that a Gaussian's curvature is made of, J; 6 in the paper.
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name: ClassVar[str] = "pathfinder"
    about: ClassVar[About] = About(
        does="a mixture of Gaussians, one for each search; several modes where searches find them",
        cost="no steps: K searches; a draw K x D^2",
        use="a first answer to resample from, starting points for NUTS, a look for other modes",
        paper="Zhang, Carpenter, Gelman & Vehtari 2022",
    )

    paths: int = 8
    history: int = 20
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)
        require_count(self.name, "paths", self.paths)
        require_count(self.name, "history", self.history)

    def build(self, density: Density) -> Guide:
        """The guide for this model; centres from torch's random state.

        Raises:
            OptionError: If the model has too many latents for dense covariances.
        """
        return Guide(self.name, density, {density.block: self.family(density.dim)})

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for dense covariances.
        """
        require_dense(self.name, dim)
        return PathMixture(dim, self.paths, self.history, self.init_scale)


class DenseMixture(TorchDistribution):
    """A mixture of multivariate normals whose weights are no parameters.

    A draw is a reparameterised one of a component chosen by the weights. As these are constant, its
    gradient is that of the mixture.

    Args:
        log_weights: Normalised, `[K]`.
        locs: `[K, D]`.
        scale_trils: `[K, D, D]`.
        batch_shape: Of the distribution.
    """

    arg_constraints: ClassVar[Any] = {}
    support: ClassVar[Any] = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        log_weights: Tensor,
        locs: Tensor,
        scale_trils: Tensor,
        batch_shape: Any = (),
        validate_args: bool | None = None,
    ) -> None:
        self.log_weights = log_weights
        self.locs = locs
        self.scale_trils = scale_trils
        super().__init__(torch.Size(batch_shape), locs.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DenseMixture:
        """The same distribution with this batch shape."""
        return DenseMixture(self.log_weights, self.locs, self.scale_trils, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`."""
        dim = self.locs.shape[-1]
        shape = (*sample_shape, *self.batch_shape, dim + 1)
        noise, choice = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device).split(
            [dim, 1], -1
        )
        bounds = self.log_weights.exp().cumsum(-1)[:-1]
        chosen = (torch.special.ndtr(choice) > bounds).sum(-1, keepdim=True)
        # One component after the other: a factor for each draw would not fit into memory.
        value = torch.zeros_like(noise)
        for k, (loc, tril) in enumerate(zip(self.locs, self.scale_trils, strict=True)):
            value = torch.where(chosen == k, loc + noise @ tril.T, value)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `[..., D]`, nats."""
        parts = []
        for loc, tril in zip(self.locs, self.scale_trils, strict=True):
            offset = (value - loc).reshape(-1, len(loc))
            noise = torch.linalg.solve_triangular(tril, offset.T, upper=False)
            log_norm = tril.diagonal().log().sum() + 0.5 * len(loc) * _LOG_TWO_PI
            parts.append((-0.5 * noise.square().sum(0) - log_norm).reshape(value.shape[:-1]))
        found = (torch.stack(parts, -1) + self.log_weights).logsumexp(-1)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """`[*batch, D]`."""
        return (self.log_weights.exp() @ self.locs).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """`[*batch, D]`."""
        weights = self.log_weights.exp()
        second = weights @ (self.scale_trils.square().sum(-1) + self.locs.square())
        return (second - (weights @ self.locs).square()).expand(self._extended_shape())


class PathMixture(Family):
    """A mixture of normals that a fit puts on the ways of several searches.

    Args:
        dim: D.
        paths: K.
        history: Steps that a component's curvature is made of.
        scale: Initial standard deviation of each component, and of their centres.
    """

    searched = True

    def __init__(self, dim: int, paths: int, history: int, scale: float) -> None:
        super().__init__()
        self.history = history
        self.log_weights: Tensor
        self.register_buffer("log_weights", torch.zeros(paths).log_softmax(0))
        # Apart from each other, or they would never part.
        self.locs = nn.Parameter(scale * torch.randn(paths, dim))
        self.log_diagonals = nn.Parameter(torch.full((paths, dim), scale).log())
        self.lowers = nn.Parameter(torch.zeros(paths, dim, dim))

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        trils = self.lowers.tril(-1) + self.log_diagonals.exp().diag_embed()
        return DenseMixture(self.log_weights, self.locs, trils)

    @torch.no_grad()
    def become(self, log_weights: Tensor, locs: Tensor, scale_trils: Tensor) -> None:
        """Take on K normals and their weights: `[K]`, `[K, D]`, `[K, D, D]`."""
        self.log_weights.copy_(log_weights.log_softmax(0))
        self.locs.copy_(locs)
        self.log_diagonals.copy_(scale_trils.diagonal(dim1=-2, dim2=-1).log())
        self.lowers.copy_(scale_trils.tril(-1))

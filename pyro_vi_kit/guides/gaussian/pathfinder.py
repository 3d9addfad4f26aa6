"""Multi-path Pathfinder (Zhang, Carpenter, Gelman & Vehtari 2022): Gaussians on the ways to modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.core.options import require_count
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.mixtures.normal_mixture import NormalMixture
from pyro_vi_kit.guides.spec import GuideSpec, require_dense


@dataclass(frozen=True)
class Pathfinder(GuideSpec):
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

    name = "pathfinder"
    about = About(
        does="a mixture of Gaussians, one for each search; several modes where searches find them",
        cost="no steps: K searches; a draw K x D^2",
        use="a first answer to resample from, starting points for NUTS, a look for other modes",
        paper="Zhang, Carpenter, Gelman & Vehtari 2022",
    )
    methods = ("lbfgs",)
    richer = "full_rank"

    paths: int = 8
    history: int = 20
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.name, "paths", self.paths)
        require_count(self.name, "history", self.history)

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for dense covariances.
        """
        require_dense(self.name, dim)
        return PathMixture(dim, self.paths, self.history, self.init_scale)


class DenseMixture(NormalMixture):
    """A mixture of multivariate normals whose weights are no parameters.

    A draw is a reparameterised one of a component chosen by the weights. As these are constant, its
    gradient is that of the mixture.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`."""
        dim = self.locs.shape[-1]
        shape = (*sample_shape, *self.batch_shape, dim + 1)
        noise, choice = torch.randn(shape, dtype=self.locs.dtype, device=self.locs.device).split(
            [dim, 1], -1
        )
        bounds = self.logits.exp().cumsum(-1)[:-1]
        chosen = (torch.special.ndtr(choice) > bounds).sum(-1, keepdim=True)
        # One component after the other: a factor for each draw would not fit into memory.
        value = torch.zeros_like(noise)
        for k, (loc, tril) in enumerate(zip(self.locs, self.scales, strict=True)):
            value = torch.where(chosen == k, loc + noise @ tril.T, value)
        return value


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

    @property
    def strata(self) -> int:
        """K."""
        return len(self.log_weights)

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

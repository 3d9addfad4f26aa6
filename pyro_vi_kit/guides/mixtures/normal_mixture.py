"""Mixtures whose draws can be differentiated in all their parameters, and that of multivariate normals.

With F_i the distribution function of coordinate i given those before it, a draw obeys F(z) = u with u
fixed, so that dz = -J^{-1} dF, where J = dF / dz is a lower triangle (Graves 2016; Figurnov, Mohamed &
Mnih 2018). J is known in closed form, and all coordinates are solved for at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class ImplicitMixture(TorchDistribution):
    """A mixture of normals whose draws carry implicit gradients."""

    has_rsample = True
    logits: Tensor
    locs: Tensor
    scales: Tensor

    @property
    def support(self) -> Any:
        """Vectors of real numbers."""
        return constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `[*sample_shape, ..., D]`, differentiable in all parameters."""
        with torch.no_grad():
            value = self._drawn(torch.Size(sample_shape))
        tensors = (self.logits, self.locs, self.scales)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return value
        return self._with_gradient(value)

    @property
    def log_shares(self) -> Tensor:
        """Logs of the components' weights, `[C, ...]`."""
        return self.logits.log_softmax(-1).movedim(-1, 0)

    def rsample_each(self, draws: int, *, mirrored: bool = False) -> Tensor:
        """Draws of every component by itself, `[draws, C, ..., D]`, each reparameterised.

        They know nothing of the weights, which are factors of whatever is averaged (Morningstar et al.
        2021).

        Args:
            draws: Of each component.
            mirrored: Make the second half of an even number the mirror image of the first.
        """
        count = draws // 2 if mirrored else draws
        locs, spread = self._apart(count)
        half = [spread, -spread] if mirrored else [spread]
        return locs + torch.cat(half)

    @abstractmethod
    def _apart(self, draws: int) -> tuple[Tensor, Tensor]:
        """Means of the components, `[C, ..., D]`, and draws less these, `[draws, C, ..., D]`."""

    @abstractmethod
    def _drawn(self, sample_shape: torch.Size) -> Tensor:
        """Draws without a gradient."""

    @abstractmethod
    def _with_gradient(self, value: Tensor) -> Tensor:
        """The same draws, with their implicit gradients."""


def gumbel(shape: torch.Size, like: Tensor) -> Tensor:
    """Standard Gumbel noise: the largest of logits with it is drawn from their softmax.

    It is noise of no parameter, so that a step can be replayed, which `torch.multinomial` would not
    allow.

    Args:
        shape: Of the noise.
        like: Has its dtype and device.
    """
    uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
    return -torch.log(-torch.log(uniform.clamp(min=torch.finfo(like.dtype).tiny)))


class NormalMixture(ImplicitMixture):
    """A mixture of C normals over `[D]`, with diagonal or with any covariances.

    Args:
        logits: `[C]`.
        locs: `[C, D]`.
        scales: Standard deviations `[C, D]`, or Cholesky factors `[C, D, D]`.
        batch_shape: Of equal copies.
    """

    def __init__(
        self,
        logits: Tensor,
        locs: Tensor,
        scales: Tensor,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 - it cannot be changed
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.locs, self.scales = logits, locs, scales
        super().__init__(batch_shape, locs.shape[-1:], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """What the parameters may be."""
        scales = constraints.lower_cholesky if self.dense else constraints.positive
        return {"logits": constraints.real, "locs": constraints.real, "scales": scales}

    @property
    def dense(self) -> bool:
        """Whether covariances have anything beside their diagonals."""
        return self.scales.dim() == 3

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same distribution for each of a batch."""
        shape = torch.Size(batch_shape)
        return type(self)(self.logits, self.locs, self.scales, shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """`[..., D]`."""
        mean = self.logits.softmax(-1) @ self.locs
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """`[..., D]`."""
        own = self.scales.square().sum(-1) if self.dense else self.scales.square()
        second = self.logits.softmax(-1) @ (self.locs.square() + own)
        return second.expand(self.batch_shape + self.event_shape) - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        return torch.logsumexp(self.log_parts(value), 0)

    def log_parts(self, value: Tensor) -> Tensor:
        """Log density of each component times its weight, `[C, ...]`, at `[..., D]`, nats."""
        parts = self._by_coordinate(self._standardised(value)).sum(-1)
        log_shares = self.logits.log_softmax(-1)[:, None]
        return (log_shares + parts).reshape(-1, *value.shape[:-1])

    def _apart(self, draws: int) -> tuple[Tensor, Tensor]:
        batch = (1,) * len(self.batch_shape)
        locs = self.locs.reshape(len(self.locs), *batch, -1)
        shape = (draws, len(self.locs), *self.batch_shape, *self.event_shape)
        noise = torch.randn(shape, dtype=locs.dtype, device=locs.device)
        if not self.dense:
            return locs, noise * self.scales.reshape(locs.shape)
        return locs, torch.einsum("cij,tc...j->tc...i", self.scales, noise)

    def _drawn(self, sample_shape: torch.Size) -> Tensor:
        shape, (count, dim) = sample_shape + self.batch_shape, self.locs.shape
        # All noise of a draw comes together, so that K draws at once are K single ones. The component
        # follows from the first number: `torch.multinomial` could not be replayed.
        noise = torch.randn((*shape, 1 + dim), dtype=self.locs.dtype, device=self.locs.device)
        bounds = self.logits.softmax(-1).cumsum(-1)[:-1]
        chosen = (torch.special.ndtr(noise[..., :1]) > bounds).sum(-1)
        noise = noise[..., 1:].reshape(1, -1, dim)
        spread = noise @ self.scales.mT if self.dense else noise * self.scales[:, None]
        values = (self.locs[:, None] + spread).reshape(count, *shape, dim)
        index = chosen.expand(1, *shape).unsqueeze(-1).expand(1, *shape, dim)
        return values.gather(0, index)[0]

    def _standardised(self, value: Tensor) -> Tensor:
        """The noise that each component would have made the points of, `[C, S, D]`."""
        gap = value.reshape(1, -1, value.shape[-1]) - self.locs[:, None]
        if not self.dense:
            return gap / self.scales[:, None]
        return torch.linalg.solve_triangular(self.scales.mT, gap, upper=True, left=False)

    def _sds(self) -> Tensor:
        """Sds of each coordinate given those before it, `[C, 1, D]`."""
        scales = self.scales.diagonal(dim1=-2, dim2=-1) if self.dense else self.scales
        return scales[:, None]

    def _by_coordinate(self, noise: Tensor) -> Tensor:
        """Log density of each coordinate given those before it, by component, `[C, S, D]`."""
        return -0.5 * noise.square() - self._sds().log() - _LOG_ROOT

    def _with_gradient(self, value: Tensor) -> Tensor:
        """The same draws, with their implicit gradients."""
        noise = self._standardised(value)
        logs = self._by_coordinate(noise)
        before = self.logits.log_softmax(-1)[:, None, None] + logs.cumsum(-1) - logs
        shares, below = before.softmax(0), torch.special.ndtr(noise)
        function = (shares * below).sum(0)
        with torch.no_grad():
            slope = self._jacobian(noise, shares, below - function)
            slope = slope + (shares * logs.exp()).sum(0).diag_embed()
        moved = (function - function.detach()).unsqueeze(-1)
        step = torch.linalg.solve_triangular(slope, moved, upper=False)[..., 0]
        return value - step.reshape(value.shape)

    def _jacobian(self, noise: Tensor, shares: Tensor, excess: Tensor) -> Tensor:
        """dF_i / dz_j below the diagonal, `[S, D, D]`.

        Args:
            noise: e, `[C, S, D]`.
            shares: Of the components given the coordinates before i, `[C, S, D]`.
            excess: By how much each component's distribution function is above F, `[C, S, D]`.
        """
        weighed = shares * excess
        if not self.dense:
            # The shares of coordinate i move with each z_j before it by the score of that coordinate.
            scores = noise / self.scales[:, None]
            return -torch.einsum("csi,csj->sij", weighed, scores).tril(-1)
        eye = torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device)
        inverse = torch.linalg.solve_triangular(self.scales, eye, upper=False)
        found = torch.einsum(
            "csi,cij->sij", shares * (-0.5 * noise.square() - _LOG_ROOT).exp(), inverse
        )
        terms = noise.unsqueeze(-1) * inverse[:, None]
        scores = terms.cumsum(-2) - terms
        return (found - torch.einsum("csi,csij->sij", weighed, scores)).tril(-1)

"""Mixtures whose draws are differentiated as a whole, their weights included.

With F_i the distribution function of coordinate i given those before it, a draw obeys F(z) = u with u
fixed (Graves 2016; Figurnov, Mohamed & Mnih 2018).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor


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

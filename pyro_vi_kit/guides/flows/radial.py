"""Radial flow: each layer draws in or pushes out around a point (Rezende & Mohamed 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.flows.flows import Layer, LayeredSpec, Step
from pyro_vi_kit.guides.flows.planar import ONE

_TINY = 1e-30


@dataclass(frozen=True)
class Radial(LayeredSpec):
    """Radial flow over a Gaussian: each layer draws in or pushes out around a point.

    Args:
        layers: Number of layers; each has one centre.
        init_scale: Initial standard deviation of the Gaussian, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "radial"
    about = About(
        does="peaks and hollows around a point in each layer; sharper or flatter bumps",
        cost="layers x D + D^2",
        use="few dimensions; otherwise affine_coupling or neural_spline",
        paper="Rezende & Mohamed 2015",
    )
    richer = "affine_coupling"
    per_datum = "affine_coupling"

    layers: int = 16
    init_scale: float = 0.1

    def layer(self, dim: int) -> Layer:
        """See `LayeredSpec.layer`."""
        return Ball(dim)


class _Place(NamedTuple):
    """A point seen from the centre: offset `[N, D]`, its length, and the stretch across and along."""

    offset: Tensor
    length: Tensor
    pull: Tensor
    across: Tensor
    along: Tensor


class Ball(Layer):
    """`y = x + strength (x - c) / (size + |x - c|)`, with `strength > -size`.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._dim = dim
        self.centre = nn.Parameter(torch.randn(dim))
        # Draws are about so far from any centre.
        self.log_size = nn.Parameter(torch.tensor(0.5 * math.log(dim)))
        self.push = nn.Parameter(torch.zeros(()))

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Size and strength."""
        size = self.log_size.exp()
        return size, size * (softplus(self.push + ONE) - 1.0)

    def _seen(self, x: Tensor) -> _Place:
        size, strength = self._numbers()
        offset = x - self.centre
        # At the centre itself a root would have no gradient; with equal seeds a draw may be there.
        length = (offset.square().sum(-1) + _TINY).sqrt()
        pull = 1.0 / (size + length)
        return _Place(
            offset, length, pull, 1.0 + strength * pull, 1.0 + strength * size * pull.square()
        )

    def forward(self, x: Tensor) -> Step:
        """See `Layer.forward`."""
        at = self._seen(x)
        y = self.centre + at.across.unsqueeze(-1) * at.offset
        log_det = (self._dim - 1) * at.across.log() + at.along.log()
        return Step(x, y, log_det, at)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Layer.inverse`; the length r solves `r^2 + (size + strength - R) r = R size`."""
        size, strength = self._numbers()
        offset = y - self.centre
        far = offset.square().sum(-1).sqrt()
        half = 0.5 * (far - size - strength)
        root = (half.square() + far * size).sqrt()
        # Of the two forms of the root, the one that takes no difference of near numbers.
        length = torch.where(half > 0, half + root, far * size / (root - half))
        return self.centre + offset / (1.0 + strength / (size + length)).unsqueeze(-1)

    @torch.no_grad()
    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """See `Layer.carry`; J is one number along the ray from the centre, and another across it."""
        at: _Place = step.kept
        size, strength = self._numbers()
        ray = at.offset / at.length.unsqueeze(-1)
        square = strength * at.pull.square()
        own = -(self._dim - 1) * square / at.across - 2.0 * size * square * at.pull / at.along
        along = (slope * ray).sum(-1)
        outwards = (along - own) / at.along - along / at.across
        return slope / at.across.unsqueeze(-1) + outwards.unsqueeze(-1) * ray

    def to_identity(self) -> None:
        """See `Layer.to_identity`."""
        self.push.zero_()

"""Planar flow: each layer pushes along one direction by a tanh of another (Rezende & Mohamed 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.flows.flows import Layer, LayeredSpec, Step

# softplus of it is 1.
ONE = math.log(math.e - 1.0)
_HALVINGS = 60


@dataclass(frozen=True)
class Planar(LayeredSpec):
    """Planar flow over a Gaussian: each layer moves draws along one direction by a tanh of another.

    Args:
        layers: Number of layers; each is one ridge.
        init_scale: Initial standard deviation of the Gaussian, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "planar"
    about = About(
        does="skewed bumps, some ridges: one direction in each layer",
        cost="layers x D + D^2",
        use="skewness in few directions; otherwise affine_coupling or neural_spline",
        paper="Rezende & Mohamed 2015",
    )
    richer = "affine_coupling"
    per_datum = "affine_coupling"

    layers: int = 16
    init_scale: float = 0.1

    def layer(self, dim: int) -> Layer:
        """See `LayeredSpec.layer`."""
        return Ridge(dim)


class Ridge(Layer):
    """`y = x + v tanh(w x + b)`, with v turned so that `w v > -1` and the map is one to one.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.randn(()))
        self.push = nn.Parameter(torch.zeros(dim))

    def _direction(self) -> tuple[Tensor, Tensor]:
        """V `[D]`, and w v."""
        w = self.weight
        along = w @ self.push
        bounded = softplus(along + ONE) - 1.0
        return self.push + (bounded - along) * w / w.square().sum(), bounded

    def forward(self, x: Tensor) -> Step:
        """See `Layer.forward`."""
        v, along = self._direction()
        h = (x @ self.weight + self.bias).tanh()
        log_det = (along * (1.0 - h.square())).log1p()
        return Step(x, x + h.unsqueeze(-1) * v, log_det, h.detach())

    def inverse(self, y: Tensor) -> Tensor:
        """See `Layer.inverse`; what is unknown is a number: `a + along tanh(a) = w y + b`."""
        v, along = self._direction()
        goal = y @ self.weight + self.bias
        with torch.no_grad():
            a = _bisect(goal, along)
        # One Newton step from the root: no move, but a gradient.
        h = a.tanh()
        a = a - (a + along * h - goal) / (1.0 + along * (1.0 - h.square())).detach()
        return y - a.tanh().unsqueeze(-1) * v

    @torch.no_grad()
    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """See `Layer.carry`; J is the identity and a matrix of rank one (Sherman & Morrison 1950)."""
        v, along = self._direction()
        h = step.kept
        bend = 1.0 - h.square()
        grown = 1.0 + along * bend
        own = -2.0 * along * h * bend / grown
        back = own + (slope @ v - own * along) * bend / grown
        return slope - back.unsqueeze(-1) * self.weight

    def to_identity(self) -> None:
        """See `Layer.to_identity`."""
        self.push.zero_()


def _bisect(goal: Tensor, along: Tensor) -> Tensor:
    """The a of `a + along tanh(a) = goal`, which rises in a where `along > -1`."""
    low, high = goal - along.abs(), goal + along.abs()
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        above = middle + along * middle.tanh() > goal
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * (low + high)

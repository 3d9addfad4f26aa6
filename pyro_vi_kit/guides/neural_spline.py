"""Neural spline flow: monotone splines of half of the coordinates, set by the other half.

The coupling flow of Durkan, Bekasov, Murray & Papamakarios (2019), with a scale and a shift behind each
spline, which alone cannot leave its box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_vi_kit.guides.coupling_layers import MAX_LOG_SCALE
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.flows import OUTPUT_UNIT, Layer, LayeredFlow, Step
from pyro_vi_kit.guides.one_block import OneBlock
from pyro_vi_kit.guides.options import (
    require_count,
    require_dense,
    require_positive,
    require_widths,
)
from pyro_vi_kit.guides.spline import Knots, knots, numbers, spline, unspline
from pyro_vi_kit.registry import About


@dataclass(frozen=True)
class NeuralSpline(OneBlock):
    """Neural spline flow over a Gaussian: bends each coordinate as it needs, by splines.

    Args:
        layers: Number of layers. In each, one half of the coordinates sets the splines of the other and
            has splines of its own; behind each layer the coordinates change places.
        bins: Of each spline, K.
        hidden: Widths of the tanh network in each layer.
        init_scale: Initial standard deviation of the Gaussian, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name: ClassVar[str] = "neural_spline"
    about: ClassVar[About] = About(
        does="nearly any bump: bent, skewed, flat, several humps along a coordinate",
        cost="layers x D x (hidden + bins) + D^2, several times affine_coupling's",
        use="where affine_coupling is not good enough, or in one or two dimensions",
        paper="Durkan et al. 2019",
    )

    layers: int = 4
    bins: int = 8
    hidden: tuple[int, ...] = (32,)
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)
        require_count(self.name, "layers", self.layers)
        require_count(self.name, "bins", self.bins)
        object.__setattr__(self, "hidden", require_widths(self.name, self.hidden))

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for a dense covariance.
        """
        require_dense(self.name, dim)
        layers = [SplineCoupling(dim, self.bins, self.hidden) for _ in range(self.layers)]
        return LayeredFlow(dim, layers, self.init_scale)


class SplineCoupling(Layer):
    """Splines of all coordinates, those of the second half set by a network of the first.

    Args:
        dim: D.
        bins: Of each spline.
        hidden: Widths of the network.
    """

    by_autograd = True

    def __init__(self, dim: int, bins: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self._given, self._bins = dim // 2, bins
        self._each = numbers(bins) + 2
        self.order: Tensor
        self.register_buffer("order", torch.randperm(dim))
        moved = dim - self._given
        widths = [self._given, *hidden, moved * self._each]
        shapes = list(pairwise(widths)) if dim > 1 else []
        self.weights = nn.ParameterList(torch.randn(i, o) / math.sqrt(i) for i, o in shapes)
        # With one dimension there is nothing to look at, and the last bias is all.
        self.biases = nn.ParameterList(
            torch.zeros(o) for o in (widths[1:] if dim > 1 else widths[-1:])
        )
        self.own = nn.Parameter(torch.zeros(self._given, self._each)) if dim > 1 else None

    def _raw(self, given: Tensor) -> Tensor:
        """Free numbers of all coordinates, `[N, D, p]`, for the first half `[N, D // 2]`."""
        x = given
        if self.own is None:
            return (self.biases[-1] * OUTPUT_UNIT).expand(len(x), 1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(bias, x, weight).tanh()
        moved = torch.addmm(self.biases[-1], x, self.weights[-1]).unflatten(-1, (-1, self._each))
        raw = torch.cat([self.own.expand(len(x), -1, -1), moved], 1)
        return raw * OUTPUT_UNIT

    def _parts(self, raw: Tensor) -> tuple[Knots, Tensor, Tensor]:
        """Splines, log scales and shifts."""
        log_scale = MAX_LOG_SCALE * (raw[..., -2] / MAX_LOG_SCALE).tanh()
        return knots(raw[..., :-2], self._bins), log_scale, raw[..., -1]

    def forward(self, x: Tensor) -> Step:
        """See `Layer.forward`."""
        at, log_scale, shift = self._parts(self._raw(x[:, : self._given]))
        bent, log_slope = spline(x, at)
        y = torch.addcmul(shift, bent, log_scale.exp())
        log_stretch = log_slope + log_scale
        log_det = log_stretch.sum(-1)
        return Step(x, y.index_select(-1, self.order), log_det, log_stretch.detach().exp())

    def inverse(self, y: Tensor) -> Tensor:
        """See `Layer.inverse`."""
        y = y.index_select(-1, self.order.argsort())
        first = y[:, :0]
        if self.own is not None:
            own = self.own.expand(len(y), -1, -1) * OUTPUT_UNIT
            first = self._unbent(y[:, : self._given], own)
        second = self._unbent(y[:, self._given :], self._raw(first)[:, self._given :])
        return torch.cat([first, second], -1)

    def _unbent(self, y: Tensor, raw: Tensor) -> Tensor:
        at, log_scale, shift = self._parts(raw)
        return unspline((y - shift) * (-log_scale).exp(), at)

    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """See `Layer.carry`; the second half first, which the first one looks at."""
        slope = slope - _back(step.log_det, step.x, torch.ones_like(step.log_det))
        weight = slope / step.kept
        if self._given == 0:
            return weight
        weight[:, : self._given] = 0.0
        # Through the network to what it was given, and through the splines that it sets.
        looked_at = _back(step.y, step.x, weight.index_select(-1, self.order))
        first = (slope - looked_at)[:, : self._given] / step.kept[:, : self._given]
        behind = torch.cat([first, weight[:, self._given :]], -1)
        return behind.index_select(-1, self.order)

    def to_identity(self) -> None:
        """See `Layer.to_identity`: up to the order of the coordinates."""
        for last in (*self.weights[-1:], self.biases[-1]):
            last.zero_()
        if self.own is not None:
            self.own.zero_()


def _back(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weighted sum of `out` in x."""
    return torch.autograd.grad(out, x, weight, retain_graph=True)[0]

"""Neural spline flow: monotone splines of half of the coordinates, set by the other half.

The coupling flow of Durkan, Bekasov, Murray & Papamakarios (2019), with a scale and a shift behind each
spline, which alone cannot leave its box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.options import require_count
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.flows.flows import OUTPUT_UNIT, Layer, LayeredSpec, Step
from pyro_vi_kit.guides.flows.spline_layers import (
    Setters,
    couple,
    numbers_of,
    slope_behind,
    uncouple,
)


@dataclass(frozen=True)
class NeuralSpline(LayeredSpec):
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

    name = "neural_spline"
    about = About(
        does="nearly any bump: bent, skewed, flat, several humps along a coordinate",
        cost="layers x D x (hidden + bins) + D^2, two or three times affine_coupling's",
        use="where affine_coupling is not good enough, or in one or two dimensions",
        paper="Durkan et al. 2019",
    )
    per_datum = "affine_coupling"

    layers: int = 4
    bins: int = 8
    hidden: tuple[int, ...] = (32,)
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.name, "bins", self.bins)

    def layer(self, dim: int) -> Layer:
        """See `LayeredSpec.layer`."""
        return SplineCoupling(dim, self.bins, self.hidden)


class SplineCoupling(Layer):
    """Splines of all coordinates, those of the second half set by a network of the first.

    Args:
        dim: D.
        bins: Of each spline.
        hidden: Widths of the network.
    """

    def __init__(self, dim: int, bins: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self._given, each = dim // 2, numbers_of(bins)
        self.order: Tensor
        self.register_buffer("order", torch.randperm(dim))
        widths = [self._given, *hidden, each * (dim - self._given)]
        shapes = list(pairwise(widths)) if dim > 1 else []
        self.weights = nn.ParameterList(torch.randn(i, o) / math.sqrt(i) for i, o in shapes)
        # With one dimension there is nothing to look at, and the last bias is all.
        self.biases = nn.ParameterList(
            torch.zeros(o) for o in (widths[1:] if dim > 1 else widths[-1:])
        )
        self.own = nn.Parameter(torch.zeros(each, self._given))

    def _setters(self) -> Setters:
        """What sets the splines, the last of them in its unit."""
        weights = [*self.weights]
        weights[-1:] = [weight * OUTPUT_UNIT for weight in weights[-1:]]
        biases = [*self.biases[:-1], self.biases[-1] * OUTPUT_UNIT]
        return Setters(self.own * OUTPUT_UNIT, weights, biases)

    def forward(self, x: Tensor) -> Step:
        """See `Layer.forward`."""
        y, log_det, done = couple(x.mT.contiguous(), self._setters())
        # Of many draws it is large, and without a gradient nobody asks.
        kept = done if torch.is_grad_enabled() else None
        return Step(x, y.index_select(0, self.order).mT, log_det, kept)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Layer.inverse`."""
        return uncouple(y.mT.index_select(0, self.order.argsort()), self._setters()).mT

    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """See `Layer.carry`."""
        behind = slope_behind(step.kept, slope.mT.contiguous(), self._setters())
        return behind.index_select(0, self.order).mT

    def to_identity(self) -> None:
        """See `Layer.to_identity`: up to the order of the coordinates."""
        for last in (*self.weights[-1:], self.biases[-1], self.own):
            last.zero_()

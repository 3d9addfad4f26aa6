"""RealNVP in few operations (Dinh, Sohl-Dickstein & Bengio 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.flows.coupling_layers import (
    MAX_LOG_SCALE,
    Step,
    couple,
    slope_of_log_q,
    uncouple,
)
from pyro_vi_kit.guides.flows.flows import OUTPUT_UNIT, Flow


class CouplingFlow(Flow):
    """Coupling layers under an affine map.

    Each layer scales and shifts one half of the coordinates by a tanh network of the other half; in
    the next layer the halves change roles, and behind each pair of layers the coordinates change
    places. The layers start as the identity, so at first this is the Gaussian of the affine map, and
    the flow learns what that Gaussian lacks. With one dimension nothing can be coupled: the map is all.

    Args:
        dim: D.
        layers: Number of coupling layers, L.
        hidden: Widths of each layer's network.
        permutations: Order of the coordinates behind each pair of layers, `[L // 2, D]`.
        scale: Initial standard deviation.

    Attributes:
        weights: Of all layers' networks, from the input on, each `[L, fan in, fan out]`.
        biases: Each `[L, fan out]`.
    """

    def __init__(
        self, dim: int, layers: int, hidden: Sequence[int], permutations: Tensor, scale: float
    ) -> None:
        super().__init__(dim, scale)
        self.permutations: Tensor
        self.register_buffer("permutations", permutations)
        given, moved = dim // 2, dim - dim // 2
        self.unit: Tensor
        unit = torch.tensor([OUTPUT_UNIT / MAX_LOG_SCALE] * moved + [OUTPUT_UNIT] * moved)
        self.register_buffer("unit", unit, persistent=False)
        widths = [given, *hidden, 2 * moved]
        shapes = list(pairwise(widths)) if dim > 1 else []
        self.weights = nn.ParameterList(torch.randn(layers, i, o) / math.sqrt(i) for i, o in shapes)
        self.biases = nn.ParameterList(torch.zeros(layers, o) for _, o in shapes)
        self.to_identity()

    def through(self, noise: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, list[Step]]:
        """See `Flow.through`."""
        y, log_scales, steps = self.couple(noise)
        return y, log_scales + log_det, steps

    def carry(self, noise: Tensor, steps: list[Step]) -> Tensor:
        """See `Flow.carry`."""
        if not steps:
            return -noise
        return slope_of_log_q(noise, steps, self.permutations, self._networks()[0])

    def couple(self, x: Tensor) -> tuple[Tensor, Tensor, list[Step]]:
        """Through the layers: `[..., D]`, the log determinant `[...]`, and what each layer did."""
        if not len(self.weights):
            return x, x.new_zeros(x.shape[:-1]), []
        flat = x.reshape(-1, self._dim)
        y, log_det, steps = couple(flat, self.permutations, *self._networks())
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1]), steps

    def bend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Flow.bend`."""
        y, log_det, _ = self.couple(x)
        return y, log_det

    def trace_back(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Flow.trace_back`; here it is always known."""
        if not len(self.weights):
            return y, y.new_zeros(y.shape[:-1])
        flat = y.reshape(-1, self._dim)
        x, log_det = uncouple(flat, self.permutations, *self._networks())
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])

    def _networks(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of all layers' networks, the last in its unit."""
        weights = [*self.weights[:-1], self.weights[-1] * self.unit]
        return weights, [*self.biases[:-1], self.biases[-1] * self.unit]

    def take_over(self, known: Family) -> bool:
        """See `GaussianFamily.take_over`; a flow of fewer layers is extended."""
        if not isinstance(known, CouplingFlow):
            return super().take_over(known)
        self.extend(known)
        return True

    @torch.no_grad()
    def extend(self, smaller: CouplingFlow) -> None:
        """Become the same distribution as a flow of fewer layers, or of narrower networks.

        New layers come first and do nothing yet: they permute standard normals. New units of a
        network are not listened to yet.

        Args:
            smaller: With as many hidden layers, and an even number of layers fewer.
        """
        self.affine.load_state_dict(smaller.affine.state_dict())
        self.to_identity()
        new = len(self.permutations) - len(smaller.permutations)
        self.permutations[new:].copy_(smaller.permutations)
        for own, known in zip(self.weights, smaller.weights, strict=True):
            layers, above, below = known.shape
            own[-layers:, :, :below] = 0.0
            own[-layers:, :above, :below] = known
        for own, known in zip(self.biases, smaller.biases, strict=True):
            layers, below = known.shape
            own[-layers:, :below] = known

    @torch.no_grad()
    def to_identity(self) -> None:
        """Zero the last layer of each network: shift 0 and log scale 0, whatever goes in."""
        for last in (*self.weights[-1:], *self.biases[-1:]):
            last.zero_()

"""Inverse autoregressive flow (Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.flows.coupling_layers import MAX_LOG_SCALE
from pyro_vi_kit.guides.flows.flows import OUTPUT_UNIT, Layer, LayeredSpec, Step


@dataclass(frozen=True)
class Autoregressive(LayeredSpec):
    """Inverse autoregressive flow over a Gaussian: each coordinate is bent by all before it.

    Args:
        layers: Number of layers; the order of the coordinates is reversed from one to the next.
        hidden: Widths of the masked tanh network in each layer.
        init_scale: Initial standard deviation of the Gaussian, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "autoregressive"
    about = About(
        does="bent and skewed bumps: funnels, bananas; all coordinates in each layer",
        cost="layers x D^2 x hidden",
        use="up to about 50 dimensions, where affine_coupling needs too many layers",
        paper="Kingma et al. 2016",
    )
    per_datum = "affine_coupling"

    layers: int = 4
    hidden: tuple[int, ...] = (32,)
    init_scale: float = 0.1

    def layer(self, dim: int) -> Layer:
        """See `LayeredSpec.layer`."""
        return MaskedAffine(dim, self.hidden)


class _Pass(NamedTuple):
    """What a network says of `[N, D]`: log scales, shifts, tanh of the former, hidden activations."""

    log_scale: Tensor
    shift: Tensor
    squashed: Tensor
    hidden: list[Tensor]


class MaskedAffine(Layer):
    """`y_i = x_i e^{s_i} + t_i`, with s and t a masked network of the coordinates before i, reversed.

    Args:
        dim: D.
        hidden: Widths of the network (MADE: Germain, Gregor, Murray & Larochelle 2015).
    """

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self._dim = dim
        masks = _masks(dim, hidden)
        widths = [dim, *hidden, 2 * dim]
        self._count = len(masks)
        for i, mask in enumerate(masks):
            # The last one carries the unit of each output.
            self.register_buffer(f"mask{i}", mask, persistent=False)
        fans = [mask.count_nonzero(0).clamp_min(1).sqrt() for mask in masks]
        shapes = zip(pairwise(widths), fans, strict=True)
        self.weights = nn.ParameterList(torch.randn(i, o) / fan for (i, o), fan in shapes)
        self.biases = nn.ParameterList(torch.zeros(o) for o in widths[1:])

    def _weights(self) -> list[Tensor]:
        """The masked weights."""
        return [weight * getattr(self, f"mask{i}") for i, weight in enumerate(self.weights)]

    def _network(self, x: Tensor, weights: Sequence[Tensor]) -> _Pass:
        hidden = []
        for weight, bias in zip(weights[:-1], self.biases[:-1], strict=True):
            x = torch.addmm(bias, x, weight).tanh()
            hidden.append(x)
        raw, shift = torch.addmm(self.biases[-1] * OUTPUT_UNIT, x, weights[-1]).chunk(2, -1)
        squashed = (raw / MAX_LOG_SCALE).tanh()
        return _Pass(MAX_LOG_SCALE * squashed, shift, squashed, hidden)

    def forward(self, x: Tensor) -> Step:
        """See `Layer.forward`."""
        found = self._network(x, self._weights())
        y = torch.addcmul(found.shift, x, found.log_scale.exp())
        return Step(x, y.flip(-1), found.log_scale.sum(-1), found)

    def inverse(self, y: Tensor) -> Tensor:
        """See `Layer.inverse`; D passes, each of which makes one more coordinate right."""
        y, weights = y.flip(-1), self._weights()
        x = torch.zeros_like(y)
        for _ in range(self._dim):
            found = self._network(x, weights)
            x = (y - found.shift) * (-found.log_scale).exp()
        return x

    @torch.no_grad()
    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """See `Layer.carry`; J is a lower triangle, from the network's own Jacobian."""
        weights, found = self._weights(), step.kept
        # Of the activations with respect to x, transposed: `[N, D, H]`.
        jacobian = weights[0] * (1.0 - found.hidden[0].square()).unsqueeze(-2)
        for weight, values in zip(weights[1:-1], found.hidden[1:], strict=True):
            jacobian = (jacobian @ weight) * (1.0 - values.square()).unsqueeze(-2)
        of_scale, of_shift = (jacobian @ weights[-1]).chunk(2, -1)
        of_scale = of_scale * (1.0 - found.squashed.square()).unsqueeze(-2)
        scale = found.log_scale.exp()
        transposed = of_shift + of_scale * (step.x * scale).unsqueeze(-2) + torch.diag_embed(scale)
        goal = (slope - of_scale.sum(-1)).unsqueeze(-1)
        return torch.linalg.solve_triangular(transposed, goal, upper=True).squeeze(-1).flip(-1)

    def to_identity(self) -> None:
        """See `Layer.to_identity`: up to the reversal of the coordinates."""
        self.weights[-1].zero_()
        self.biases[-1].zero_()


def _masks(dim: int, hidden: Sequence[int]) -> list[Tensor]:
    """Which inputs each unit may see, `[fan in, fan out]` for each layer; the last in its unit."""
    # A hidden unit of degree m sees coordinates up to m; the last one is seen by none.
    inner = [torch.arange(width) * max(dim - 1, 1) // width - int(dim == 1) for width in hidden]
    degrees = [torch.arange(dim), *inner]
    masks = [(before[:, None] <= after).double() for before, after in pairwise(degrees)]
    last = (degrees[-1][:, None] < torch.arange(dim)).double() * OUTPUT_UNIT
    return [mask.to(torch.get_default_dtype()) for mask in (*masks, last.repeat(1, 2))]

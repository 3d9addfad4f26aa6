"""RealNVP in few operations (Dinh, Sohl-Dickstein & Bengio 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import linear

from pyro_vi_kit.guides.families import DenseNormal, GaussianFamily

# A layer scales by at most e^2: unbounded scales blow up where the flow has not been yet.
_MAX_LOG_SCALE = 2.0
# An optimiser like Adam moves every weight of a last layer at once, and their effects add up. In this
# unit a step means about as much for a network's output as it does for the affine map.
_OUTPUT_UNIT = 0.25
_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class _Step(NamedTuple):
    """What one layer did, for the way of a gradient back through it.

    Attributes:
        moved: The half before it was moved, `[..., D - a]`.
        activations: Of the hidden layers, each `[..., H]`.
        squashed: Tanh of the network's first half: log scales up to a factor, `[..., D - a]`.
        scale: Of the moved half, `[..., D - a]`.
    """

    moved: Tensor
    activations: list[Tensor]
    squashed: Tensor
    scale: Tensor


class CouplingFlow(GaussianFamily):
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
        super().__init__()
        self.affine = DenseNormal(dim, scale)
        self.permutations: Tensor
        self.register_buffer("permutations", permutations)
        self._dim, self._split = dim, dim // 2
        moved = dim - self._split
        self.unit: Tensor
        unit = torch.tensor([_OUTPUT_UNIT / _MAX_LOG_SCALE] * moved + [_OUTPUT_UNIT] * moved)
        self.register_buffer("unit", unit, persistent=False)
        widths = [self._split, *hidden, 2 * moved]
        shapes = list(pairwise(widths)) if dim > 1 else []
        self.weights = nn.ParameterList(torch.randn(layers, i, o) / math.sqrt(i) for i, o in shapes)
        self.biases = nn.ParameterList(torch.zeros(layers, o) for _, o in shapes)
        self._to_identity()

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        base = dist.Normal(self.affine.loc.new_zeros(self._dim), 1.0).to_event(1)
        affine = dist.transforms.LowerCholeskyAffine(*self.affine.moments(), cache_size=1)
        return dist.TransformedDistribution(base, [_Coupling(self), affine])

    def draw(
        self, shape: tuple[int, ...], context: Tensor | None = None, *, detached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Family.draw`; in one pass, with no way back through the layers."""
        loc = self.affine.loc
        noise = torch.randn(*shape, self._dim, dtype=loc.dtype, device=loc.device)
        coupled, log_scales, steps = self.couple(noise)
        mean, scale_tril = self.affine.moments()
        value = mean + coupled @ scale_tril.T
        log_det = log_scales + scale_tril.diagonal().log().sum()
        log_q = noise.square().sum(-1).mul(-0.5) - self._dim * _LOG_ROOT - log_det
        if not detached:
            return value, log_q
        slope = self._slope(noise, steps, scale_tril)
        # Zero, with the slope of log q at constant parameters.
        return value, log_q.detach() + ((value - value.detach()) * slope).sum(-1)

    def couple(self, x: Tensor) -> tuple[Tensor, Tensor, list[_Step]]:
        """Through the layers: `[..., D]`, the log determinant `[...]`, and what each layer did."""
        steps, log_scales = [], []
        for layer, (weights, biases) in enumerate(self._layers()):
            given, moved = self._halves(x)
            log_scale, shift, activations, squashed = _network(given, weights, biases)
            scale = log_scale.exp()
            steps.append(_Step(moved, activations, squashed, scale))
            log_scales.append(log_scale)
            x = torch.cat([moved * scale + shift, given], -1)
            if layer % 2:
                x = x.index_select(-1, self.permutations[layer // 2])
        return x, _summed(log_scales, x), steps

    def uncouple(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Back through the layers: `[..., D]`, and the log determinant of `couple` there, `[...]`."""
        log_scales = []
        for layer, (weights, biases) in reversed(list(enumerate(self._layers()))):
            if layer % 2:
                y = y.index_select(-1, self.permutations[layer // 2].argsort())
            moved, given = y.split([self._dim - self._split, self._split], -1)
            log_scale, shift, _, _ = _network(given, weights, biases)
            log_scales.append(log_scale)
            y = torch.cat([given, (moved - shift) * (-log_scale).exp()], -1)
        return y, _summed(log_scales, y)

    @torch.no_grad()
    def _slope(self, noise: Tensor, steps: list[_Step], scale_tril: Tensor) -> Tensor:
        """Gradient of log q at constant parameters, at the draws: `[..., D]`.

        Carried along with the draws, layer by layer, as Vaitl et al. (2024) do it: in a layer
        y = (x_b e^s(x_a) + t(x_a), x_a), log q(y) = log q(x) - sum s(x_a).
        """
        slope = -noise
        for layer, (step, (weights, _)) in enumerate(zip(steps, self._layers(), strict=True)):
            given, moved = self._halves(slope)
            shift = moved / step.scale
            log_scale = torch.addcmul(torch.ones_like(moved), step.moved, moved) * _MAX_LOG_SCALE
            back = torch.cat([_through_tanh(log_scale, step.squashed), shift], -1)
            for weight, activation in zip(weights[:0:-1], step.activations[::-1], strict=True):
                back = _through_tanh(back @ weight.T, activation)
            slope = torch.cat([shift, given - back @ weights[0].T], -1)
            if layer % 2:
                slope = slope.index_select(-1, self.permutations[layer // 2])
        return torch.linalg.solve_triangular(scale_tril, slope, upper=False, left=False)

    def _halves(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([self._split, self._dim - self._split], -1)

    def _layers(self) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Weights and biases of each layer's network."""
        if not len(self.weights):
            return []
        stacked = [*self.weights[:-1], self.weights[-1] * self.unit]
        offsets = [*self.biases[:-1], self.biases[-1] * self.unit]
        weights = zip(*(w.unbind() for w in stacked), strict=True)
        biases = zip(*(b.unbind() for b in offsets), strict=True)
        return list(zip(weights, biases, strict=True))

    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take this Gaussian as the frame; parameters go back to zero."""
        self.affine.start_from(loc, scale_tril)
        self._to_identity()

    def centre_on(self, loc: Tensor) -> None:
        """Move the mean of the affine map."""
        self.affine.centre_on(loc)

    @torch.no_grad()
    def _to_identity(self) -> None:
        """Zero the last layer of each network: shift 0 and log scale 0, whatever goes in."""
        for last in (*self.weights[-1:], *self.biases[-1:]):
            last.zero_()


class _Coupling(dist.transforms.Transform):
    """The layers of a flow as a transform that remembers its last pair, for stock Pyro."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: CouplingFlow) -> None:
        super().__init__(cache_size=1)
        self._flow = flow
        self._log_det: tuple[Any, Any, Any] = (None, None, None)

    def _call(self, x: Tensor) -> Tensor:
        y, log_det, _ = self._flow.couple(x)
        self._log_det = x, y, log_det
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._flow.uncouple(y)
        self._log_det = x, y, log_det
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log scales at x, `[...]`."""
        if self._log_det[0] is x and self._log_det[1] is y:
            return self._log_det[2]
        return self._flow.couple(x)[1]


def _network(
    given: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Log scale and shift of the moved half, and what a gradient needs on its way back."""
    x, activations = given, []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.tanh(linear(x, weight.T, bias))
        activations.append(x)
    raw, shift = linear(x, weights[-1].T, biases[-1]).chunk(2, -1)
    squashed = torch.tanh(raw)
    return squashed * _MAX_LOG_SCALE, shift, activations, squashed


def _through_tanh(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient on its way back through a tanh that had this value."""
    return torch.addcmul(gradient, gradient, value * value, value=-1.0)


def _summed(log_scales: list[Tensor], like: Tensor) -> Tensor:
    """The log determinant: the sum of all layers' log scales, `[...]`."""
    if not log_scales:
        return like.new_zeros(like.shape[:-1])
    return torch.cat(log_scales, -1).sum(-1)

"""A coupling flow for each datum: shared layers that read the datum's features."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.guides.flows.coupling_layers import MAX_LOG_SCALE
from pyro_vi_kit.guides.local.heads import Head


class CouplingHead(Head):
    """Coupling layers (Dinh et al. 2017) under independent normals: means, log sds, features.

    The layers are the same for all data and read a datum's features beside one half of its
    coordinates; they start as the identity, so that an untrained flow is the normals.

    Args:
        dim: d. With one latent nothing can be coupled: the normal is all.
        layers: L.
        hidden: Width of each layer's tanh network.
        features: Numbers of a datum that the layers read.
    """

    def __init__(self, dim: int, layers: int, hidden: int, features: int) -> None:
        super().__init__(dim)
        self.features = features if dim > 1 else 0
        self.size = 2 * dim + self.features
        self.split = dim // 2
        self.layers = nn.ModuleList(self._layer(hidden) for _ in range(layers if dim > 1 else 0))

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The flow of each datum."""
        sizes = [self.dim, self.dim, self.features]
        loc, log_scale, features = numbers.split(sizes, -1)
        loc, scale = self.centre + self.unit * loc, self.unit * log_scale.exp()
        if not self.layers:
            return dist.Normal(loc, scale).to_event(1)
        base = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        couple = Coupling(self.layers, self.split, features)
        affine = dist.transforms.AffineTransform(loc, scale, event_dim=1, cache_size=1)
        return dist.TransformedDistribution(base, [couple, affine])

    def initial(self, scale: float) -> Tensor:
        """Mean zero, this sd, random features: from equal ones all data would bend alike."""
        numbers = self.centre.new_zeros(self.size)
        numbers[self.dim : 2 * self.dim] = math.log(scale)
        numbers[2 * self.dim :] = torch.randn(self.features, dtype=numbers.dtype, device="cpu")
        return numbers

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        loc, log_scale, features = numbers.split([self.dim, self.dim, self.features], -1)
        return torch.cat([shift + factor * loc, log_scale + factor.log(), features], -1)

    def _layer(self, hidden: int) -> nn.Module:
        first = nn.Linear(self.split + self.features, hidden)
        last = nn.Linear(hidden, 2 * (self.dim - self.split))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(first, nn.Tanh(), last)


class Coupling(dist.transforms.Transform):
    """The layers, for data with these features; remembers its last pair.

    Args:
        layers: From `[..., a + features]` to `[..., 2 (d - a)]`.
        split: a.
        features: `[..., features]`.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, layers: nn.ModuleList, split: int, features: Tensor) -> None:
        super().__init__(cache_size=1)
        self._layers, self._split, self._features = layers, split, features
        self._last: tuple[Any, Any, Any] = (None, None, None)

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = x, x.new_zeros(x.shape[:-1])
        for layer in self._layers:
            given, moved = y.split([self._split, y.shape[-1] - self._split], -1)
            log_scale, shift = self._read(layer, given)
            # In this order, what was given is moved in the next layer.
            y = torch.cat([moved * log_scale.exp() + shift, given], -1)
            log_det = log_det + log_scale.sum(-1)
        self._last = x, y, log_det
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = y, y.new_zeros(y.shape[:-1])
        for layer in reversed(self._layers):
            moved, given = x.split([x.shape[-1] - self._split, self._split], -1)
            log_scale, shift = self._read(layer, given)
            x = torch.cat([given, (moved - shift) * (-log_scale).exp()], -1)
            log_det = log_det + log_scale.sum(-1)
        self._last = x, y, log_det
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log scales at x, `[...]`."""
        if self._last[0] is not x or self._last[1] is not y:
            self._call(x)
        return self._last[2]

    def _read(self, layer: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift of the moved half."""
        features = self._features.expand(*given.shape[:-1], self._features.shape[-1])
        raw, shift = layer(torch.cat([given, features], -1)).chunk(2, -1)
        return MAX_LOG_SCALE * torch.tanh(raw), shift

"""Flows: layers that bend noise, under an affine map that starts from the best Gaussian.

Layers begin as the identity, so that a flow is at first the Gaussian of its affine map and learns what
that one lacks. Each layer can carry the slope of log q along with a draw (Vaitl, Nicoli, Nakajima &
Kessel 2024), so that stick-the-landing needs no way back through the layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.core.options import require_count, require_widths
from pyro_vi_kit.core.registry import has_option
from pyro_vi_kit.guides.families import DenseNormal, Family, GaussianFamily
from pyro_vi_kit.guides.spec import GuideSpec, require_dense

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)
# An optimiser like Adam moves every weight of a last layer at once, and their effects add up. In this
# unit a step means about as much for a network's output as it does for the affine map.
OUTPUT_UNIT = 0.25


class Step(NamedTuple):
    """What a layer did.

    Attributes:
        x: What it was given, `[N, D]`.
        y: What it made of it, `[N, D]`.
        log_det: Log determinant of the Jacobian there, `[N]`.
        kept: What the layer will want to know again.
    """

    x: Tensor
    y: Tensor
    log_det: Tensor
    kept: Any = None


class Layer(nn.Module, ABC):
    """An invertible map of `[N, D]`."""

    @abstractmethod
    def forward(self, x: Tensor) -> Step:
        """Through the layer, from `[N, D]`."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """What is mapped to y, `[N, D]`; differentiable."""

    @abstractmethod
    def carry(self, step: Step, slope: Tensor) -> Tensor:
        """The gradient of log q behind the layer from that before it, `[N, D]`, no gradient of its own.

        With J the Jacobian at x, it solves `J^T result = slope - grad log_det`.

        Args:
            step: What the layer did.
            slope: The gradient of log q before it, at constant parameters, `[N, D]`.
        """

    @abstractmethod
    def to_identity(self) -> None:
        """Become the identity, from where gradients lead away."""


class Flow(GaussianFamily):
    """Standard normals that are bent, under an affine map.

    Args:
        dim: D.
        scale: Initial standard deviation.
    """

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.affine = DenseNormal(dim, scale)
        self._dim = dim

    @abstractmethod
    def through(self, noise: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """Through the layers from noise `[..., D]`: the result, log_det with theirs, what each did."""

    @abstractmethod
    def carry(self, noise: Tensor, steps: list[Any]) -> Tensor:
        """The gradient of log q behind the layers at constant parameters, from noise `[N, D]`."""

    @abstractmethod
    def bend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Through the layers: `[..., D]`, and the log determinant `[...]`."""

    @abstractmethod
    def trace_back(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Back through the layers, `[..., D]`; the log determinant of `bend` there, if it is known."""

    @abstractmethod
    def to_identity(self) -> None:
        """Become the Gaussian of the affine map."""

    @torch.no_grad()
    def break_symmetry(self) -> None:
        """Draw the hidden biases of all networks, from torch's random state; what they give stays.

        Without biases a tanh network is an odd function. Over a target that is its own mirror image
        nothing then leads away from the best Gaussian, a saddle.
        """
        for module in self.modules():
            for bias in list(getattr(module, "biases", ()))[:-1]:
                bias.normal_()

    def unbend(self, y: Tensor) -> Tensor:
        """Back through the layers: `[..., D]`."""
        return self.trace_back(y)[0]

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        base = dist.Normal(self.affine.loc.new_zeros(self._dim), 1.0).to_event(1)
        affine = dist.transforms.LowerCholeskyAffine(*self.affine.moments(), cache_size=1)
        return dist.TransformedDistribution(base, [_Bend(self), affine])

    def draw(
        self,
        shape: tuple[int, ...],
        context: Tensor | None = None,
        *,
        detached: bool = False,
        mirrored: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `Family.draw`; in one pass, with no way back through the layers."""
        noise = self.noise(shape, mirrored=mirrored)
        mean, scale_tril = self.affine.moments()
        bent, log_det, steps = self.through(noise, scale_tril.diagonal().log().sum())
        value = mean + bent @ scale_tril.T
        log_q = -0.5 * noise.square().sum(-1) - self._dim * _LOG_ROOT - log_det
        # Where no gradient is recorded none of log q can be asked for.
        if not detached or not torch.is_grad_enabled():
            return value, log_q
        with torch.no_grad():
            slope = self.carry(noise.reshape(-1, self._dim), steps)
            slope = torch.linalg.solve_triangular(scale_tril, slope, upper=False, left=False)
        # Zero, with the slope of log q at constant parameters.
        slope = slope.reshape(noise.shape)
        return value, log_q.detach() + ((value - value.detach()) * slope).sum(-1)

    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take this Gaussian as the frame; parameters go back to zero."""
        self.affine.start_from(loc, scale_tril)
        self.to_identity()

    def centre_on(self, loc: Tensor) -> None:
        """Move the mean of the affine map."""
        self.affine.centre_on(loc)

    def noise(self, shape: tuple[int, ...], *, mirrored: bool) -> Tensor:
        """Standard normals `[*shape, D]`; where ``mirrored`` the second half negates the first."""
        loc = self.affine.loc
        count = shape[0] // 2 if mirrored else shape[0]
        noise = torch.randn(count, *shape[1:], self._dim, dtype=loc.dtype, device=loc.device)
        return torch.cat([noise, -noise]) if mirrored else noise


class LayeredFlow(Flow):
    """Layers under an affine map.

    Args:
        dim: D.
        layers: At least one; the first one is given the noise.
        scale: Initial standard deviation.
    """

    def __init__(self, dim: int, layers: Sequence[Layer], scale: float) -> None:
        super().__init__(dim, scale)
        self.layers = nn.ModuleList(layers)
        self.to_identity()

    def through(self, noise: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, list[Step]]:
        """See `Flow.through`."""
        steps = self._steps(noise.reshape(-1, self._dim))
        log_det = sum((step.log_det for step in steps), log_det)
        return steps[-1].y.reshape(noise.shape), log_det.reshape(noise.shape[:-1]), steps

    def bend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Flow.bend`."""
        steps = self._steps(x.reshape(-1, self._dim))
        log_det = torch.stack([step.log_det for step in steps]).sum(0)
        return steps[-1].y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def trace_back(self, y: Tensor) -> tuple[Tensor, None]:
        """See `Flow.trace_back`."""
        x = y.reshape(-1, self._dim)
        for layer in reversed(self._layers()):
            x = layer.inverse(x)
        return x.reshape(y.shape), None

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _steps(self, x: Tensor) -> list[Step]:
        """What each layer did, one after the other, from `[N, D]`."""
        steps: list[Step] = []
        for layer in self._layers():
            steps.append(layer(steps[-1].y if steps else x))
        return steps

    def carry(self, noise: Tensor, steps: list[Any]) -> Tensor:
        """See `Flow.carry`."""
        slope = -noise
        for layer, step in zip(self._layers(), steps, strict=True):
            slope = layer.carry(step, slope)
        return slope

    @torch.no_grad()
    def to_identity(self) -> None:
        """See `Flow.to_identity`."""
        for layer in self._layers():
            layer.to_identity()


class LayeredSpec(GuideSpec):
    """A guide of so many layers over a Gaussian.

    Attributes:
        layers: L.
        hidden: Widths of the network in each layer; not an option where there is none.
    """

    layers: int
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.name, "layers", self.layers)
        if has_option(self, "hidden"):
            object.__setattr__(self, "hidden", require_widths(self.name, self.hidden))

    def layer(self, dim: int) -> Layer:
        """One of the layers, where these are modules of their own."""
        raise NotImplementedError

    def family(self, dim: int) -> Family:
        """See `GuideSpec.family`; the covariance of its Gaussian is dense."""
        require_dense(self.name, dim)
        return LayeredFlow(dim, [self.layer(dim) for _ in range(self.layers)], self.init_scale)


class _Bend(dist.transforms.Transform):
    """The layers of a flow as a transform that remembers its last pair, for stock Pyro."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Flow) -> None:
        super().__init__(cache_size=1)
        self._flow = flow
        self._log_det: tuple[Any, Any, Any] = (None, None, None)

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self._flow.bend(x)
        self._log_det = x, y, log_det
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._flow.trace_back(y)
        if log_det is not None:
            self._log_det = x, y, log_det
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the layers' log determinants at x, `[...]`."""
        if self._log_det[0] is x and self._log_det[1] is y:
            return self._log_det[2]
        return self._flow.bend(x)[1]

"""A coupling layer of splines, there and back, with a gradient of its own.

The coordinates of the first half have splines of their own, which set nothing and are set by nothing;
those of the second half are set by a network of the first. As in `spline`, draws come last: all tensors
are `[D, N]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_vi_kit.guides.flows.coupling_layers import MAX_LOG_SCALE
from pyro_vi_kit.guides.flows.spline import (
    Bent,
    Place,
    numbers,
    pull,
    slope_of_log_slope,
    spline,
    unspline,
)


class Setters(NamedTuple):
    """What sets the splines of a layer, p numbers each.

    Attributes:
        own: Those of the first half, `[p, a]`.
        weights: Of the network, from the input on, each `[fan in, fan out]`; the last fan out is that of
            `[p, D - a]`. None where D is 1.
        biases: Each `[fan out]`; at least the last one.
    """

    own: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]


class Done(NamedTuple):
    """What a layer did, for the way of a gradient back through it.

    Attributes:
        inputs: What the layers of its network were given, each `[H, N]`; the first half comes first.
        place: Where the coordinates lie in their splines.
        bent: What the splines did.
        image: What they made of the coordinates, `[D, N]`.
        squashed: Tanh of the raw log scales, `[D, N]`.
        scale: `[D, N]`.
    """

    inputs: list[Tensor]
    place: Place
    bent: Bent
    image: Tensor
    squashed: Tensor
    scale: Tensor


def numbers_of(bins: int) -> int:
    """How many numbers set a coordinate: its spline's, a log scale and a shift."""
    return numbers(bins) + 2


def couple(x: Tensor, setters: Setters) -> tuple[Tensor, Tensor, Done]:
    """Through a layer; differentiable once.

    Args:
        x: `[D, N]`.
        setters: What sets the splines.

    Returns:
        The result `[D, N]`, the log determinant `[N]`, and what the layer did, as constants.
    """
    if torch.jit.is_tracing():
        # A trace keeps a Function as it is, with what its first run did: autograd's own way is recorded.
        return _through(x, setters)
    done: list[Done] = []
    y, log_det = _Couple.apply(done, x, setters.own, *setters.weights, *setters.biases)
    return y, log_det, done[0]


def uncouple(y: Tensor, setters: Setters) -> Tensor:
    """What `couple` maps to y, `[D, N]`; differentiable."""
    split = setters.own.shape[1]
    own = setters.own.unsqueeze(-1).expand(-1, -1, y.shape[1])
    first = _unbent(y[:split], own) if split else y[:0]
    second = _unbent(y[split:], _network(first, setters)[0])
    return torch.cat([first, second])


@torch.no_grad()
def slope_behind(done: Done, slope: Tensor, setters: Setters) -> Tensor:
    """The gradient of log q behind the layer from that before it, `[D, N]`; see `Layer.carry`.

    With `y_b = f(x_b; theta(x_a))` the second half is solved for first: the first one's gradient goes
    through the network as well.

    Args:
        done: What the layer did.
        slope: The gradient of log q before it, at constant parameters, `[D, N]`.
        setters: As for `couple`.
    """
    split = setters.own.shape[1]
    stretch = done.bent.slope * done.scale
    slope = slope - slope_of_log_slope(done.place, done.bent)
    if not split:
        return slope / stretch
    second = slope[split:] / stretch[split:]
    moved = done._replace(
        place=done.place.behind(split),
        bent=done.bent.behind(split),
        image=done.image[split:],
        squashed=done.squashed[split:],
        scale=done.scale[split:],
    )
    out = _to_raw(moved, second, second.new_ones(second.shape[1])).flatten(0, 1)
    for weight, values in zip(setters.weights[:0:-1], done.inputs[:0:-1], strict=True):
        out = _through_tanh(weight @ out, values)
    first = torch.addmm(slope[:split], setters.weights[0], out, alpha=-1.0) / stretch[:split]
    return torch.cat([first, second])


class _Couple(torch.autograd.Function):
    """`couple` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, kept: list[Done], x: Tensor, own: Tensor, *network: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Through the layer; fills `kept`."""
        depth = len(network) // 2
        y, log_det, done = _through(x, Setters(own, network[:depth], network[depth:]))
        kept.append(done)
        ctx.done = done
        ctx.save_for_backward(*network[:depth])
        ctx.set_materialize_grads(False)
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own `ctx` is positional
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, own numbers, weights and biases, from those of the result and log_det."""
        done, weights = ctx.done, ctx.saved_tensors
        of_y, of_log_det = grad_outputs
        of_y = torch.zeros_like(done.image) if of_y is None else of_y
        split = len(of_y) // 2
        of_raw = _to_raw(done, of_y, of_log_det)
        out = of_raw[:, split:].flatten(0, 1)
        of_weights, of_biases = [], [out.sum(1)]
        for depth in reversed(range(len(weights))):
            of_weights.append(done.inputs[depth] @ out.mT)
            if depth:
                out = _through_tanh(weights[depth] @ out, done.inputs[depth])
                of_biases.append(out.sum(1))
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = of_y * done.scale * done.bent.slope
            if of_log_det is not None:
                of_x = of_x + of_log_det * slope_of_log_slope(done.place, done.bent)
            if weights:
                of_x = torch.cat([torch.addmm(of_x[:split], weights[0], out), of_x[split:]])
        return None, of_x, of_raw[:, :split].sum(-1), *of_weights[::-1], *of_biases[::-1]


def _through(x: Tensor, setters: Setters) -> tuple[Tensor, Tensor, Done]:
    """`couple`, in operations that autograd knows."""
    own = setters.own
    found, inputs = _network(x[: own.shape[1]], setters)
    raw = torch.cat([own.unsqueeze(-1).expand(-1, -1, x.shape[1]), found], 1)
    image, place, bent = spline(x, raw[:-2])
    squashed = (raw[-2] / MAX_LOG_SCALE).tanh()
    scale = (MAX_LOG_SCALE * squashed).exp()
    log_det = bent.slope.log().sum(0) + MAX_LOG_SCALE * squashed.sum(0)
    done = Done(inputs, place, bent, image, squashed, scale)
    return torch.addcmul(raw[-1], image, scale), log_det, done


def _to_raw(done: Done, of_y: Tensor, of_log_det: Tensor | None) -> Tensor:
    """Gradient at the numbers that set coordinates, `[p, D, N]`, from that at their images `[D, N]`."""
    of_image = of_y * done.scale
    of_log_scale = of_image * done.image
    of_log_slope = None
    if of_log_det is not None:
        of_log_slope = of_log_det.expand_as(of_y)
        of_log_scale = of_log_scale + of_log_slope
    pulled = pull(done.place, done.bent, of_image, of_log_slope)
    of_log_scale = _through_tanh(of_log_scale, done.squashed)
    return torch.cat([*pulled, of_log_scale.unsqueeze(0), of_y.unsqueeze(0)])


def _network(given: Tensor, setters: Setters) -> tuple[Tensor, list[Tensor]]:
    """Numbers that set the second half, `[p, D - a, N]`, and what the layers were given."""
    *biases, last = (bias.unsqueeze(-1) for bias in setters.biases)
    each = len(setters.own)
    if not setters.weights:
        return last.unflatten(0, (each, -1)).expand(-1, -1, given.shape[1]), []
    x, inputs = given, [given]
    for weight, bias in zip(setters.weights[:-1], biases, strict=True):
        x = torch.addmm(bias, weight.mT, x).tanh()
        inputs.append(x)
    out = torch.addmm(last, setters.weights[-1].mT, x)
    return out.unflatten(0, (each, -1)), inputs


def _unbent(y: Tensor, raw: Tensor) -> Tensor:
    log_scale = MAX_LOG_SCALE * (raw[-2] / MAX_LOG_SCALE).tanh()
    return unspline((y - raw[-1]) * (-log_scale).exp(), raw[:-2])


def _through_tanh(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient on its way back through a tanh that had this value."""
    return torch.ops.aten.tanh_backward(gradient, value)

"""Coupling layers, there and back, with a gradient of their own.

What autograd would do layer by layer is done for all layers at once where that can be: the gradients
of all weights are one product of stacked matrices, those of all biases one sum. The step of a small flow
takes as long as it has operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A layer scales by at most e^2: unbounded scales blow up where the flow has not been yet.
MAX_LOG_SCALE = 2.0


class Step(NamedTuple):
    """What one layer did, for the way of a gradient back through it.

    Attributes:
        moved: The half before it was moved, `[N, D - a]`.
        inputs: What the layers of its network were given: the other half `[N, a]`, then activations,
            each `[N, H]`.
        squashed: Tanh of the network's first half: log scales up to a factor, `[N, D - a]`.
        scale: Of the moved half, `[N, D - a]`.
    """

    moved: Tensor
    inputs: list[Tensor]
    squashed: Tensor
    scale: Tensor


def couple(
    x: Tensor, permutations: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Step]]:
    """Through all layers; differentiable once.

    Args:
        x: `[N, D]`. In each layer its first `a` coordinates move the others.
        permutations: Order of the coordinates behind each pair of layers, `[L // 2, D]`.
        weights: Of all layers' networks, from the input on, each `[L, fan in, fan out]`.
        biases: Each `[L, fan out]`.

    Returns:
        The result `[N, D]`, the log determinant `[N]`, and what each layer did, as constants.
    """
    if torch.jit.is_tracing():
        # A trace keeps a Function as it is, with what its first run did: autograd's own way is recorded.
        return _through(x, permutations, weights, biases)
    steps: list[Step] = []
    y, log_det = _Couple.apply(steps, x, permutations, *weights, *biases)
    return y, log_det, steps


def uncouple(
    y: Tensor, permutations: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Back through all layers: x `[N, D]` for y `[N, D]`, and the log determinant of `couple` `[N]`."""
    split, orders, log_scales = weights[0].shape[1], permutations.argsort(-1), []
    networks = zip(_layers(weights), _layers(biases), strict=True)
    for layer, (weight, bias) in reversed(list(enumerate(networks))):
        if layer % 2:
            y = y.index_select(-1, orders[layer // 2])
        moved, given = y.split([y.shape[-1] - split, split], -1)
        log_scale, shift, _, _ = _network(given, weight, bias)
        log_scales.append(log_scale)
        y = torch.cat([given, (moved - shift) * (-log_scale).exp()], -1)
    return y, torch.cat(log_scales, -1).sum(-1)


@torch.no_grad()
def slope_of_log_q(
    noise: Tensor, steps: Sequence[Step], permutations: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """Gradient of log q at constant parameters, behind the layers, of standard normal noise `[N, D]`.

    Carried along with the draws, layer by layer, as Vaitl et al. (2024) do it: in a layer
    y = (x_b e^s(x_a) + t(x_a), x_a), log q(y) = log q(x) - sum s(x_a).

    Args:
        noise: What `couple` was given, `[N, D]`.
        steps: What each layer did.
        permutations: As for `couple`.
        weights: As for `couple`.
    """
    slope, transposed = -noise, _layers([w.mT for w in weights])
    split, ones = weights[0].shape[1], noise.new_ones(())
    for layer, (step, weight) in enumerate(zip(steps, transposed, strict=True)):
        given, moved = slope.split([split, slope.shape[-1] - split], -1)
        shift = moved / step.scale
        log_scale = torch.addcmul(ones, step.moved, moved) * MAX_LOG_SCALE
        back = torch.cat([_through_tanh(log_scale, step.squashed), shift], -1)
        for depth in reversed(range(1, len(weight))):
            back = _through_tanh(back @ weight[depth], step.inputs[depth])
        slope = torch.cat([shift, torch.addmm(given, back, weight[0], alpha=-1.0)], -1)
        if layer % 2:
            slope = slope.index_select(-1, permutations[layer // 2])
    return slope


class _Couple(torch.autograd.Function):
    """`couple` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, steps: list[Step], x: Tensor, permutations: Tensor, *networks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Through the layers; fills `steps`."""
        depth = len(networks) // 2
        y, log_det, done = _through(x, permutations, networks[:depth], networks[depth:])
        steps += done
        ctx.steps = steps
        ctx.save_for_backward(permutations, *networks[:depth])
        return y, log_det

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own `ctx` is positional
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weights and biases, from those of the result and the log determinant."""
        (back, log_det), (permutations, *weights) = grad_outputs, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        back, found = _back(ctx.steps, back, log_det, permutations, weights, to_the_start=wanted)
        inputs = zip(*(step.inputs for step in ctx.steps), strict=True)
        products = [torch.stack(i).mT @ out for i, out in zip(inputs, found, strict=True)]
        return None, back if wanted else None, None, *products, *(out.sum(1) for out in found)


def _through(
    x: Tensor, permutations: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Step]]:
    """`couple`, in operations that autograd knows."""
    steps: list[Step] = []
    split, log_scales = weights[0].shape[1], []
    for layer, (weight, bias) in enumerate(zip(_layers(weights), _layers(biases), strict=True)):
        given, moved = x.split([split, x.shape[-1] - split], -1)
        log_scale, shift, inputs, squashed = _network(given, weight, bias)
        scale = log_scale.exp()
        steps.append(Step(moved, inputs, squashed, scale))
        log_scales.append(log_scale)
        x = torch.cat([moved * scale + shift, given], -1)
        if layer % 2:
            x = x.index_select(-1, permutations[layer // 2])
    return x, torch.cat(log_scales, -1).sum(-1), steps


def _back(
    steps: Sequence[Step],
    back: Tensor,
    log_det: Tensor,
    permutations: Tensor,
    weights: Sequence[Tensor],
    *,
    to_the_start: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients back through all layers: at x `[N, D]`, and behind each weight, each `[L, N, fan out]`.

    Without ``to_the_start`` the first layer's own step is left out, and the first result is of no use.
    """
    transposed, orders = _layers([w.mT for w in weights]), permutations.argsort(-1)
    split, log_det = weights[0].shape[1], (log_det * MAX_LOG_SCALE).unsqueeze(-1)
    found: list[list[Tensor]] = [[] for _ in weights]
    for layer, step in reversed(list(enumerate(steps))):
        if layer % 2:
            back = back.index_select(-1, orders[layer // 2])
        shift, given = back.split([back.shape[-1] - split, split], -1)
        moved = shift * step.scale
        log_scale = torch.addcmul(log_det, moved, step.moved, value=MAX_LOG_SCALE)
        out = torch.cat([_through_tanh(log_scale, step.squashed), shift], -1)
        found[-1].append(out)
        for depth in reversed(range(1, len(weights))):
            out = _through_tanh(out @ transposed[layer][depth], step.inputs[depth])
            found[depth - 1].append(out)
        if layer or to_the_start:
            back = torch.cat([torch.addmm(given, out, transposed[layer][0]), moved], -1)
    return back, [torch.stack(parts[::-1]) for parts in found]


def _layers(stacked: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """For each layer, its part of each of these."""
    return list(zip(*(tensor.unbind() for tensor in stacked), strict=True))


def _network(
    given: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Log scale and shift of the moved half, and what a gradient needs on its way back."""
    x, inputs = given, [given]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.addmm(bias, x, weight).tanh()
        inputs.append(x)
    raw, shift = torch.addmm(biases[-1], x, weights[-1]).chunk(2, -1)
    squashed = raw.tanh()
    return squashed * MAX_LOG_SCALE, shift, inputs, squashed


def _through_tanh(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient on its way back through a tanh that had this value."""
    return torch.ops.aten.tanh_backward(gradient, value)

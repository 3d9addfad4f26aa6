"""Adam on one flat vector, as a pure function of tensors (Kingma & Ba 2015), and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class AdamState(NamedTuple):
    """Where Adam stands.

    Attributes:
        x: The parameters, `[P]`.
        mean: Running mean of the gradient, `[P]`.
        square: Running mean of its square, `[P]`.
        updates: So far, a scalar.
    """

    x: Tensor
    mean: Tensor
    square: Tensor
    updates: Tensor


def start(x: Tensor) -> AdamState:
    """The state before the first update, at these parameters `[P]`."""
    return AdamState(x, torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(()))


def finite(bound: Tensor, *gradients: Tensor) -> Tensor:
    """Whether a step can be taken: no NaN and no infinity in its bound and gradients; a scalar.

    Either would be left in a sum, and one number is sooner looked at than all.
    """
    return torch.isfinite(sum((gradient.sum() for gradient in gradients), bound))


def update(state: AdamState, gradient: Tensor, finite: Tensor, rate: float | Tensor) -> AdamState:
    """The state behind one step; the same state where the step is not ``finite``.

    Nothing here looks at a value, so that a step can be captured as a graph.

    Args:
        state: Before.
        gradient: Of the loss, `[P]`.
        finite: Whether to take the step, a boolean scalar.
        rate: Learning rate.
    """
    # A step that is not taken has weight 0; NaN times 0 would still be NaN.
    gradient = torch.where(finite, gradient, torch.zeros_like(gradient))
    taken = finite.to(state.x.dtype)
    updates = state.updates + taken
    mean = torch.lerp(state.mean, gradient, (1.0 - _BETA1) * taken)
    square = torch.lerp(state.square, gradient * gradient, (1.0 - _BETA2) * taken)
    # Before the first step that is taken the corrections are 0 / 0.
    exponent = updates.clamp_min(1.0)
    size = rate * taken / (1.0 - _BETA1**exponent)
    scale = (square / (1.0 - _BETA2**exponent)).sqrt() + _EPSILON
    return AdamState(state.x - size * mean / scale, mean, square, updates)


# Keeps a gradient of length 0 from being divided by it.
_SHORTEST = 1e-6


def clipped(gradients: Sequence[Tensor], length: float | None) -> list[Tensor]:
    """The parts of a gradient, shortened where it is longer than this (Pascanu, Mikolov & Bengio 2013).

    As `torch.nn.utils.clip_grad_norm_` does it. Nothing here looks at a value, so that a step can be
    captured as a graph. A gradient that is not finite stays so.

    Args:
        gradients: Its parts, of any shapes.
        length: Its Euclidean length at the most, that of all parts together; None for any.
    """
    if length is None:
        return list(gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (length / (norm + _SHORTEST)).clamp_max(1.0)
    return [gradient * factor for gradient in gradients]

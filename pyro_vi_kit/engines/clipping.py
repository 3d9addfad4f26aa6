"""Gradients of a bounded length (Pascanu, Mikolov & Bengio 2013)."""

from __future__ import annotations

from torch import Tensor

_EPSILON = 1e-6


def clipped(gradient: Tensor, length: float | None) -> Tensor:
    """The gradient, shortened where it is longer; as `torch.nn.utils.clip_grad_norm_` does it.

    Nothing here looks at a value, so that a step can be captured as a graph. A gradient that is not
    finite stays so.

    Args:
        gradient: `[P]`.
        length: Its Euclidean length at the most; None for any.
    """
    if length is None:
        return gradient
    return gradient * (length / (gradient.norm() + _EPSILON)).clamp_max(1.0)

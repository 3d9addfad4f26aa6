"""Gradients of a bounded length (Pascanu, Mikolov & Bengio 2013)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-6


def clipped(gradients: Sequence[Tensor], length: float | None) -> list[Tensor]:
    """The parts of a gradient, shortened where it is longer than this.

    As `torch.nn.utils.clip_grad_norm_` does it. Nothing here looks at a value, so that a step can be
    captured as a graph. A gradient that is not finite stays so.

    Args:
        gradients: Its parts, of any shapes.
        length: Its Euclidean length at the most, that of all parts together; None for any.
    """
    if length is None:
        return list(gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (length / (norm + _EPSILON)).clamp_max(1.0)
    return [gradient * factor for gradient in gradients]

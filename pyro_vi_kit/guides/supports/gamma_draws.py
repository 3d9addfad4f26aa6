"""Gamma draws as a function of normal noise, with the exact gradient in their shape.

Torch draws them from a stream that looks at the shape, so that a recorded step could not draw its noise
beforehand. Here several proposals of Marsaglia & Tsang (2000) are made at once and the first that is
accepted is taken. The gradient is the implicit one (Figurnov, Mohamed & Mnih 2018), so that it does
not matter that another shape would have accepted another proposal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# At a shape of 1 five in a hundred are turned down, and fewer at larger ones: 4e-11 that all are.
PROPOSALS = 8
NOISE = 2 * PROPOSALS
# Of a shape below 1: one number more.
LOG_NOISE = NOISE + 1
# Of variates as small as this the distribution function is a power law, to ten digits.
_TINY = 1e-10


def gamma_draws(shape: Tensor, noise: Tensor) -> Tensor:
    """Gamma variates of rate 1, reparameterised in their shape.

    Args:
        shape: At least 1, broadcasts against `[...]`.
        noise: Standard normals `[..., 16]`.

    Returns:
        `[...]`.
    """
    with torch.no_grad():
        value = _accepted(shape.detach(), noise)
    slope = torch._standard_gamma_grad(shape.detach().expand_as(value), value)
    return value + (shape - shape.detach()) * slope


def log_gamma_draws(shape: Tensor, noise: Tensor) -> Tensor:
    """Logarithms of Gamma variates of rate 1, of any shape, reparameterised in it.

    A variate of shape a is one of shape a + 1 times U^(1 / a) (Marsaglia & Tsang 2000, section 6). In
    logarithms nothing underflows, however small the shape.

    Args:
        shape: Positive, broadcasts against `[...]`.
        noise: Standard normals `[..., 17]`.

    Returns:
        `[...]`.
    """
    fixed = shape.detach()
    with torch.no_grad():
        log_uniform = torch.special.log_ndtr(noise[..., NOISE])
        value = _accepted(fixed + 1.0, noise[..., :NOISE]).log() + log_uniform / fixed
        slope = _log_slope(fixed.expand_as(value), value)
    return value + (shape - fixed) * slope


def _log_slope(shape: Tensor, log_value: Tensor) -> Tensor:
    """The derivative in the shape of the logarithm of a variate, at fixed distribution function.

    Near zero that function is x^a / Gamma(a + 1), but for a factor of 1 + O(x).
    """
    # As far as a power law holds exp could be zero, and torch's derivative with it.
    near = log_value < math.log(_TINY)
    value = torch.where(near, torch.ones_like(log_value), log_value).exp()
    by_power_law = (torch.digamma(shape + 1.0) - log_value) / shape
    return torch.where(near, by_power_law, torch._standard_gamma_grad(shape, value) / value)


def _accepted(shape: Tensor, noise: Tensor) -> Tensor:
    """The first proposal that is accepted; the last one where none is."""
    x, y = noise.split(PROPOSALS, -1)
    d = (shape - 1.0 / 3.0).unsqueeze(-1)
    v = (1.0 + x / (3.0 * d.sqrt())).pow(3)
    fits = v > 0
    v = torch.where(fits, v, torch.ones_like(v))
    # The logarithm of a uniform number, from a normal one.
    fits = fits & (torch.special.log_ndtr(y) < 0.5 * x.square() + d * (1.0 - v + v.log()))
    rank = torch.arange(PROPOSALS, 0, -1, device=noise.device)
    first = torch.where(fits, rank, torch.zeros_like(rank)).argmax(-1, keepdim=True)
    return (d * v).gather(-1, first).squeeze(-1)

"""Monotone rational-quadratic splines, there and back (Gregory & Delbourgo 1982; Durkan et al. 2019)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

# Noise lies within it but for six draws in ten million; beyond, the map is the identity.
BOUND = 5.0
_MIN_BIN, _MIN_SLOPE = 1e-3, 1e-3
# What gives a slope of 1.
_ONE = math.log(math.expm1(1.0 - _MIN_SLOPE))


class Knots(NamedTuple):
    """Splines of `[N, D]` coordinates.

    Attributes:
        edges: Of the K bins: where they lie, and where they go, `[N, D, 2, K + 1]`.
        slopes: At the edges, `[N, D, K + 1]`.
    """

    edges: Tensor
    slopes: Tensor


class _Bin(NamedTuple):
    """The bin that each coordinate lies in, each `[N, D]`."""

    left: Tensor
    bottom: Tensor
    slope: Tensor
    width: Tensor
    height: Tensor
    end_slope: Tensor


def numbers(bins: int) -> int:
    """How many free numbers a spline has."""
    return 3 * bins - 1


def knots(raw: Tensor, bins: int) -> Knots:
    """Splines from free numbers `[..., 3 K - 1]`; zeros give the identity."""
    sizes = raw[..., : 2 * bins].unflatten(-1, (2, bins)).softmax(-1)
    sizes = sizes * (1.0 - _MIN_BIN * bins) + _MIN_BIN
    inner = sizes[..., :-1].cumsum(-1) * (2.0 * BOUND) - BOUND
    edges = pad(pad(inner, (1, 0), value=-BOUND), (0, 1), value=BOUND)
    slopes = softplus(raw[..., 2 * bins :] + _ONE) + _MIN_SLOPE
    return Knots(edges, pad(slopes, (1, 1), value=1.0))


def spline(x: Tensor, at: Knots) -> tuple[Tensor, Tensor]:
    """The image of `[N, D]` and the log of the slope there, `[N, D]`."""
    inside = x.abs() < BOUND
    x_in = torch.where(inside, x, torch.zeros_like(x))
    bin_ = _bin_of(x_in, at, 0)
    share = (x_in - bin_.left) / bin_.width
    mean = bin_.height / bin_.width
    both = share * (1.0 - share)
    below = mean + (bin_.slope + bin_.end_slope - 2.0 * mean) * both
    y = bin_.bottom + bin_.height * (mean * share.square() + bin_.slope * both) / below
    return torch.where(inside, y, x), torch.where(
        inside, _log_slope(share, mean, both, below, bin_), torch.zeros_like(x)
    )


def unspline(y: Tensor, at: Knots) -> Tensor:
    """What `spline` maps to `[N, D]`."""
    inside = y.abs() < BOUND
    y_in = torch.where(inside, y, torch.zeros_like(y))
    bin_ = _bin_of(y_in, at, 1)
    mean = bin_.height / bin_.width
    up = y_in - bin_.bottom
    bend = bin_.slope + bin_.end_slope - 2.0 * mean
    a = bin_.height * (mean - bin_.slope) + up * bend
    b = bin_.height * bin_.slope - up * bend
    c = -mean * up
    root = (b.square() - 4.0 * a * c).clamp_min(0.0).sqrt()
    # The form of the root that takes no difference of near numbers.
    share = 2.0 * c / (-b - root)
    return torch.where(inside, bin_.left + share * bin_.width, y)


def _bin_of(value: Tensor, at: Knots, axis: int) -> _Bin:
    """The bins that hold values `[N, D]`, by where they lie (axis 0) or go (1)."""
    position = (value.unsqueeze(-1) >= at.edges[..., axis, 1:-1]).sum(-1)
    table = torch.cat([at.edges, at.slopes.unsqueeze(-2)], -2)
    index = position[..., None, None].expand(*table.shape[:-1], 1)
    left, bottom, slope = table.gather(-1, index).squeeze(-1).unbind(-1)
    right, top, end_slope = table.gather(-1, index + 1).squeeze(-1).unbind(-1)
    return _Bin(left, bottom, slope, right - left, top - bottom, end_slope)


def _log_slope(share: Tensor, mean: Tensor, both: Tensor, below: Tensor, bin_: _Bin) -> Tensor:
    rising = bin_.end_slope * share.square() + 2.0 * mean * both
    rising = rising + bin_.slope * (1.0 - share).square()
    return 2.0 * (mean / below).log() + rising.log()

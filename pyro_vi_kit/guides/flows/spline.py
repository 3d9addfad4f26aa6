"""Monotone rational-quadratic splines, there and back (Gregory & Delbourgo 1982; Durkan et al. 2019).

What a gradient needs is written out: a spline takes as long as it has operations, and autograd makes
three times as many of it. Draws come last in all tensors, so that what is done for a bin is done for a
row of draws at once.
"""

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


class Place(NamedTuple):
    """The bins of their splines that values lie in. Axis 0 is where a bin lies, 1 where it goes.

    Attributes:
        shares: Of all K bins in what is free of the box, `[2, K, D, N]`.
        below: 1 for each bin that ends before the value, `[K, D, N]`.
        here: 1 for the value's own bin, `[K, D, N]`.
        before: Of all bins before it, their shares together, `[2, D, N]`.
        share: Its own, `[2, D, N]`.
        start: Where it begins, `[2, D, N]`.
        size: `[2, D, N]`.
        raw_slopes: At its two ends as free numbers, `[2, D, N]`.
        slopes: At its two ends, `[2, D, N]`.
    """

    shares: Tensor
    below: Tensor
    here: Tensor
    before: Tensor
    share: Tensor
    start: Tensor
    size: Tensor
    raw_slopes: Tensor
    slopes: Tensor

    def behind(self, first: int) -> Place:
        """Of the coordinates from this one on."""
        return Place(*(part[..., first:, :] for part in self))


class Bent(NamedTuple):
    """What splines did, each `[D, N]`.

    Attributes:
        inside: 1 where a spline bends, 0 beyond its box.
        along: Position in the bin, from 0 to 1.
        up: Position in the image of the bin, from 0 to 1.
        mean: Mean slope of the bin, s.
        both: `along (1 - along)`.
        over: One over the denominator of the curve.
        rise: Numerator of its slope, R, with `slope = s^2 R over^2`.
        slope: 1 beyond the box.
    """

    inside: Tensor
    along: Tensor
    up: Tensor
    mean: Tensor
    both: Tensor
    over: Tensor
    rise: Tensor
    slope: Tensor

    def behind(self, first: int) -> Bent:
        """Of the coordinates from this one on."""
        return Bent(*(part[..., first:, :] for part in self))


def numbers(bins: int) -> int:
    """How many free numbers a spline has."""
    return 3 * bins - 1


def spline(x: Tensor, raw: Tensor) -> tuple[Tensor, Place, Bent]:
    """Bend coordinates.

    Args:
        x: `[D, N]`.
        raw: Free numbers of the splines, `[3 K - 1, D, N]`: 2 K of bins, where they lie and where they
            go, and K - 1 of slopes. Zeros give the identity.

    Returns:
        The image `[D, N]`, with what `pull` and `slope_of_log_slope` want to know.
    """
    inside = x.abs() < BOUND
    place = _place_of(torch.where(inside, x, 0.0), raw, 0)
    (left, bottom), (width, height) = place.start, place.size
    first, last = place.slopes
    along = torch.where(inside, (x - left) / width, 0.5)
    mean = height / width
    square, both = along.square(), along - along.square()
    over = (mean + (first + last - 2.0 * mean) * both).reciprocal()
    up = (mean * square + first * both) * over
    rise = last * square + 2.0 * mean * both + first * (1.0 - along).square()
    slope = torch.where(inside, (mean * over).square() * rise, 1.0)
    y = torch.where(inside, bottom + height * up, x)
    return y, place, Bent(inside.to(x.dtype), along, up, mean, both, over, rise, slope)


def unspline(y: Tensor, raw: Tensor) -> Tensor:
    """What `spline` maps to `[D, N]`; differentiable."""
    inside = y.abs() < BOUND
    y_in = torch.where(inside, y, 0.0)
    place = _place_of(y_in, raw, 1)
    (left, bottom), (width, height) = place.start, place.size
    first, last = place.slopes
    mean = height / width
    above = y_in - bottom
    bend = first + last - 2.0 * mean
    a = height * (mean - first) + above * bend
    b = height * first - above * bend
    c = -mean * above
    root = (b.square() - 4.0 * a * c).clamp_min(0.0).sqrt()
    # The form of the root that takes no difference of near numbers.
    along = 2.0 * c / (-b - root)
    return torch.where(inside, left + along * width, y)


def slope_of_log_slope(place: Place, bent: Bent) -> Tensor:
    """The derivative of the log of the slope in x, `[D, N]`."""
    return _along_of_log_slope(place, bent) / place.size[0] * bent.inside


def pull(
    place: Place, bent: Bent, of_y: Tensor, of_log_slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient at the free numbers.

    Args:
        place: Of `spline`.
        bent: Of `spline`.
        of_y: Gradient at its image, `[D, N]`.
        of_log_slope: Gradient at the log of its slope, `[D, N]`; None for zeros.

    Returns:
        The first `[2 K, D, N]` of them, which are of the bins, and the others, of the slopes.
    """
    width, height = place.size
    of_y = of_y * bent.inside
    square, both = bent.along.square(), bent.both
    # Of y = bottom + height up(along, s, slopes), at the mean slope s and the slopes at both ends.
    turn = 1.0 - 2.0 * both
    lift = of_y * height * bent.over
    of_along = of_y * bent.slope * width
    of_mean = lift * (square - bent.up * turn)
    of_last = -lift * both * bent.up
    of_first = lift * both + of_last
    if of_log_slope is not None:
        weight = of_log_slope * bent.inside
        of_rise, of_over = weight / bent.rise, 2.0 * weight * bent.over
        of_along = of_along + weight * _along_of_log_slope(place, bent)
        of_mean = of_mean + 2.0 * (weight / bent.mean + of_rise * both) - of_over * turn
        of_last = of_last + of_rise * square - of_over * both
        of_first = of_first + of_rise * (1.0 - bent.along).square() - of_over * both
    of_height = of_y * bent.up + of_mean / width
    of_width = -(of_along * bent.along + of_mean * bent.mean) / width
    of_start = torch.stack([-of_along / width, of_y])
    of_size = torch.stack([of_width, of_height])
    return _to_raw(place, of_start, of_size, torch.stack([of_first, of_last]))


def _place_of(value: Tensor, raw: Tensor, axis: int) -> Place:
    """The bins that hold values `[D, N]`, by where they lie (axis 0) or go (1)."""
    bins = (len(raw) + 1) // 3
    shares = raw[: 2 * bins].unflatten(0, (2, bins)).softmax(1)
    free, least = 2.0 * BOUND * (1.0 - _MIN_BIN * bins), 2.0 * BOUND * _MIN_BIN
    # A product with a triangle adds them up.
    triangle = raw.new_ones(bins - 1, bins).tril()
    ends = (triangle @ shares[axis].flatten(1)).unflatten(1, value.shape)
    offsets = torch.arange(1, bins, dtype=raw.dtype, device=raw.device) * least - BOUND
    passed = (value >= ends * free + offsets[:, None, None]).to(raw.dtype)
    below = pad(passed, (0, 0, 0, 0, 0, 1))
    here = pad(passed, (0, 0, 0, 0, 1, 0), value=1.0) - below
    before, share = (shares * below).sum(1), (shares * here).sum(1)
    knots = raw[2 * bins :]
    raw_slopes = torch.stack([(knots * here[1:]).sum(0), (knots * here[:-1]).sum(0)])
    slopes = softplus(raw_slopes + _ONE) + _MIN_SLOPE
    start = before * free + (passed.sum(0) * least - BOUND)
    size = share * free + least
    return Place(shares, below, here, before, share, start, size, raw_slopes, slopes)


def _along_of_log_slope(place: Place, bent: Bent) -> Tensor:
    """The derivative of the log of the slope in the position in the bin, `[D, N]`."""
    first, last = place.slopes
    turn = 1.0 - 2.0 * bent.along
    bend = first + last - 2.0 * bent.mean
    steeper = last * bent.along + bent.mean * turn - first * (1.0 - bent.along)
    return 2.0 * (steeper / bent.rise - bend * turn * bent.over)


def _to_raw(
    place: Place, of_start: Tensor, of_size: Tensor, of_slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient at the free numbers from those at the bins, each `[2, D, N]`."""
    bins = len(place.here)
    free = 2.0 * BOUND * (1.0 - _MIN_BIN * bins)
    of_start, of_size = of_start * free, of_size * free
    mean = of_start * place.before + of_size * place.share
    each = place.below * of_start.unsqueeze(1) + place.here * of_size.unsqueeze(1)
    of_shares = place.shares * (each - mean.unsqueeze(1))
    first, last = of_slopes * (place.raw_slopes + _ONE).sigmoid()
    return of_shares.flatten(0, 1), place.here[1:] * first + place.here[:-1] * last

"""Kernel density estimates that know where a support may end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BINS_PER_BANDWIDTH = 10
_MOST_BINS = 20_000
# Share of a normal density's peak above which an end of the draws is taken for a bound.
_BOUND = 0.5
_NORMAL_PEAK = 0.4
# Beyond so many bandwidths a Gaussian is nothing.
_REACH = 4


class Curve(NamedTuple):
    """A density.

    Attributes:
        x: Where, `[n]`, in the parameter's units.
        y: The density there, `[n]`.
    """

    x: np.ndarray
    y: np.ndarray


def density(values: np.ndarray, window: tuple[float, float], support: tuple[float, float]) -> Curve:
    """Estimate the density of draws without smearing it beyond the support.

    Draws are binned finely and smoothed with a Gaussian whose tails are reflected at the bounds.

    Args:
        values: Draws `[S]`, finite and not all the same.
        window: Left and right end of what will be shown; the curve may reach beyond.
        support: Bounds of the parameter, infinite where it has none.
    """
    from scipy.ndimage import gaussian_filter1d

    bandwidth = _bandwidth(values)
    reach = _REACH * bandwidth
    start = max(support[0], values.min() - reach, window[0] - reach)
    stop = min(support[1], values.max() + reach, window[1] + reach)
    if stop <= start:  # all of it lies outside of the window
        return Curve(np.array(window), np.zeros(2))
    bins = min(_MOST_BINS, int(np.ceil((stop - start) / bandwidth * _BINS_PER_BANDWIDTH)))
    counts, edges = np.histogram(values, bins, (start, stop))
    width = edges[1] - edges[0]
    smooth = gaussian_filter1d(counts / (len(values) * width), bandwidth / width, mode="reflect")
    # Down to zero at both ends: a density that stops at a bound should look as if it does.
    x = np.concatenate([[edges[0]], (edges[:-1] + edges[1:]) / 2, [edges[-1]]])
    return Curve(x, np.concatenate([[0.0], smooth, [0.0]]))


def support(draws: Sequence[np.ndarray]) -> tuple[float, float]:
    """Bounds of a parameter as far as its draws show them, infinite where they do not.

    An end at which any set of draws crowds is a bound; it lies at the outermost of all draws.

    Args:
        draws: Sets of draws of the same parameter, each `[S]`, finite and not all the same.
    """
    low = min(values.min() for values in draws) if any(map(_crowds, draws)) else -np.inf
    mirrored = [-values for values in draws]
    high = -min(values.min() for values in mirrored) if any(map(_crowds, mirrored)) else np.inf
    return float(low), float(high)


def _crowds(values: np.ndarray) -> bool:
    """Whether draws are dense at their smallest."""
    bandwidth = _bandwidth(values)
    share = np.mean(values < values.min() + bandwidth)
    return bool(share > _BOUND * _NORMAL_PEAK * bandwidth / _spread(values))


def _bandwidth(values: np.ndarray) -> float:
    """The best one for a normal density (Silverman 1986, eq. 3.28)."""
    return 1.06 * _spread(values) * len(values) ** -0.2


def _spread(values: np.ndarray) -> float:
    """The sd, or the quartiles' where tails are heavy, so that they do not blur the middle."""
    quartiles = float(np.ptp(np.quantile(values, [0.25, 0.75]))) / 1.349
    sd = float(values.std())
    return min(sd, quartiles) or sd

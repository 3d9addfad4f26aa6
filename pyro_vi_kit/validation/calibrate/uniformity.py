"""Whether numbers are uniform on [0, 1]: the ECDF with simultaneous bands, and what it is worth.

Säilynoja, Bürkner & Vehtari (2022), "Graphical test for discrete uniformity and its applications in
goodness-of-fit evaluation and multiple sample comparison": at each of some points the number of values
below it is binomial, and the pointwise level of the bands is such that the whole ECDF stays inside with
the wanted probability. That probability is computed here without simulation: counts at growing points
are a Markov chain with binomial steps (their section 2.2).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# Points at which the ECDF is looked at; more tell little more, and cost.
_MOST_POINTS = 100
# Below, one minus a sum of probabilities is rounding.
_SMALLEST = 1e-15
_BISECTIONS = 40


class Band(NamedTuple):
    """Between what an ECDF of uniform numbers stays everywhere at once.

    Attributes:
        points: Where the ECDF is looked at, `[K]`.
        low: Lower bound of the ECDF there, `[K]`.
        high: Upper bound, `[K]`.
    """

    points: np.ndarray
    low: np.ndarray
    high: np.ndarray


def points_for(count: int) -> np.ndarray:
    """The points at which the ECDF of so many values is looked at, `[K]`, inside (0, 1)."""
    parts = min(_MOST_POINTS, max(count, 2))
    return np.arange(1, parts) / parts


def ecdf(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The share of values `[N]` at or below each of these points `[K]`."""
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


@functools.lru_cache(maxsize=64)
def band(count: int, prob: float = 0.95) -> Band:
    """Simultaneous bands for the ECDF of ``count`` independent uniform values.

    Args:
        count: N.
        prob: Probability that all of the ECDF lies inside.
    """
    inside, outside = -40.0, 0.0  # of the logarithm of the pointwise level
    for _ in range(_BISECTIONS):
        middle = 0.5 * (inside + outside)
        if probability_inside(count, float(np.exp(middle))) >= prob:
            inside = middle
        else:
            outside = middle
    points = points_for(count)
    low, high = _limits(count, float(np.exp(inside)))
    return Band(points, low / count, high / count)


def uniformity(values: np.ndarray) -> float:
    """The p-value of the ECDF test: how likely uniform values leave a band that these just touch.

    Args:
        values: `[N]`, in [0, 1], independent.
    """
    count = len(values)
    return float(max(1.0 - probability_inside(count, _level(values)), _SMALLEST))


def _level(values: np.ndarray) -> float:
    """The pointwise level at which these values first leave the band: the statistic of the test."""
    from scipy.stats import binom

    count = len(values)
    points = points_for(count)
    below = np.rint(ecdf(values, points) * count)
    left = binom.cdf(below, count, points)
    right = binom.sf(below - 1, count, points)
    return float(min(1.0, 2.0 * np.minimum(left, right).min()))


def _limits(count: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of values below each point that the band allows.

    They are the counts whose tail probability, on either side, is more than half the level.
    """
    from scipy.stats import binom

    points = points_for(count)
    # Rounding in a tail must not let in the very count that the level was taken from.
    half = 0.5 * level * (1.0 + 1e-9)
    low, high = binom.ppf(half, count, points), binom.isf(half, count, points)
    low = np.where(binom.cdf(low, count, points) > half, low, low + 1)
    high = np.where(binom.sf(high - 1, count, points) > half, high, high - 1)
    return low.astype(int), high.astype(int)


@functools.lru_cache(maxsize=4096)
def probability_inside(count: int, level: float) -> float:
    """The probability that the ECDF of uniform values stays inside the band of a pointwise level.

    Args:
        count: N.
        level: Probability to be outside at a single point, at the most.
    """
    points = points_for(count)
    low, high = _limits(count, level)
    if (low > high).any():
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    counts, chances, position = np.array([0]), np.array([1.0]), 0.0
    for point, least, most in zip(points, low, high, strict=True):
        following = np.arange(least, most + 1)
        step = (point - position) / (1.0 - position)
        moves = _binomial(count - counts[:, None], following - counts[:, None], step, log_factorial)
        counts, chances, position = following, chances @ moves, point
    return float(min(1.0, chances.sum()))


def _binomial(n: np.ndarray, k: np.ndarray, p: float, log_factorial: np.ndarray) -> np.ndarray:
    """Binomial probabilities; zero where k is none of 0, ..., n."""
    n = np.broadcast_to(n, k.shape)
    possible = (k >= 0) & (k <= n)
    hits = np.where(possible, k, 0)
    misses = n - hits
    log_chance = log_factorial[n] - log_factorial[hits] - log_factorial[misses]
    log_chance = log_chance + hits * np.log(p) + misses * np.log1p(-p)
    return np.where(possible, np.exp(log_chance), 0.0)

"""What probabilities of the truth say: tests of their uniformity, bands of their ECDF, and coverage.

Each function takes p_i = Q(theta_i <= truth_i), `[N]`, of N simulations, strictly inside (0, 1) and
uniform where Q is the posterior.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# Intervals whose coverage is told.
PROBS = (0.5, 0.8, 0.9, 0.95)
# Points at which the ECDF is looked at; more tell little more, and cost.
_MOST_POINTS = 100
# Below, one minus a sum of probabilities is rounding.
_SMALLEST = 1e-15
_BISECTIONS = 40
_TESTS = 3


class Tested(NamedTuple):
    """What the probabilities of one number's truths say.

    Attributes:
        bias: By how many of its own sds the guide is too high (negative: too low).
        dispersion: Sd of the truths' normal scores: above 1 the guide is too narrow, by that factor.
        p_bias: Of the symmetry of the probabilities about 1/2 (VSBC).
        p_dispersion: Of that sd.
        p_uniform: Of their ECDF (SBC).
    """

    bias: float
    dispersion: float
    p_bias: float
    p_dispersion: float
    p_uniform: float

    @property
    def p(self) -> float:
        """Of the three together (Bonferroni)."""
        return min(1.0, _TESTS * min(self.p_bias, self.p_dispersion, self.p_uniform))

    def directions(self, level: float) -> list[str]:
        """What is wrong at a level of all tests, supposing that something is; the surest first."""
        found = [
            (self.p_dispersion, "too narrow" if self.dispersion > 1 else "too wide"),
            (self.p_bias, "biased up" if self.bias > 0 else "biased down"),
        ]
        sure = [words for p, words in sorted(found) if _TESTS * p <= level]
        return sure or ["of another shape"]


def assess(probabilities: np.ndarray) -> Tested:
    """All three tests of one number's probabilities `[N]`."""
    (shift, p_bias), (spread, p_dispersion) = bias(probabilities), dispersion(probabilities)
    return Tested(shift, spread, p_bias, p_dispersion, uniformity(probabilities))


def bias(probabilities: np.ndarray) -> tuple[float, float]:
    """Whether the guide lies to one side of the truth: are p and 1 - p alike?

    Yao, Vehtari, Simpson & Gelman (2018), "Yes, but did it work?", section 3.2: the Kolmogorov-Smirnov
    distance between p and 1 - p. The two are one sample and its mirror image, so that its null is not
    that of two samples: it is the exact one of the test of symmetry (Butler 1969), in which the signs
    of p - 1/2, in order of their size, are a fair random walk. A guide that is only too narrow or too
    wide passes.

    Returns:
        The mean of the normal scores of 1 - p, which is by how many sds of its own the guide is too
        high (negative where it is too low), and the p-value.
    """
    from scipy.special import ndtri

    centred = probabilities - 0.5
    order = np.argsort(-np.abs(centred), kind="stable")
    walk = np.cumsum(np.where(centred[order] > 0, 1, -1))
    reached = int(np.abs(walk).max())
    size = -float(ndtri(probabilities).mean())
    return size, max(_chance_to_reach(reached, len(walk)), _SMALLEST)


def dispersion(probabilities: np.ndarray) -> tuple[float, float]:
    """Whether the truth lies too far out, or too far in, wherever the guide is centred.

    The normal scores of p, less their mean, have a sum of squares that is chi-square with N - 1 degrees
    of freedom (after Cook, Gelman & Rubin 2006). A guide that is only shifted passes where it is normal.

    Returns:
        The sd of the normal scores (above 1: intervals are too narrow), and the two-sided p-value.
    """
    from scipy.special import ndtri
    from scipy.stats import chi2

    scores = ndtri(probabilities)
    free = len(scores) - 1
    squares = float(((scores - scores.mean()) ** 2).sum())
    p = 2.0 * min(float(chi2.cdf(squares, free)), float(chi2.sf(squares, free)))
    return float(np.sqrt(squares / free)), min(1.0, max(p, _SMALLEST))


@functools.lru_cache(maxsize=4096)
def _chance_to_reach(height: int, steps: int) -> float:
    """The probability that a fair walk of so many steps is ever this far from where it began."""
    if height <= 0:
        return 1.0
    inside = np.zeros(2 * height - 1)
    inside[height - 1] = 1.0
    for _ in range(steps):
        inside = np.convolve(inside, (0.5, 0.0, 0.5))[1:-1]
    return float(1.0 - inside.sum())


def holm(p: np.ndarray) -> np.ndarray:
    """p-values `[M]` adjusted for their number, whatever their dependence (Holm 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


# -- coverage ---------------------------------------------------------------------------------


def covered(probabilities: np.ndarray, prob: float) -> float:
    """The share of truths inside the central interval of this mass."""
    return float((np.abs(2.0 * probabilities - 1.0) <= prob).mean())


def coverage_row(probabilities: np.ndarray, prob: float) -> dict[str, float]:
    """That share with its 95 % binomial interval (Clopper & Pearson 1934)."""
    from scipy.stats import binomtest

    count = len(probabilities)
    hits = round(covered(probabilities, prob) * count)
    low, high = binomtest(hits, count).proportion_ci(0.95, "exact")
    return {"prob": prob, "coverage": hits / count, "low": float(low), "high": float(high)}


# -- the ECDF ---------------------------------------------------------------------------------
#
# Säilynoja, Bürkner & Vehtari (2022), "Graphical test for discrete uniformity and its applications in
# goodness-of-fit evaluation and multiple sample comparison": at each of some points the number of
# values below it is binomial, and the pointwise level of the bands is such that the whole ECDF stays
# inside with the wanted probability. ArviZ has such bands, but not that probability, nor the p-value.


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
    """The points at which the ECDF of so many values is looked at, `[K]`, even, inside (0, 1)."""
    parts = min(_MOST_POINTS, max(count, 2))
    return np.arange(1, parts) / parts


def ecdf(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The share of values `[N]` at or below each of these points `[K]`."""
    return np.searchsorted(np.sort(values), points, side="right") / len(values)


@functools.lru_cache(maxsize=64)
def band(count: int, prob: float = 0.95) -> Band:
    """Simultaneous bands, of this probability, for the ECDF of ``count`` independent uniform values."""
    inside, outside = -40.0, 0.0  # of the logarithm of the pointwise level
    for _ in range(_BISECTIONS):
        middle = 0.5 * (inside + outside)
        if probability_inside(count, float(np.exp(middle))) >= prob:
            inside = middle
        else:
            outside = middle
    low, high = _limits(count, float(np.exp(inside)))
    return Band(points_for(count), low / count, high / count)


def uniformity(values: np.ndarray) -> float:
    """The p-value of the ECDF test: how likely uniform values leave a band that these just touch."""
    from scipy.stats import binom

    count = len(values)
    points = points_for(count)
    below = np.rint(ecdf(values, points) * count)
    left, right = binom.cdf(below, count, points), binom.sf(below - 1, count, points)
    # The pointwise level at which these values first leave the band.
    level = float(min(1.0, 2.0 * np.minimum(left, right).min()))
    return float(max(1.0 - probability_inside(count, level), _SMALLEST))


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
    """The probability that the ECDF of uniform values stays inside a band of this pointwise level.

    The values are a Poisson process that has ``count`` of them in all (Khmaladze & Shinjikashvili 2001),
    so that counts between one point and the next are independent.
    """
    from scipy.stats import poisson

    lows, highs = _limits(count, level)
    if (lows > highs).any():
        return 0.0
    step = poisson.pmf(np.arange(count + 1), count / (len(lows) + 1))
    chances, least = np.ones(1), 0
    for low, high in zip([*lows, count], [*highs, count], strict=True):
        chances = np.convolve(chances, step[: high - least + 1])[low - least : high - least + 1]
        least = low
    return float(min(1.0, chances.sum() / poisson.pmf(count, count)))

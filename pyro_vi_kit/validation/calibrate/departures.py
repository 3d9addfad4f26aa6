"""In which way probabilities of the truth are not uniform: to one side, or too far out.

Each takes p_i = Q(theta_i <= truth_i), `[N]`, of N simulations, strictly inside (0, 1) and uniform where
Q is the posterior.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

_SMALLEST = 1e-15


class Departure(NamedTuple):
    """How far numbers depart from what they should be.

    Attributes:
        size: In units of its own.
        p: Its p-value.
    """

    size: float
    p: float


def bias(probabilities: np.ndarray) -> Departure:
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
    centred = probabilities - 0.5
    order = np.argsort(-np.abs(centred), kind="stable")
    walk = np.cumsum(np.where(centred[order] > 0, 1, -1))
    reached = int(np.abs(walk).max())
    size = -float(normal_scores(probabilities).mean())
    return Departure(size, max(_chance_to_reach(reached, len(walk)), _SMALLEST))


def dispersion(probabilities: np.ndarray) -> Departure:
    """Whether the truth lies too far out, or too far in, wherever the guide is centred.

    The normal scores of p, less their mean, have a sum of squares that is chi-square with N - 1 degrees
    of freedom (after Cook, Gelman & Rubin 2006). A guide that is only shifted passes where it is normal.

    Returns:
        The sd of the normal scores (above 1: intervals are too narrow), and the two-sided p-value.
    """
    from scipy.stats import chi2

    scores = normal_scores(probabilities)
    free = len(scores) - 1
    squares = float(((scores - scores.mean()) ** 2).sum())
    p = 2.0 * min(float(chi2.cdf(squares, free)), float(chi2.sf(squares, free)))
    return Departure(float(np.sqrt(squares / free)), min(1.0, max(p, _SMALLEST)))


def normal_scores(probabilities: np.ndarray) -> np.ndarray:
    """What a standard normal has below it with these probabilities."""
    from scipy.special import ndtri

    return ndtri(probabilities)


@functools.lru_cache(maxsize=4096)
def _chance_to_reach(height: int, steps: int) -> float:
    """The probability that a fair walk of so many steps is ever this far from where it began."""
    if height <= 0:
        return 1.0
    inside = np.zeros(2 * height - 1)
    inside[height - 1] = 1.0
    for _ in range(steps):
        moved = np.zeros_like(inside)
        moved[1:] = 0.5 * inside[:-1]
        moved[:-1] += 0.5 * inside[1:]
        inside = moved
    return float(1.0 - inside.sum())


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number, whatever their dependence (Holm 1979).

    Args:
        p: `[M]`.
    """
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted

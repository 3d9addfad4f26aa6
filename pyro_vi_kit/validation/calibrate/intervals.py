"""How often central intervals hold the truth."""

from __future__ import annotations

import numpy as np

PROBS = (0.5, 0.8, 0.9, 0.95)


def covered(probabilities: np.ndarray, prob: float) -> float:
    """The share of truths inside the central interval of this mass.

    Args:
        probabilities: Of the truths, `[N]`.
        prob: Mass of the interval.
    """
    return float((np.abs(2.0 * probabilities - 1.0) <= prob).mean())


def coverage_row(probabilities: np.ndarray, prob: float, level: float = 0.95) -> dict[str, float]:
    """That share with its binomial interval (Clopper & Pearson 1934), of this level.

    Args:
        probabilities: Of the truths, `[N]`.
        prob: Mass of the interval.
        level: How often the interval of the share holds the true one, at the least.
    """
    from scipy.stats import beta

    count = len(probabilities)
    hits = round(covered(probabilities, prob) * count)
    tail = (1.0 - level) / 2.0
    low = float(beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.isf(tail, hits + 1, count - hits)) if hits < count else 1.0
    return {"prob": prob, "coverage": hits / count, "low": low, "high": high}

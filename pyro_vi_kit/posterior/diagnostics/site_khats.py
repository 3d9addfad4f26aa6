"""A k-hat for each number: of the importance weights smoothed along it. A heuristic."""

from __future__ import annotations

import math

import numpy as np

from pyro_vi_kit.core.psis import Psis, psis_rows
from pyro_vi_kit.posterior.diagnostics.shifts import scale_of

# Columns at a time: their sorted weights are held side by side.
_CHUNK = 256


def smoothed_khats(flat: np.ndarray, smoothed: Psis) -> np.ndarray:
    """k-hat of ``E[w | z_i]`` for each number z_i, `[n]`.

    ``E[w | z_i]`` is the ratio of the marginals, ``p(z_i) / q(z_i)``: where the joint weights are bad
    only because there are many dimensions, or because one number is wrong, those of the others are not
    (the marginal diagnostics of Yao, Vehtari, Simpson & Gelman 2018,
    https://arxiv.org/abs/1802.02538). It is estimated by averaging the smoothed weights of the draws
    nearest in z_i, about sqrt(S) of them and fewer towards the ends. A heuristic: what is left of the
    weights' noise in the averages looks like a tail too, and a k-hat of an average is lower than that
    of what was averaged. Read the k-hats against each other, and believe how far means and sds move.

    Args:
        flat: Draws of q, `[S, n]`.
        smoothed: Their smoothed joint weights.

    Returns:
        ``-inf`` where a number is constant.
    """
    draws = len(flat)
    _, sd = scale_of(flat)
    log_w = smoothed.log_weights + math.log(draws)
    low, high = _windows(draws)
    found = np.full(flat.shape[1], -np.inf)
    moving = np.flatnonzero(sd > 0)
    for i in range(0, len(moving), _CHUNK):
        columns = moving[i : i + _CHUNK]
        weights = np.exp(log_w[np.argsort(flat[:, columns], axis=0, kind="stable")])
        total = np.concatenate([np.zeros((1, len(columns))), weights.cumsum(0)])
        average = (total[high] - total[low]) / (high - low)[:, None]
        with np.errstate(divide="ignore"):
            found[columns] = psis_rows(np.log(np.maximum(average, 0.0))).khat
    return found


def _windows(draws: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last (exclusive) neighbour of each rank: symmetric, so that ends are not averaged in."""
    rank = np.arange(draws)
    reach = np.minimum(np.minimum(rank, draws - 1 - rank), math.isqrt(draws) // 2)
    return rank - reach, rank + reach + 1

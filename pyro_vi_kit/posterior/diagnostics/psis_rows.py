"""Pareto-smoothed importance sampling of many vectors of log weights side by side: one for each datum.

Numbers are those of `psis.psis` on each of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pyro_vi_kit.core.psis import MIN_TAIL, fit_pareto, pareto_quantiles, psis, rounding, tail_of

# Rows at a time: their grids of shapes have to stay in the processor's cache.
_CHUNK = 256
_SMALLEST = math.log(np.finfo(float).tiny)


class RowsPsis(NamedTuple):
    """What the weights of each row say, `[B]` each; see `psis.Psis`.

    Attributes:
        khat: Shape of the fitted tail.
        ess: Effective number of draws.
        log_mean_weight: Log of the mean of the raw weights, nats.
        log_mean_weight_se: Its standard error, nats.
    """

    khat: np.ndarray
    ess: np.ndarray
    log_mean_weight: np.ndarray
    log_mean_weight_se: np.ndarray


def psis_rows(log_weights: np.ndarray) -> RowsPsis:
    """`psis.psis` of each column.

    A draw that model or guide refuses (NaN, +inf) has weight zero. A row without any weight has k-hat
    infinite and no effective draws.

    Args:
        log_weights: Of S draws for each of B rows, `[S, B]`, nats.
    """
    log_w = np.asarray(log_weights, dtype=float).T
    log_w = np.where(np.isnan(log_w) | np.isposinf(log_w), -np.inf, log_w)
    parts = [_smoothed(log_w[i : i + _CHUNK]) for i in range(0, len(log_w), _CHUNK)]
    return RowsPsis(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _smoothed(log_w: np.ndarray) -> RowsPsis:
    """The same of a few rows `[B, S]`."""
    rows, draws = log_w.shape
    peak = log_w.max(axis=1)
    empty = ~np.isfinite(peak)
    scaled = log_w - np.where(empty, 0.0, peak)[:, None]
    raw = np.exp(scaled)
    mean = raw.mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = raw.std(axis=1, ddof=1) if draws > 1 else np.full(rows, np.inf)
        found = RowsPsis(
            khat=np.full(rows, np.inf),
            ess=np.where(empty, 0.0, raw.sum(axis=1) ** 2 / (raw**2).sum(axis=1)),
            log_mean_weight=peak + np.log(mean),
            log_mean_weight_se=np.where(empty, np.inf, spread / (mean * math.sqrt(draws))),
        )
    size = tail_of(draws)
    if size < MIN_TAIL or draws <= size:
        _one_by_one(found, log_w, ~empty)
        return found
    ordered = np.partition(scaled, draws - size - 1, axis=1)
    body, tail = ordered[:, : draws - size], np.sort(ordered[:, draws - size :], axis=1)
    cutoff = body[:, -1]
    flat = ~empty & (-cutoff <= rounding(peak))
    found.khat[flat] = -np.inf
    # Ties with the threshold and thresholds of weight zero make for tails of another length.
    usual = ~empty & ~flat & (tail[:, 0] > cutoff) & (cutoff > _SMALLEST)
    _one_by_one(found, log_w, ~empty & ~flat & ~usual)
    _fit(found, body[usual], tail[usual], cutoff[usual], np.flatnonzero(usual))
    return found


def _fit(
    found: RowsPsis, body: np.ndarray, tail: np.ndarray, cutoff: np.ndarray, places: np.ndarray
) -> None:
    """Fit the tails `[B, M]` above the thresholds `[B]`, and fill in k-hat and effective draws."""
    if not len(places):
        return
    threshold = np.exp(cutoff)[:, None]
    k, sigma = fit_pareto(threshold * np.expm1(tail - cutoff[:, None]))
    fitted = np.isfinite(k) & np.isfinite(sigma) & (sigma > 0)
    k, sigma, places = k[fitted], sigma[fitted], places[fitted]
    smooth = pareto_quantiles(tail.shape[1], k, sigma) + threshold[fitted]
    below, smooth = np.exp(body[fitted]), np.minimum(smooth, 1.0)
    total = below.sum(axis=1) + smooth.sum(axis=1)
    found.khat[places] = k
    found.ess[places] = total**2 / ((below**2).sum(axis=1) + (smooth**2).sum(axis=1))


def _one_by_one(found: RowsPsis, log_w: np.ndarray, chosen: np.ndarray) -> None:
    for i in np.flatnonzero(chosen):
        one = psis(log_w[i])
        found.khat[i], found.ess[i] = one.khat, one.ess

"""The log evidence by importance weights, with a standard error that knows of the tail.

The mean of the Pareto-smoothed weights (Vehtari, Simpson, Gelman, Yao & Gabry 2024,
https://www.jmlr.org/papers/v25/19-556.html). The sample variance of heavy-tailed weights says nothing
of weights larger than any that was drawn, and is far too small in most repeats. What the fitted Pareto
says lies beyond them, at the upper end of what its shape may be, is added to it.
"""

from __future__ import annotations

import math

import numpy as np

from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.psis import MIN_TAIL, fit_pareto, psis, tail_of

# Standard errors that are added to k-hat: in one fit of forty the shape is larger still.
_UPPER = 2.0


def log_evidence(log_weights: np.ndarray) -> tuple[float, float]:
    """Log of the mean weight and its standard error, nats.

    The error is infinite where the mean itself may be, `k-hat + 2 s.e. >= 1`: use a richer guide then.

    Args:
        log_weights: ``log p(x, z) - log q(z)`` at independent draws of q `[S]`, nats, raw; ``-inf`` is a
            weight of zero.

    Raises:
        OptionError: If there are fewer than 2 draws, or the weights are as `psis` refuses them.
    """
    log_w = np.asarray(log_weights, dtype=float)
    if log_w.size < 2:
        raise OptionError("a log evidence with its standard error needs at least 2 draws")
    smoothed = psis(log_w)
    peak = float(log_w.max())
    # Smoothing leaves weights below the tail as they are: one of them undoes the normalisation.
    below = int(np.argsort(log_w)[np.isneginf(log_w).sum()])
    scaled = smoothed.log_weights - smoothed.log_weights[below] + (log_w[below] - peak)
    mean = float(np.exp(scaled).mean())
    missing = _beyond(np.exp(log_w - peak), smoothed.khat) / mean
    se = math.hypot(smoothed.log_mean_weight_se, missing)
    return peak + math.log(mean), se


def _beyond(weights: np.ndarray, khat: float) -> float:
    """The mean that weights above the largest expected one contribute, in units of the weights.

    Of M tail weights, generalized Pareto with shape k and scale sigma above a threshold, the largest is
    expected about the quantile ``1 - 1 / M``; what exceeds it integrates to
    ``sigma M^(k - 1) / (1 - k)``. The standard error of k is that of maximum likelihood,
    ``(1 + k) / sqrt(M)`` (Smith 1987, https://doi.org/10.1214/aos/1176350499).
    """
    if math.isinf(khat):
        return 0.0 if khat < 0 else math.inf
    ordered = np.sort(weights)
    tail = tail_of(weights.size)
    threshold = ordered[weights.size - tail - 1]
    excess = ordered[ordered > threshold] - threshold
    count = excess.size
    if count < MIN_TAIL:
        return math.inf
    k, sigma = map(float, fit_pareto(excess))
    upper = k + _UPPER * (1.0 + k) / math.sqrt(count)
    if not upper < 1.0:
        return math.inf
    return count / weights.size * sigma * count ** (upper - 1.0) / (1.0 - upper)

"""The log evidence by importance weights, with a standard error that knows of the tail.

Two things make the plain mean of p / q wrong without saying so. Where a tail of the posterior is
heavier than q's, the draws that matter never come: a Gaussian is therefore drawn from together with
copies of it in which one coordinate at a time is wide, all weighed by the density of the whole mixture
(defensive importance sampling, Hesterberg 1995, https://doi.org/10.1080/00401706.1995.10484303; Owen &
Zhou 2000, https://doi.org/10.1080/01621459.2000.10473909). And the sample variance of heavy-tailed
weights knows of none larger than was drawn: what the Pareto fitted to them says lies beyond (Vehtari,
Simpson, Gelman, Yao & Gabry 2024, https://www.jmlr.org/papers/v25/19-556.html) is added to it. The
mean is the plain one: that of smoothed weights is 1 % too low where a tail is heavy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import StudentT

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.psis import MIN_TAIL, fit_pareto, psis, tail_of, usable
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.model.groups import chunks_of, width_of
from pyro_vi_kit.posterior.approximation import Approximation, GuideApproximation

# The share of draws in which a coordinate is wide: the others lose as much of their worth at the most.
_WIDE = 0.2
# Student's t in units of the coordinate's sd. Of full_rank on the non-centred eight schools (log tau),
# 10,000 draws: errors up to 0.24 nats in 150 repeats without it, 0.03 in 40 with it, and 0.12 in 40
# with half of the draws from a multivariate t.
_FREEDOM, _SCALE = 3.0, 2.0
# A matrix of as many rows and columns is held.
_MAX_DIM = 1000
# Standard errors that are added to k-hat, where no draw was sent to look for tails.
_UPPER = 1.0


def estimate(approximation: Approximation, draws: int, seed: int) -> tuple[float, float]:
    """The log evidence and its standard error, nats, from fresh draws; see `log_evidence`."""
    defended = _gaussian(approximation) is not None
    return log_evidence(usable(log_weights(approximation, draws, seed)), defended=defended)


def log_evidence(log_weights: np.ndarray, *, defended: bool = False) -> tuple[float, float]:
    """Log of the mean weight and its standard error, nats.

    The error is infinite where the mean itself may be, with a k-hat (and its error) from 1 on.

    Args:
        log_weights: ``log p(x, z) - log q(z)`` at independent draws `[S]`, nats, raw; ``-inf`` is a
            weight of zero.
        defended: Whether they are of the widened mixture. If not, the tail is taken to be as heavy as
            k-hat plus its standard error says. On the non-centred eight schools two errors then cover
            the truth in 77 % of repeats; the delta method's in 63 %.

    Raises:
        OptionError: If there are fewer than 2 draws, or the weights are as `psis` refuses them.
    """
    log_w = np.asarray(log_weights, dtype=float)
    if log_w.size < 2:
        raise OptionError("a log evidence with its standard error needs at least 2 draws")
    smoothed = psis(log_w)
    if math.isinf(smoothed.khat):
        # No tail to fit: all weights are equal, or hardly any is there.
        se = smoothed.log_mean_weight_se if smoothed.khat < 0 else math.inf
        return smoothed.log_mean_weight, se
    # In units of their mean.
    weights = np.exp(log_w - smoothed.log_mean_weight)
    missing = _beyond(weights, 0.0 if defended else _UPPER)
    return smoothed.log_mean_weight, math.hypot(smoothed.log_mean_weight_se, missing)


def log_weights(approximation: Approximation, draws: int, seed: int) -> np.ndarray:
    """Raw log weights `[S]`, nats, of draws for the evidence.

    Of a Gaussian over all latents (mean_field, full_rank) they are against the widened mixture, else
    against q itself.

    Args:
        approximation: The trained guide.
        draws: S.
        seed: The same seed gives the same draws.
    """
    gaussian = _gaussian(approximation)
    if gaussian is None or not isinstance(approximation, GuideApproximation):
        return approximation.weigh(draws, seed).log_weights
    density = approximation.density
    loc, tril = gaussian
    with RandomStream(seed, "evidence"):
        x = torch.randn(draws, len(loc), dtype=torch.float64, device="cpu")
        wide = StudentT(loc.new_full((), _FREEDOM), 0.0, _SCALE)
        counts = torch.rand(draws, dtype=torch.float64, device="cpu") < _WIDE
        place = torch.randint(len(loc), (draws,), device="cpu")
        value = wide.sample((draws,))
    # Rows are the directions, in the noise, along which one coordinate changes and the rest follow.
    towards = tril / tril.norm(dim=1, keepdim=True)
    along = towards[place]
    x = torch.where(counts[:, None], x + (value - (x * along).sum(1))[:, None] * along, x)
    standard = x @ towards.T
    ratio = torch.logsumexp(wide.log_prob(standard) - _log_normal(standard), 1) - math.log(len(loc))
    log_q = _log_normal(x).sum(1) - tril.diagonal().log().sum()
    log_q = log_q + torch.logaddexp(ratio + math.log(_WIDE), torch.tensor(math.log1p(-_WIDE)))
    z = density.cast(loc + x @ tril.T)
    pieces = z.split(chunks_of(draws, width_of(density)))
    log_p = torch.cat([_log_p(approximation, piece) for piece in pieces])
    return (log_p.double().cpu() - log_q).numpy()


def _gaussian(approximation: Approximation) -> tuple[Tensor, Tensor] | None:
    """Mean and Cholesky factor, float64 on the CPU, of a guide that is one Gaussian; else None."""
    if not isinstance(approximation, GuideApproximation):
        return None
    guide = approximation.guide
    family: Any = guide.family
    if family is None or family.gaussian not in ("diagonal", "dense"):
        return None
    if guide.density.streamed is not None or guide.density.dim > _MAX_DIM:
        return None
    with torch.no_grad():
        mean, tril = family.moments()
    return mean.double().cpu(), tril.double().cpu()


@torch.no_grad()
def _log_p(approximation: GuideApproximation, z: Tensor) -> Tensor:
    """Log density `[S]` at `[S, D]`, NaN where the model's linear algebra fails."""
    try:
        return approximation.density.log_prob(z, approximation.params)
    except ERRORS as error:
        if not is_undefined(error):
            raise
        if len(z) == 1:
            return z.new_full((1,), math.nan)
        halves = z.split((len(z) + 1) // 2)
        return torch.cat([_log_p(approximation, half) for half in halves])


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2.0 * math.pi))


def _beyond(weights: np.ndarray, slack: float) -> float:
    """The mean that weights above the largest expected one contribute, in units of the weights.

    Of M tail weights, generalized Pareto with shape k and scale sigma above a threshold, the largest is
    expected about the quantile ``1 - 1 / M``; what exceeds it integrates to
    ``sigma M^(k - 1) / (1 - k)``. The standard error of k is that of maximum likelihood,
    ``(1 + k) / sqrt(M)`` (Smith 1987, https://doi.org/10.1214/aos/1176350499).
    """
    ordered = np.sort(weights)
    threshold = ordered[weights.size - tail_of(weights.size) - 1]
    excess = ordered[ordered > threshold] - threshold
    count = excess.size
    if count < MIN_TAIL:
        return math.inf
    k, sigma = map(float, fit_pareto(excess))
    upper = k + slack * (1.0 + k) / math.sqrt(count)
    if not upper < 1.0:
        return math.inf
    return count / weights.size * sigma * count ** (upper - 1.0) / (1.0 - upper)

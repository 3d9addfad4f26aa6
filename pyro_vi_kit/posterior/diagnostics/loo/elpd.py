"""PSIS-LOO from draws of an approximate posterior, as the installed ArviZ's own result.

Weights for leaving out y_i are p(z | y) / q(z) x 1 / p(y_i | z), smoothed jointly (Magnusson, Andersen,
Jonasson & Vehtari 2019, eq. 8, https://proceedings.mlr.press/v97/magnusson19a.html; Vehtari, Gelman &
Gabry 2017, https://doi.org/10.1007/s11222-016-9696-4).
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vi_kit.core.export import arviz_major, import_arviz
from pyro_vi_kit.core.psis import psis, usable

if TYPE_CHECKING:
    import xarray as xr


class Elpd(NamedTuple):
    """Leave-one-out predictive densities of n observations.

    Attributes:
        elpd: log p(y_i | y without y_i), `[n]`, nats.
        lpd: log p(y_i | y), `[n]`, nats, corrected by the smoothed weights p(z | y) / q(z) too.
        khat: Pareto k-hat of the weights that leave y_i out, `[n]`.
        ess: Their effective number of draws, `[n]`.
    """

    elpd: np.ndarray
    lpd: np.ndarray
    khat: np.ndarray
    ess: np.ndarray


def good_khat(draws: int) -> float:
    """Up to which k-hat so many draws suffice (Vehtari et al. 2024, section 3.2.4)."""
    return min(1 - 1 / math.log10(draws), 0.7) if draws > 1 else 0.7


def leave_one_out(log_likelihood: np.ndarray, log_ratios: np.ndarray) -> Elpd:
    """Leave-one-out densities of each column.

    Args:
        log_likelihood: log p(y_i | z_s) at draws from q, `[S, n]`, nats, finite where the ratios are.
        log_ratios: log p(z_s, y) - log q(z_s), `[S]`, nats; -inf is a weight of zero.

    Raises:
        OptionError: If no draw has a positive density.
    """
    full = psis(log_ratios).log_weights
    lpd = _log_sums(full[:, None] + log_likelihood)
    elpd, khat, ess = np.empty((3, len(lpd)))
    for i, column in enumerate(log_likelihood.T):
        smoothed = psis(usable(log_ratios - column))
        elpd[i] = _log_sums((smoothed.log_weights + column)[:, None])[0]
        khat[i], ess[i] = smoothed.khat, smoothed.ess
    return Elpd(elpd, lpd, khat, ess)


def elpd_data(
    log_likelihood: xr.DataArray, log_p: np.ndarray, log_q: np.ndarray
) -> tuple[Elpd, Any]:
    """What leaving out says, and the same as ArviZ's ``ELPDData`` with pointwise values.

    ``loo_approximate_posterior`` makes it where ArviZ has that (1.x). The effective number of parameters
    is the same with both: ArviZ takes log p(y_i | y) over plain draws of q, here it is weighted.

    Args:
        log_likelihood: Dims (chain, draw, *observations), nats.
        log_p: log p(z, y) of the draws, `[S]`, nats.
        log_q: log q(z) of the draws, `[S]`, nats. One that model or guide refuses (a ratio of NaN or
            +inf) has weight zero.

    Raises:
        OptionError: If no draw has a positive density.
    """
    log_ratios = usable(log_p - log_q)
    flat = log_likelihood.values.reshape(len(log_p), -1)
    # A draw of weight zero counts for nothing, and -inf minus -inf would be NaN.
    flat = np.where(np.isneginf(log_ratios)[:, None], 0.0, flat)
    found = leave_one_out(flat, log_ratios)
    if arviz_major() >= 1:
        values = log_likelihood.copy(data=flat.reshape(log_likelihood.shape))
        return found, _by_arviz(found, values, log_ratios)
    pattern = log_likelihood.isel(chain=0, draw=0, drop=True)
    return found, _by_hand(found, pattern, len(log_p))


def _by_hand(found: Elpd, pattern: xr.DataArray, draws: int) -> Any:
    """The result as ``arviz.loo`` of 0.x makes it."""
    import_arviz()  # which is quiet about what is coming
    from arviz.stats.stats_utils import ELPDData

    good = good_khat(draws)
    shape = pattern.shape
    values = {
        "elpd_loo": float(found.elpd.sum()),
        "se": float(np.sqrt(found.elpd.size * found.elpd.var())),
        "p_loo": float((found.lpd - found.elpd).sum()),
        "n_samples": draws,
        "n_data_points": found.elpd.size,
        "warning": bool((found.khat > good).any()),
        "loo_i": pattern.copy(data=found.elpd.reshape(shape)).rename("loo_i"),
        "pareto_k": pattern.copy(data=found.khat.reshape(shape)).rename("pareto_shape"),
        "scale": "log",
        "good_k": good,
    }
    return ELPDData(data=list(values.values()), index=list(values))


def _by_arviz(found: Elpd, log_likelihood: xr.DataArray, log_ratios: np.ndarray) -> Any:
    """The result of ArviZ 1.x."""
    import xarray as xr

    data = xr.DataTree.from_dict({"/log_likelihood": log_likelihood.to_dataset(name="y")})
    with warnings.catch_warnings():  # the caller says what to do about it
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        # The difference of the two is all that counts.
        result = import_arviz().loo_approximate_posterior(
            data, log_ratios, np.zeros_like(log_ratios), pointwise=True, var_name="y"
        )
    result.p = float(found.lpd.sum() - result.elpd)
    return result


def _log_sums(values: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the first dimension."""
    peak = values.max(axis=0)
    base = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return base + np.log(np.exp(values - base).sum(axis=0))

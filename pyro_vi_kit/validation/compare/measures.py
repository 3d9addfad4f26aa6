"""How wrong paired draws are: number by number, and as a whole."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import xarray as xr

from pyro_vi_kit.core.export import import_arviz
from pyro_vi_kit.core.metrics import compare_draws, sliced_wasserstein, sliced_wasserstein_null
from pyro_vi_kit.validation.compare.alignment import Paired

ERRORS = ("mean_error", "sd_ratio", "q05_error", "q50_error", "q95_error")

# The size of the sets whose distance is measured: it sets the distance between exact draws.
_BATCH = 1000
_NULL_REPEATS = 50
_NULL_MEANS = 10_000
# A number whose sd is below this fraction of it is a constant with rounding noise.
_CONSTANT = 1e-10
_ROUNDING = 1e-12
_FEWEST_THINNED = 100


class Distance(NamedTuple):
    """Sliced Wasserstein-1 distance of joint draws, in reference sd; NaN where nothing varies.

    Attributes:
        value: Between fit and reference, the mean over batches.
        null: Its mean between exact draws.
        null_q99: Its 99 % quantile between exact draws.
    """

    value: float
    null: float
    null_q99: float


def error_table(paired: Paired) -> dict[str, np.ndarray]:
    """The errors of every number by column, each `[P]`.

    Infinite where the fit's draws are not finite, NaN where the reference's are not.
    """
    truth = paired.truth.reshape(-1, paired.truth.shape[-1])
    known, sound = np.isfinite(truth).all(0), np.isfinite(paired.draws).all(0)
    both = known & sound
    columns = {name: np.where(known, np.inf, np.nan) for name in ERRORS}
    if both.any():
        found = compare_draws(truth[:, both], paired.draws[:, both])
        for name, values in found._asdict().items():
            columns[name][both] = values
        # A point estimate's sd is 0 up to rounding; say 0.
        columns["sd_ratio"][np.abs(columns["sd_ratio"]) < _ROUNDING] = 0.0
    return columns


def mean_error_mcse(paired: Paired, sd_ratio: np.ndarray, ess: np.ndarray) -> np.ndarray:
    """Monte Carlo standard error of the mean errors, of both sets of draws, `[P]`."""
    varying = varies(paired.truth.reshape(-1, paired.truth.shape[-1]))
    return np.where(varying, np.sqrt(sd_ratio**2 / len(paired.draws) + 1 / ess), 0.0)


def mean_error_noise(draws: int, ess: np.ndarray) -> float:
    """What the worst mean error of exact draws stays below with probability 99 % (Bonferroni).

    Args:
        draws: Exact independent draws that stand for a fit.
        ess: Effective number of the reference's draws `[P]`.
    """
    z = NormalDist().inv_cdf(1 - 0.01 / (2 * len(ess)))
    return z * float(np.sqrt(1 / draws + 1 / ess.min()))


def effective_draws(truth: np.ndarray) -> np.ndarray:
    """Effective number of draws `[chain, draw, P]` for each mean, `[P]`; all draws of a constant."""
    chains, draws, _ = truth.shape
    ess = np.full(truth.shape[-1], float(chains * draws))
    varying = varies(truth.reshape(chains * draws, -1))
    if varying.any():
        data = xr.Dataset({"x": (("chain", "draw", "number"), truth[..., varying])})
        ess[varying] = import_arviz().ess(data, method="mean")["x"].to_numpy()
    return ess


class Distances:
    """Sliced Wasserstein-1 of joint draws, in batches of 1,000.

    The distance between exact draws is computed once for each set of parameters.

    Args:
        seed: The same seed gives the same distances.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._nulls: dict[tuple[str, ...], np.ndarray] = {}

    def __call__(self, paired: Paired, ess: np.ndarray) -> Distance:
        """The distance of a fit; ``ess`` as `effective_draws` gives it."""
        varying = varies(paired.truth.reshape(-1, paired.truth.shape[-1]))
        if not varying.any():
            return Distance(float("nan"), float("nan"), float("nan"))
        rng = np.random.default_rng(self._seed)
        truth = rng.permutation(_thinned(paired.truth[..., varying], ess[varying].min()))
        approx = paired.draws[:, varying]
        size = min(_BATCH, len(truth), len(approx))
        batches = min(len(truth), len(approx)) // size
        null = self._null(paired.labels, truth, size)
        # The mean over the fit's batches is held against means over as many exact ones.
        means = rng.choice(null, (_NULL_MEANS, batches)).mean(1)
        value = _mean_distance(truth, approx, size, batches)
        return Distance(value, float(null.mean()), float(np.quantile(means, 0.99)))

    def _null(self, labels: tuple[str, ...], truth: np.ndarray, size: int) -> np.ndarray:
        if labels not in self._nulls:
            self._nulls[labels] = sliced_wasserstein_null(
                truth, size, repeats=_NULL_REPEATS, seed=self._seed
            )
        return self._nulls[labels]


def _mean_distance(truth: np.ndarray, approx: np.ndarray, size: int, batches: int) -> float:
    if not np.isfinite(approx).all():
        return float("inf")
    units = {"location": truth.mean(0), "scale": truth.std(0, ddof=1)}
    parts = [slice(i * size, (i + 1) * size) for i in range(batches)]
    return float(np.mean([sliced_wasserstein(approx[p], truth[p], **units) for p in parts]))


def _thinned(truth: np.ndarray, ess: float) -> np.ndarray:
    """Nearly independent draws `[N, P]` out of `[chain, draw, P]`."""
    total = truth.shape[0] * truth.shape[1]
    step = max(1, min(round(total / ess), total // _FEWEST_THINNED))
    return truth[:, ::step].reshape(-1, truth.shape[-1])


def varies(values: np.ndarray) -> np.ndarray:
    """Which columns of `[N, P]` are finite and no constants, `[P]`."""
    finite = np.isfinite(values).all(0)
    safe = np.where(finite, values, 0.0)
    return finite & (safe.std(0) > _CONSTANT * np.abs(safe.mean(0)))

"""How far two sets of draws are apart, in units of the reference's standard deviation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyro_vi_kit.core.errors import OptionError

# A column whose sd is below this fraction of its magnitude is a constant with rounding noise, such
# as the diagonal of a correlation matrix.
_CONSTANT = 1e-10


class DrawErrors(NamedTuple):
    """Errors of an approximation, each with the shape [...] of one draw.

    Attributes:
        mean_error: Approximate minus reference mean, in reference sd.
        sd_ratio: Approximate over reference sd.
        q05_error: Error of the 5 % quantile, in reference sd.
        q50_error: Error of the median, in reference sd.
        q95_error: Error of the 95 % quantile, in reference sd.
    """

    mean_error: np.ndarray
    sd_ratio: np.ndarray
    q05_error: np.ndarray
    q50_error: np.ndarray
    q95_error: np.ndarray


def compare_draws(reference: ArrayLike, approx: ArrayLike) -> DrawErrors:
    """Errors of an approximation's mean, sd and quantiles for every element of a draw.

    Where the reference is constant, equal values count as no error (0, and 1 for ``sd_ratio``) and
    different ones as infinite.

    Args:
        reference: Draws taken as the truth [N, ...].
        approx: Draws to be judged [M, ...]; ``M`` may differ from ``N``.

    Returns:
        The errors, each [...].

    Raises:
        OptionError: If either has fewer than 2 draws, shapes differ, or a draw is not finite.
    """
    reference = _draws("reference", reference)
    approx = _draws("approx", approx)
    if reference.shape[1:] != approx.shape[1:]:
        raise OptionError(
            f"draws of shape {approx.shape[1:]} cannot be compared with reference draws of shape "
            f"{reference.shape[1:]}: both must hold the same parameter"
        )
    mean, sd = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    rounding = _CONSTANT * np.abs(mean)
    levels = [0.05, 0.5, 0.95]
    shifts = np.quantile(approx, levels, axis=0) - np.quantile(reference, levels, axis=0)
    shifts = np.concatenate([(approx.mean(axis=0) - mean)[None], shifts])
    mean_error, q05, q50, q95 = (_in_sd(shift, sd, rounding) for shift in shifts)
    approx_sd = approx.std(axis=0, ddof=1)
    # For the ratio, "no error" is 1: shift by the reference and back.
    ratio = 1.0 + _in_sd(approx_sd - sd, sd, rounding)
    return DrawErrors(mean_error, ratio, q05, q50, q95)


def sliced_wasserstein(
    a: ArrayLike,
    b: ArrayLike,
    *,
    location: ArrayLike,
    scale: ArrayLike,
    directions: int = 256,
    seed: int = 99,
) -> float:
    """Sliced Wasserstein-1 distance between two equally large sets of draws.

    Columns are standardised, both sets are projected on random unit directions, and the mean
    absolute difference of the sorted projections is averaged over the directions (Bonneel, Rabin,
    Peyré & Pfister 2015, https://doi.org/10.1007/s10851-014-0506-3). Two sets of exact draws are
    not at distance 0: ``sliced_wasserstein_null`` says how far they are.

    Args:
        a: Draws [S, D].
        b: Draws [S, D].
        location: What is subtracted from each column, usually the reference mean [D].
        scale: What each column is divided by, usually the reference sd [D].
        directions: Number of random directions.
        seed: Seed of the directions.

    Returns:
        The distance, in units of ``scale``.

    Raises:
        OptionError: If shapes differ, a draw is not finite, or a scale is not positive.
    """
    a, b = _matrix("a", a), _matrix("b", b)
    if a.shape != b.shape:
        raise OptionError(
            f"sliced Wasserstein needs two sets of the same shape, got {a.shape} and {b.shape}: "
            "take as many draws from each"
        )
    location, scale = np.asarray(location, dtype=float), np.asarray(scale, dtype=float)
    constant = np.flatnonzero(~(scale > 0))
    if constant.size:
        raise OptionError(
            f"scale is not positive in columns {constant.tolist()}: leave constant columns out"
        )
    units = _directions(a.shape[1], directions, seed)
    projected_a = np.sort(((a - location) / scale) @ units, axis=0)
    projected_b = np.sort(((b - location) / scale) @ units, axis=0)
    return float(np.abs(projected_a - projected_b).mean())


def sliced_wasserstein_null(
    reference: ArrayLike, draws: int, *, repeats: int = 50, seed: int = 0
) -> np.ndarray:
    """Distances between sets of exact draws: what a perfect approximation would show.

    Each repeat takes two sets of ``draws`` rows from the reference without overlap and compares
    them, standardised by the reference's mean and sd. Where the reference is too short for that
    (``N < 2 * draws``) the sets have ``N // 2`` rows and the distance is scaled by
    ``sqrt(N // 2 / draws)``: the distance between two samples of a law with light tails is
    ``n**-0.5`` times a limit that does not depend on n (del Barrio, Giné & Matrán 1999,
    https://doi.org/10.1214/aop/1022677394). The scaled values are right in the limit, not exactly;
    resampling with replacement would not be right at all, because sets then share draws.
    Repeats share the reference's draws, so that their spread is a little too small.

    Args:
        reference: Independent (thinned) exact draws [N, D].
        draws: Size of the sets whose distance is asked for.
        repeats: Number of pairs.
        seed: Seed of the splits.

    Returns:
        Distances [repeats], in reference sd.

    Raises:
        OptionError: If the reference has fewer than 4 draws, or ``draws`` or ``repeats`` is
            below 1.
    """
    reference = _matrix("reference", reference)
    if len(reference) < 4 or draws < 1 or repeats < 1:
        raise OptionError(
            f"the null needs a reference of at least 4 draws, draws >= 1 and repeats >= 1, got "
            f"{len(reference)} draws of the reference, draws={draws} and repeats={repeats}"
        )
    size = min(draws, len(reference) // 2)
    location, scale = reference.mean(axis=0), reference.std(axis=0, ddof=1)
    rng = np.random.default_rng(seed)
    distances = np.empty(repeats)
    for repeat in range(repeats):
        rows = rng.permutation(len(reference))
        first, second = reference[rows[:size]], reference[rows[size : 2 * size]]
        distances[repeat] = sliced_wasserstein(first, second, location=location, scale=scale)
    return distances * math.sqrt(size / draws)


def mcse_mean(draws: ArrayLike) -> np.ndarray:
    """Monte Carlo standard error of the mean of independent draws.

    Args:
        draws: Independent draws [S, ...]; not a Markov chain, whose error is larger.

    Returns:
        ``sd / sqrt(S)`` [...], in the draws' units.

    Raises:
        OptionError: If there are fewer than 2 draws or one is not finite.
    """
    draws = _draws("draws", draws)
    return np.asarray(draws.std(axis=0, ddof=1) / math.sqrt(len(draws)))


def interval(draws: ArrayLike, prob: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Equal-tailed interval that holds ``prob`` of the draws.

    Args:
        draws: Draws [S, ...].
        prob: Probability inside, between 0 and 1.

    Returns:
        Lower and upper ends, each [...].

    Raises:
        OptionError: If ``prob`` is not between 0 and 1, there are fewer than 2 draws, or one is not
            finite.
    """
    if not 0 < prob < 1:
        raise OptionError(f"an interval's probability must be between 0 and 1, got {prob}")
    tail = (1 - prob) / 2
    low, high = np.quantile(_draws("draws", draws), [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def _draws(name: str, values: ArrayLike) -> np.ndarray:
    """The draws [S, ...] as float64: at least two and all finite."""
    draws = np.asarray(values, dtype=float)
    if draws.ndim == 0 or len(draws) < 2:
        raise OptionError(f"{name} must hold at least 2 draws, got shape {draws.shape}")
    bad = draws.size - int(np.isfinite(draws).sum())
    if bad:
        raise OptionError(
            f"{bad} of {draws.size} values of {name} are not finite: drop those draws"
        )
    return draws


def _matrix(name: str, values: ArrayLike) -> np.ndarray:
    """The draws as a matrix [S, D]."""
    draws = _draws(name, values)
    if draws.ndim != 2 or draws.shape[1] == 0:
        raise OptionError(
            f"{name} must be a matrix [draws, parameters], got shape {draws.shape}: "
            "reshape it with .reshape(len(draws), -1)"
        )
    return draws


def _directions(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Random unit vectors [D, count]."""
    normals = np.random.default_rng(seed).standard_normal((dimensions, count))
    return normals / np.linalg.norm(normals, axis=0)


def _in_sd(shift: np.ndarray, sd: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """``shift / sd``, with 0 for no shift and signed infinity for a shift of a constant."""
    constant = sd <= rounding
    units = shift / np.where(constant, 1.0, sd)
    off = np.where(np.abs(shift) <= rounding, 0.0, np.copysign(np.inf, shift))
    return np.asarray(np.where(constant, off, units))

"""What each number is judged by: its states, how far corrections move its mean and sd, its k-hat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pyro_vi_kit.core.psis import Psis, psis_rows

# A column whose sd is below this share of its magnitude is a constant with rounding noise.
_CONSTANT = 1e-10
# What is left of a variance is told down to here; less is no other news.
_LEAST = 1e-4
# Probabilities are told in sds of their indicator, and these are no smaller than where a state has one
# draw in a hundred: a tenth of that is a move of 0.01. Rarer states move without end, and say nothing.
_LEAST_SD = 0.1
# A number of more states than these is judged by its mean and sd, as a continuous one.
_STATES = 20
# Columns that states may have; where there would be more, its commonest state stands for a number.
_COLUMNS = 4000
# Columns at a time: their sorted weights are held side by side.
_CHUNK = 256


class Shifts(NamedTuple):
    """How far a correction moves n numbers, `[n]` each.

    Of an indicator, whose mean is a probability, the mean says all, in plain sds of at least 0.1.

    Attributes:
        mean: Corrected minus plain mean, in corrected sds.
        mean_se: Its standard error.
        sd: Log of corrected over plain sd: 0.1 is ten per cent.
        sd_se: Its standard error.
    """

    mean: np.ndarray
    mean_se: np.ndarray
    sd: np.ndarray
    sd_se: np.ndarray

    def worst(self) -> np.ndarray:
        """The larger of the two moves."""
        return np.maximum(np.abs(self.mean), np.abs(self.sd))

    def at_most(self, z: float) -> np.ndarray:
        """What the moves may be, `z` standard errors above what they seem to be."""
        return np.maximum(np.abs(self.mean) + z * self.mean_se, np.abs(self.sd) + z * self.sd_se)

    def at_least(self, z: float | np.ndarray) -> np.ndarray:
        """What the larger move is beyond `z` standard errors; negative where it may be nothing."""
        return np.maximum(np.abs(self.mean) - z * self.mean_se, np.abs(self.sd) - z * self.sd_se)

    def apart(self, other: Shifts, z: float) -> np.ndarray:
        """By how much two corrections disagree beyond `z` standard errors."""
        return np.maximum(
            np.abs(self.mean - other.mean) - z * np.hypot(self.mean_se, other.mean_se),
            np.abs(self.sd - other.sd) - z * np.hypot(self.sd_se, other.sd_se),
        )


def flattened(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers of all sites side by side, `{site: [S, *shape]} -> [S, n]`, as floats."""
    columns = [draws.reshape(len(draws), -1).astype(float) for draws in values.values()]
    return np.concatenate(columns, axis=1)


def scale_of(
    flat: np.ndarray, indicator: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of draws `[S, n]`; an sd of 0 where a number is constant up to rounding.

    Args:
        flat: The draws.
        indicator: Which columns are indicators of states, `[n]`: their sds are at least 0.1.
    """
    mean, sd = flat.mean(0), flat.std(0)
    sd = np.where(sd <= _CONSTANT * np.abs(mean), 0.0, sd)
    return mean, sd if indicator is None else np.where(indicator, np.maximum(sd, _LEAST_SD), sd)


def by_weights(flat: np.ndarray, smoothed: Psis, indicator: np.ndarray | None = None) -> Shifts:
    """Moves by importance weights, on the draws themselves: what both means share cancels.

    The errors are those of a self-normalised ratio (delta method), and shrink with the spread of the
    weights: even weights move nothing, for certain.

    Args:
        flat: Draws of q, `[S, n]`.
        smoothed: Their smoothed weights.
        indicator: Which columns are indicators of states, `[n]`.
    """
    mean, sd = scale_of(flat, indicator)
    moving = sd > 0
    x = (flat - mean) / np.where(moving, sd, 1.0)
    # [S, 1], with mean 1.
    w = (np.exp(smoothed.log_weights) * len(x))[:, None]
    shift = (w * x).mean(0)
    ratio = np.maximum((w * (x - shift) ** 2).mean(0), _LEAST)
    spread = w * ((x - shift) ** 2 - ratio)
    unit = _in_own_sds(shift / ratio, indicator)
    mean_se = _error(w * (x - shift) - x - 0.5 * unit * spread)
    ratio_se = _error(spread - ratio * (x**2 - 1.0))
    return _in_sds(moving, shift, mean_se, ratio, ratio_se, indicator)


def by_chains(
    first: np.ndarray,
    second: np.ndarray,
    plain: np.ndarray,
    indicator: np.ndarray | None = None,
) -> Shifts:
    """Moves by Markov chains, which are independent of each other.

    Args:
        first: Each chain's average of ``(x - mean) / sd``, with mean and sd of q: `[C, n]`.
        second: Its average of the squares.
        plain: Draws of q `[S, n]`, whose mean and sd have errors too.
        indicator: Which columns are indicators of states, `[n]`.
    """
    mean, sd = scale_of(plain, indicator)
    moving = sd > 0
    x = (plain - mean) / np.where(moving, sd, 1.0)
    shift = first.mean(0)
    ratio = np.maximum(second.mean(0) - shift**2, _LEAST)
    spread = second - 2.0 * shift * first
    unit = _in_own_sds(shift / ratio, indicator)
    mean_se = np.hypot(_error(first - 0.5 * unit * spread), _error(x))
    ratio_se = np.hypot(_error(spread), ratio * _error(x**2))
    return _in_sds(moving, shift, mean_se, ratio, ratio_se, indicator)


def _in_own_sds(value: np.ndarray, indicator: np.ndarray | None) -> np.ndarray:
    """What comes of dividing by the corrected sd, as probabilities are not: zero there."""
    return value if indicator is None else np.where(indicator, 0.0, value)


def _in_sds(
    moving: np.ndarray,
    shift: np.ndarray,
    shift_se: np.ndarray,
    ratio: np.ndarray,
    ratio_se: np.ndarray,
    indicator: np.ndarray | None,
) -> Shifts:
    """From plain sds, and ratios of variances, to what `Shifts` has; nothing where nothing moves."""
    if indicator is not None:
        ratio, ratio_se = np.where(indicator, 1.0, ratio), np.where(indicator, 0.0, ratio_se)
    root = np.sqrt(ratio)
    parts = shift / root, shift_se / root, 0.5 * np.log(ratio), 0.5 * ratio_se / ratio
    return Shifts(*(np.where(moving, part, 0.0) for part in parts))


def _error(influence: np.ndarray) -> np.ndarray:
    """Standard error of a mean over the rows of `[S, n]`."""
    return influence.std(0) / math.sqrt(len(influence))


class Columns:
    """n numbers as m columns: continuous ones as they are, discrete ones by indicators of their states.

    Of two states one indicator says all.

    Args:
        flat: Draws of the numbers, `[S, n]`.
        discrete: Which are discrete, `[n]`.

    Attributes:
        number: The number that each column is of, `[m]`.
        state: The state that it indicates, `[m]`; NaN for a column that is a number as it is.
    """

    def __init__(self, flat: np.ndarray, discrete: np.ndarray) -> None:
        states = [
            _states(flat[:, i]) if discrete[i] else np.array([np.nan]) for i in range(len(discrete))
        ]
        if sum(map(len, states)) > max(_COLUMNS, len(states)):
            states = [
                found if len(found) == 1 else _commonest(flat[:, i], found)
                for i, found in enumerate(states)
            ]
        sizes = [len(found) for found in states]
        self.number = np.repeat(np.arange(len(states)), sizes)
        self.state = np.concatenate(states) if states else np.zeros(0)

    @property
    def indicator(self) -> np.ndarray:
        """Which columns are indicators, `[m]`."""
        return ~np.isnan(self.state)

    def __call__(self, flat: np.ndarray) -> np.ndarray:
        """The columns of draws of the numbers, `[S, n] -> [S, m]`."""
        if not self.indicator.any():
            return flat
        columns = flat[:, self.number]
        return np.where(self.indicator, columns == self.state, columns)

    def labels(self, numbers: Sequence[str]) -> list[str]:
        """What each column is called, ``z[2] = 1`` where it indicates a state."""
        pairs = zip(self.number, self.state, strict=True)
        return [numbers[int(i)] if np.isnan(s) else f"{numbers[int(i)]} = {s:g}" for i, s in pairs]

    def worst(self, severity: np.ndarray) -> np.ndarray:
        """The column of the highest severity `[m]` of each number, `[n]`."""
        order = np.lexsort((severity, self.number))
        last = np.searchsorted(self.number[order], np.arange(self.number[-1] + 1), side="right") - 1
        return order[last]


def _states(draws: np.ndarray) -> np.ndarray:
    """The states of one number that get a column each; NaN where it is judged as it is."""
    found = np.unique(draws)
    if len(found) > _STATES:
        return np.array([np.nan])
    # The last of two says what the first does, and the only one may not be the posterior's only one.
    return found[-1:] if len(found) <= 2 else found


def _commonest(draws: np.ndarray, states: np.ndarray) -> np.ndarray:
    counts = [(draws == state).sum() for state in states]
    return states[[int(np.argmax(counts))]]


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

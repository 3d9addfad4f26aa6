"""Discrete numbers as what they are judged by: the probability of each of their states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A number of more states than these is judged by its mean and sd, as a continuous one.
_STATES = 20
# Columns that states may have; where there would be more, its commonest state stands for a number.
_COLUMNS = 4000


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

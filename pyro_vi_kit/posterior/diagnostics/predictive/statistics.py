"""What is compared of a data set with those that the model makes, by the kind of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.posterior.diagnostics.observations import Kind

# Of many data sets `[S, n]` at once: `[S]`.
Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]
# A user's, of one data set.
Function: TypeAlias = Callable[[np.ndarray], Any]

_MOST_CLASSES = 6


def _skewness(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (centred**3).mean(-1) / spread**3, 0.0)


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def _sd(values: np.ndarray) -> np.ndarray:
    return values.std(-1)


def _min(values: np.ndarray) -> np.ndarray:
    return values.min(-1)


def _max(values: np.ndarray) -> np.ndarray:
    return values.max(-1)


def _zeros(values: np.ndarray) -> np.ndarray:
    return (values == 0).mean(-1)


def _switches(values: np.ndarray) -> np.ndarray:
    """Neighbours that differ: what dependence between neighbouring data changes."""
    return (np.diff(values, axis=-1) != 0).sum(-1).astype(float)


def _mean_direction(part: Callable[[np.ndarray], np.ndarray]) -> Statistic:
    return lambda values: part(values).mean(-1)


def _resultant(values: np.ndarray) -> np.ndarray:
    return np.hypot(np.cos(values).mean(-1), np.sin(values).mean(-1))


_MOMENTS = {"mean": _mean, "sd": _sd, "min": _min, "max": _max, "skewness": _skewness}

DEFAULTS: Mapping[Kind, Mapping[str, Statistic]] = {
    "real": _MOMENTS,
    "positive": _MOMENTS,
    "count": {"mean": _mean, "sd": _sd, "share of zeros": _zeros, "max": _max},
    "binary": {"share of ones": _mean, "switches": _switches},
    "angle": {
        "mean cosine": _mean_direction(np.cos),
        "mean sine": _mean_direction(np.sin),
        "resultant length": _resultant,
    },
}


def defaults(kind: Kind, observed: np.ndarray) -> Mapping[str, Statistic]:
    """The statistics that suit a kind of data.

    Args:
        kind: What the values are.
        observed: The data, `[n]`: of classes, the commonest are counted.
    """
    if kind != "category":
        return DEFAULTS[kind]
    classes, counts = np.unique(observed, return_counts=True)
    common = np.sort(classes[np.argsort(-counts, kind="stable")[:_MOST_CLASSES]])
    return {f"share of {value:g}": _share(value) for value in common}


def _share(value: float) -> Statistic:
    return lambda values: (values == value).mean(-1)


def apply(name: str, function: Function, data: np.ndarray) -> np.ndarray:
    """A user's statistic of each data set `[S, ...]`: `[S]`.

    Raises:
        OptionError: If it cannot be called, raises, or gives no number.
    """
    if not callable(function):
        raise OptionError(
            f"statistic {name!r} must be a function of an array, got {type(function).__name__}"
        )
    found = np.empty(len(data))
    for i, one in enumerate(data):
        try:
            value = np.asarray(function(one), dtype=float)
        except Exception as error:
            raise OptionError(
                f"statistic {name!r} raised {type(error).__name__} on an array of shape {one.shape}: "
                f"{error}"
            ) from error
        if value.size != 1:
            raise OptionError(
                f"statistic {name!r} must give one number for a data set, got shape {value.shape}"
            )
        found[i] = value.item()
    return found

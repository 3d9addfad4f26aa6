"""Moments of draws as a table, one row per number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.metrics import interval, mcse_mean

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def summarise(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    verdicts: Sequence[str],
    prob: float,
    verdict: str = "",
) -> pd.DataFrame:
    """Mean, sd, equal-tailed interval and Monte Carlo error of the mean.

    Args:
        values: Independent draws by site, `[S, *shape]`.
        dims: Names of each site's dims.
        coords: Names along those dims.
        verdicts: Level of each number, in the order of the rows; none where there are none.
        prob: Mass of the interval.
        verdict: What the table is printed under, and has in its ``attrs``.
    """
    from pyro_vi_kit.posterior.diagnostics.verdict_frame import HeadedFrame

    tail = 50.0 * (1.0 - prob)
    rows: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        # Numbers with draws that are not finite have no moments, which the verdict says in words.
        finite = np.asarray(np.isfinite(given).all(0))
        draws = np.where(finite, given, 0.0)
        low, high = interval(draws, prob)
        columns = {
            "mean": draws.mean(0),
            "sd": draws.std(0, ddof=1) if len(draws) > 1 else np.zeros(draws.shape[1:]),
            f"{tail:g}%": low,
            f"{100 - tail:g}%": high,
            "mcse_mean": mcse_mean(draws),
        }
        for index, label in labels(name, draws.shape[1:], dims.get(name, ()), coords):
            rows[label] = {
                key: float(np.asarray(column)[index]) if finite[index] else np.nan
                for key, column in columns.items()
            }
            rows[label]["verdict"] = str(verdicts[len(rows) - 1]) if len(verdicts) else ""
    frame = HeadedFrame.from_dict(rows, orient="index")
    frame.attrs["verdict"] = verdict
    return frame


def labels_of(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> tuple[list[str], list[str]]:
    """Label and site of each number of all sites, in the order of the rows of a summary.

    Args:
        values: Draws by site, `[S, *shape]`.
        dims: Names of each site's dims.
        coords: Names along those dims.
    """
    found, sites = [], []
    for name, draws in values.items():
        mine = [label for _, label in labels(name, draws.shape[1:], dims.get(name, ()), coords)]
        found += mine
        sites += [name] * len(mine)
    return found, sites


def labels_in(array: xr.DataArray) -> list[str]:
    """Label of each number of a site in an ArviZ object, `[chain, draw, *shape]`."""
    dims = [str(dim) for dim in array.dims[2:]]
    coords = {dim: list(array[dim].to_numpy()) for dim in dims if dim in array.coords}
    return [label for _, label in labels(str(array.name), array.shape[2:], dims, coords)]


def labels(
    name: str,
    shape: tuple[int, ...],
    dims: Sequence[str],
    coords: Mapping[str, Sequence[Any]],
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Index and label, as ``theta[Choate]``, of each number of a site."""
    for index in np.ndindex(*shape):
        parts = [
            _word(coords[dim][i]) if dim in coords and len(coords[dim]) == size else str(i)
            for dim, i, size in zip(dims or [""] * len(shape), index, shape, strict=False)
        ]
        yield index, f"{name}[{', '.join(parts)}]" if parts else name


def _word(label: Any) -> str:
    """A coordinate's label in words; of a time that is a day, the day."""
    if isinstance(label, np.datetime64 | datetime):
        exact = np.asarray(label, dtype="datetime64[us]")
        return str(exact).removesuffix("T00:00:00.000000")
    return str(label)

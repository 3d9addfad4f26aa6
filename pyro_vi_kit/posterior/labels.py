"""What each number of each site is called, as ``theta[Choate]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


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

"""What is left out: one observation, or all that a row of a plate holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.posterior.diagnostics.observations import Observation

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class Units:
    """The units that are left out in turn.

    Attributes:
        dims: Names of their dims.
        kept: Which of them hold anything that is not masked, `[*dims]`.
        sites: The observed sites whose log densities a unit sums.
    """

    dims: tuple[str, ...]
    kept: np.ndarray
    sites: tuple[str, ...]


def units(observed: Sequence[Observation], plate: str | None) -> Units:
    """The units of these sites.

    Args:
        observed: One site or more.
        plate: Whose rows are left out as a whole; single observations when None.

    Raises:
        OptionError: If there are no units to tell apart, or the sites have no common ones.
        UnknownNameError: If no observed site is in such a plate.
    """
    scaled = [o.name for o in observed if o.scaled]
    if scaled:
        raise OptionError(
            f"site {scaled[0]!r} is scaled by poutine.scale, so that an observation counts for more or "
            "less than one: fit the model without the scale to leave observations out"
        )
    dims = {o.name: _batch_dims(o) for o in observed}
    if plate is not None:
        return _of_plate(observed, dims, plate)
    first = next(iter(dims.values()))
    if any(other != first for other in dims.values()):
        choices = " or ".join(f"sites={name!r} {list(d)}" for name, d in dims.items())
        raise OptionError(
            f"the observed sites have different dims: choose {choices}, or name a plate that they have "
            "in common, plate=..."
        )
    if not first:
        raise OptionError(
            f"site {observed[0].name!r} is one observation as a whole, so that nothing can be left out: "
            "put the data into a pyro.plate instead of .to_event() or one site each"
        )
    return Units(first, np.logical_or.reduce([o.seen for o in observed]), tuple(dims))


def log_likelihood_of(
    chosen: Units,
    values: Mapping[str, np.ndarray],
    observed: Sequence[Observation],
    coords: Mapping[str, Sequence[Any]],
) -> xr.DataArray:
    """The log likelihood of each unit, dims (chain, draw, *units).

    Units that are masked as a whole are left out; where that leaves no rectangle, or where a site has no
    name for its rows, units lie along one dim.

    Args:
        chosen: The units.
        values: Log likelihoods by site, `[chain, draw, *batch]`, nats.
        observed: The sites.
        coords: Names along dims.
    """
    import xarray as xr

    total: np.ndarray = np.zeros((1, 1))
    for observation in observed:
        dims = _batch_dims(observation)
        summed = tuple(2 + i for i, dim in enumerate(dims) if dim not in chosen.dims)
        total = total + values[observation.name].sum(axis=summed)
    sizes = zip(chosen.dims, chosen.kept.shape, strict=True)
    labels = {dim: list(coords.get(dim, range(size))) for dim, size in sizes}
    lead = {"chain": np.arange(total.shape[0]), "draw": np.arange(total.shape[1])}
    if chosen.kept.all():
        return xr.DataArray(total, lead | labels, ("chain", "draw", *chosen.dims), "log_likelihood")
    places = np.argwhere(chosen.kept)
    name = chosen.dims[0] if len(chosen.dims) == 1 else "_".join(chosen.dims)
    names = [
        [labels[dim][i] for dim, i in zip(chosen.dims, place, strict=True)] for place in places
    ]
    plain = [n[0] if len(n) == 1 else ", ".join(map(str, n)) for n in names]
    kept = total[:, :, chosen.kept]
    return xr.DataArray(kept, lead | {name: plain}, ("chain", "draw", name), "log_likelihood")


def _of_plate(
    observed: Sequence[Observation], dims: Mapping[str, tuple[str, ...]], plate: str
) -> Units:
    inside = [o for o in observed if plate in dims[o.name]]
    if not inside:
        known = {dim for names in dims.values() for dim in names}
        raise UnknownNameError("plate of the observed sites", plate, known)
    outside = [o.name for o in observed if o not in inside]
    if outside:
        raise OptionError(
            f"site {outside[0]!r} is not in plate {plate!r}: choose the sites that are, "
            f"sites={[o.name for o in inside]}"
        )
    kept = []
    for observation in inside:
        own = dims[observation.name]
        other = tuple(i for i, dim in enumerate(own) if dim != plate)
        kept.append(observation.seen.any(axis=other))
    return Units((plate,), np.logical_or.reduce(kept), tuple(o.name for o in inside))


def _batch_dims(observation: Observation) -> tuple[str, ...]:
    return observation.dims[: observation.seen.ndim]

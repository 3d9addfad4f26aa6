"""Whether a model says the same of some rows of a plate as it says of them among all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, first_line
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.density import Density
from pyro_vi_kit.model.log_density.structure import Plate, Site
from pyro_vi_kit.model.log_density.visits import Visit

_SEED = 20264


def require_subsamplable(density: Density, sizes: Mapping[Plate, int]) -> None:
    """Refuse minibatches that would be of another model.

    The terms of some rows, at some point, have to be those that these rows have among all: what a model
    does with a plate's indices cannot be read off it, but it can be tried. Where it does nothing with
    them, the rows of its arguments are tried in their place, and taken if they do.

    Args:
        density: The model.
        sizes: B of each plate that is to be subsampled.

    Raises:
        ModelError: If a site does not follow the indices of its plate, or mixes its rows.
    """
    for plate in sizes:
        _require_outermost(density, plate)
    with RandomStream(_SEED):
        index = {
            plate.name: density.cast(torch.randperm(plate.size, device="cpu")[:size])
            for plate, size in sizes.items()
        }
    z = density.trial(_SEED)
    some = {name: rows_of(density.structure.sites[name], value, index) for name, value in z.items()}
    trial = _Trial(density, z, some, index)
    density.slice_arguments({})
    refusal = trial.refusal()
    for plates in _ways_to_slice(density, sizes) if refusal is not None else []:
        density.slice_arguments(plates)
        if trial.refusal() is None:
            return
    density.slice_arguments({})
    if refusal is not None:
        raise refusal


@dataclass(frozen=True)
class _Trial:
    """One unconstrained point, with all rows of the plates and with some.

    Attributes:
        density: The model.
        z: The point.
        some: Some rows of it.
        index: Which ones, by plate.
    """

    density: Density
    z: Mapping[str, Tensor]
    some: Mapping[str, Tensor]
    index: Mapping[str, Tensor]

    def refusal(self) -> ModelError | None:
        """Why the terms of some rows are not those that they have among all; None where they are."""
        said = ""
        try:
            with torch.no_grad():
                if self._same_terms():
                    return None
        except ModelError as error:
            return error
        except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
            said = first_line(error)
        return ModelError(_told(self._blamed(), self.index, said))

    def _same_terms(self) -> bool:
        whole = self.density.terms(self.z)
        part = self.density.terms(self.some, index=self.index)
        if not _close(whole.shared, part.shared) or whole.local.keys() != part.local.keys():
            return False
        return all(
            _close(rows[:, self.index[name]] if name in self.index else rows, part.local[name])
            for name, rows in whole.local.items()
        )

    def _blamed(self) -> str:
        """The first site that differs, or that could not be reached."""
        whole, _ = self.density.visits(self.z)
        part, ended = self.density.visits(self.some, self.index)
        for name, visit in whole.items():
            if name not in part:
                return name
            site = self.density.structure.sites[name]
            told = visit.kind in ("latent", "observed", "factor")
            if told and not _agrees(site, visit, part[name], self.index):
                return name
        return ended or next(reversed(whole))


def _ways_to_slice(density: Density, sizes: Mapping[Plate, int]) -> list[dict[str, int]]:
    """Plates whose rows the arguments may hold: one of them, or all."""
    lengths = {len(tensor) for tensor in density.data if tensor.dim()}
    fitting = {plate.name: plate.size for plate in sizes if plate.size in lengths}
    ways = [{name: size} for name, size in fitting.items()]
    distinct = len(set(fitting.values())) == len(fitting)
    return [*ways, fitting] if len(fitting) > 1 and distinct else ways


def rows_of(site: Site, value: Tensor, index: Mapping[str, Tensor]) -> Tensor:
    """Unconstrained values `[K, *batch, *event]` of a site on the rows of a minibatch."""
    for plate in site.plates:
        if plate.name in index:
            axis = 1 + len(site.batch_shape) + plate.dim
            value = value.index_select(axis, index[plate.name])
    return value


def _require_outermost(density: Density, plate: Plate) -> None:
    for site in density.structure.sites.values():
        if plate in site.plates and site.plates[0] != plate:
            raise ModelError(
                f"plate {plate.name!r} lies inside plate {site.plates[0].name!r} (site {site.name!r}), "
                "so that its rows are no data of their own: subsample the outer plate, "
                f"batch_size={{{site.plates[0].name!r}: ...}}"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    return agree(a, b, 1e-8, 1e-3) and not bool(a.isnan().any())


def _agrees(site: Site, visit: Visit, other: Visit, index: Mapping[str, Tensor]) -> bool:
    whole = visit.unscaled()
    try:
        part = other.unscaled()
    except (RuntimeError, ValueError):
        # All rows of the data meet a distribution of some.
        return False
    for plate in site.plates:
        if plate.name in index and whole.dim() >= -plate.dim and whole.shape[plate.dim] > 1:
            whole = whole.index_select(whole.dim() + plate.dim, index[plate.name])
    return _close(whole, part)


def _told(name: str, index: Mapping[str, Tensor], said: str = "") -> str:
    plates = " and ".join(repr(plate) for plate in index)
    plate = next(iter(index))
    return (
        f"minibatches of plate {plates} cannot be taken: site {name!r} does not follow the plate's "
        f"indices{f' ({said})' if said else ''}. Index what belongs to a row, as in `with "
        f"pyro.plate({plate!r}, N) as i: pyro.sample(..., obs=y[i])`, or take pyro.subsample(y, "
        "event_dim=0); a model whose rows depend on each other needs all of them"
    )

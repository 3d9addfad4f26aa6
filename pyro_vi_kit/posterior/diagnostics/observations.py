"""What a model observed, site by site: values, what masks hide of them, and what kind they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.model.groups import dims_of, squeeze
from pyro_vi_kit.model.log_density import Density, Site
from pyro_vi_kit.model.log_density.supports import innermost
from pyro_vi_kit.model.log_density.visits import Visit

Kind = Literal["real", "positive", "angle", "count", "binary", "category"]


@dataclass(frozen=True, eq=False)
class Observation:
    """One observed site.

    Attributes:
        site: It.
        value: What was observed, in the site's own shape `[*batch, *event]`.
        shown: Which numbers of it count, of the same shape: False where a mask hides them.
        dims: Names of its dims.
        kind: What the values are.
        scaled: Whether `poutine.scale` makes an observation count for more or less than one.
    """

    site: Site
    value: np.ndarray
    shown: np.ndarray
    dims: tuple[str, ...]
    kind: Kind
    scaled: bool

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def seen(self) -> np.ndarray:
        """Which observations count for anything, `[*batch]`."""
        event = len(self.site.event_shape)
        return np.asarray(
            self.shown.any(axis=tuple(range(self.shown.ndim - event, self.shown.ndim)))
        )

    def kept(self, values: np.ndarray) -> np.ndarray:
        """What counts of data sets `[S, *batch, *event]`.

        All of it where nothing is masked, `[S, n, *event]` where whole observations are, and the numbers
        `[S, n]` where parts of them are.
        """
        if self.shown.all():
            return values
        batch = self.seen
        event = self.shown.shape[batch.ndim :]
        whole = batch.reshape(*batch.shape, *(1,) * len(event))
        if not np.array_equal(np.broadcast_to(whole, self.shown.shape), self.shown):
            return values.reshape(len(values), -1)[:, self.shown.ravel()]
        return values.reshape(len(values), -1, *event)[:, batch.ravel()]


def observations(
    density: Density, sites: str | Sequence[str] | None = None, *, factors: bool = False
) -> list[Observation]:
    """Observed sites in the model's order; those that a mask hides wholly are left out.

    Args:
        density: The model.
        sites: Which; all when None, factors in plates only where nothing is observed.
        factors: Whether factors in plates can be named, whose values are nothing.

    Raises:
        OptionError: If the model has none, or its data are streamed.
        UnknownNameError: If a name is no observed site.
    """
    if density.streamed is not None:
        raise OptionError(
            "the data of this model are streamed, and its rows are not in memory: check a fit to a part "
            "of the data that is"
        )
    visits, _ = density.visits(density.somewhere())
    structure = density.structure
    chosen = structure.likelihood if factors else structure.of_kind("observed")
    found = [_observation(density, visits[site.name]) for site in chosen]
    known = {one.name: one for one in found if one.shown.any()}
    if not known:
        raise OptionError(
            f"model {density.model.name!r} has no observed site: give the data to pyro.sample(..., "
            "obs=). What goes into pyro.factor cannot be drawn anew, and told apart only in a pyro.plate"
        )
    if not sites:
        own = [one for one in known.values() if one.site.kind == "observed"]
        return own or list(known.values())
    return _named(known, {sites} if isinstance(sites, str) else set(sites))


def _named(known: Mapping[str, Observation], names: set[str]) -> list[Observation]:
    if not names <= set(known):
        raise UnknownNameError("observed site", min(names - set(known)), known)
    return [one for name, one in known.items() if name in names]


def data_kind_of(fn: Any) -> Kind:
    """What a distribution's values are, by its support."""
    base = innermost(fn)
    try:
        support = fn.support
    except NotImplementedError:  # a distribution of the user's own
        return "real"
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(base, dist.VonMises):
        return "angle"
    if isinstance(base, dist.Categorical | dist.OneHotCategorical):
        return "category"
    if isinstance(base, dist.Bernoulli):
        return "binary"
    if support.is_discrete:
        return "count"
    bound = getattr(support, "lower_bound", None)
    whole = bound is not None and getattr(support, "upper_bound", None) is None
    return "positive" if whole and bool((torch.as_tensor(bound) == 0).all()) else "real"


def _observation(density: Density, visit: Visit) -> Observation:
    site = density.structure.sites[visit.name]
    shape = site.batch_shape + site.event_shape
    factor = site.kind == "factor"
    given = visit.value.new_zeros(shape) if factor else visit.value.expand(shape)
    value = squeeze(site, given[None])[0]
    counted = squeeze(site, visit.shown(site.batch_shape, site.event_shape)[None])[0]
    scaled = bool((torch.as_tensor(visit.scale) != 1).any())
    dims = tuple(dims_of(density.model, site))
    kind = "real" if factor else data_kind_of(visit.fn)
    return Observation(site, value, counted, dims, kind, scaled)

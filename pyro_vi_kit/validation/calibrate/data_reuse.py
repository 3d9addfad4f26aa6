"""Whether data can be simulated from a model, and such data in the place of its own.

What is drawn at the observed sites is drawn from the model only where it uses its data there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.visits import Visit
from pyro_vi_kit.model.model import Model

Values = Mapping[str, Tensor]

_ARGUMENT = "simulated_data"
# Of the values of a series that another argument also holds: more is no chance, it is the series.
_SHARED = 0.5
_ENOUGH = 5


def require_generative(density: Density) -> SimulatedData:
    """Refuse what is no recipe for data: improper priors, factors, learned parameters, and so on.

    Returns:
        What puts simulated data into the model.

    Raises:
        ModelError: Naming the site and the remedy.
    """
    name = density.model.name
    if density.streamed is not None:
        raise ModelError(
            f"{name!r} streams its data, and calibration simulates them as a whole: give it a "
            "part of them in memory, vi.Model(fn, x, y)"
        )
    if density.params:
        raise ModelError(
            f"parameter {next(iter(density.params))!r} is learned and has no prior to draw it from: "
            "make it a latent with pyro.sample, or a fixed number"
        )
    improper = next((site.name for site in density.latents if site.improper), None)
    if improper is not None:
        raise ModelError(
            f"the prior of latent {improper!r} is improper and cannot be drawn from: give it a proper "
            "one, wide if you like, such as dist.Normal(0, 10)"
        )
    factor = next((site.name for site in density.structure.of_kind("factor")), None)
    if factor is not None:
        raise ModelError(
            f"factor {factor!r} changes the density but draws nothing, so that data cannot be "
            "simulated: write it as pyro.sample(..., dist, obs=data)"
        )
    if not density.observed:
        raise ModelError(
            f"{name!r} has no observed site, so that there are no data to simulate: write them as "
            "pyro.sample(..., dist, obs=data)"
        )
    visits, _ = density.visits(density.somewhere())
    for visit in visits.values():
        _require_plain(visit, visits)
    return SimulatedData(density)


def _require_plain(visit: Visit, visits: Mapping[str, Visit]) -> None:
    """Refuse a site whose density is not that of what is drawn there."""
    if visit.kind == "deterministic":
        if visit.counts and visit.unscaled().any():
            raise ModelError(
                f"site {visit.name!r} is a Delta with a log_density, which no draw of the model shows: "
                "calibrate the model without it"
            )
        return
    if not isinstance(visit.scale, int | float) or visit.scale != 1:
        raise ModelError(
            f"the density of site {visit.name!r} is scaled (poutine.scale), so that it is not that of "
            "what is drawn there: calibrate the model without the scale"
        )
    stem = visit.name.removesuffix("_unobserved")
    if stem != visit.name and f"{stem}_observed" in visits:
        raise ModelError(
            f"site {stem!r} is observed in part (obs_mask=), and its latents have no prior of their own "
            "in the rows that are: calibrate the model on the rows that are complete, without obs_mask="
        )
    masked = visit.mask is False or isinstance(visit.mask, Tensor)
    if visit.kind != "observed" and masked:
        raise ModelError(
            f"latent {visit.name!r} is masked, so that its density is not that of what is drawn there: "
            "calibrate the model without the mask"
        )


class _Given:
    """A model whose observed sites have the values of one more keyword argument."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)

    def __call__(self, *args: Any, simulated_data: Values, **kwargs: Any) -> Any:
        # Inside of what reads the sites, and outside of what the model does.
        with poutine.condition(data=dict(simulated_data)):
            return self.fn(*args, **kwargs)


class SimulatedData:
    """Puts data into a model: into its arguments where these are the data, else at its observed sites.

    Args:
        density: The model.

    Attributes:
        by_argument: Whether the data are arguments of the model, so that it needs no handler.
        example: The model on its own data, as `with_values` gives it.

    Raises:
        ModelError: If the model uses its data elsewhere than at its observed sites.
    """

    def __init__(self, density: Density) -> None:
        self.model = density.model
        leaves, _ = self._flat()
        self._places = _places(density, leaves)
        self.by_argument = False
        conditioned = self.with_values(density.observed)
        held = Density(conditioned, dtype=density.dtype, device=density.device)
        _require_one_use(density, held, leaves, self._places)
        self.by_argument = self._is_by_argument(density)
        self.example = self.with_values(density.observed)

    def with_values(self, values: Values) -> Model:
        """The model on these values of its observed sites, `{site: [*batch, *event]}`."""
        args, kwargs = self._arguments(lambda name, leaf: values[name].to(leaf))
        if self.by_argument:
            return self.model.with_args(*args, **kwargs)
        return Model(
            _Given(self.model.fn),
            *args,
            kwargs={**kwargs, _ARGUMENT: dict(values)},
            coords=self.model.coords,
            dims=self.model.dims,
            name=self.model.name,
        )

    def _flat(self) -> tuple[list[Any], Any]:
        """The model's arguments as a list, and what makes them of it; not kept, to be sent elsewhere."""
        return tree_flatten((self.model.args, dict(self.model.kwargs)))

    def _arguments(self, value: Callable[[str, Tensor], Tensor]) -> Any:
        """Positional and keyword arguments, with other values for the sites that are arguments."""
        leaves, spec = self._flat()
        for name, position in self._places.items():
            leaves[position] = value(name, leaves[position])
        return tree_unflatten(leaves, spec)

    def _is_by_argument(self, density: Density) -> bool:
        """Whether the sites observe what their arguments hold, also where these hold other values."""
        if set(self._places) != set(density.observed):
            return False
        args, kwargs = self._arguments(lambda name, leaf: _turned(leaf))
        try:
            found = density.observations(self.model.with_args(*args, **kwargs))
        except Exception:  # noqa: BLE001  whatever a model does with such data, the handler will do
            return False
        leaves = tree_flatten((args, kwargs))[0]
        return all(
            torch.equal(found[name], density.cast(leaves[position]).to(found[name]))
            for name, position in self._places.items()
        )


def _places(density: Density, leaves: list[Any]) -> dict[str, int]:
    """The argument that each observed site's values are, where there is one."""
    places: dict[str, int] = {}
    for name, value in density.observed.items():
        for position, leaf in enumerate(leaves):
            if (
                isinstance(leaf, Tensor)
                and position not in places.values()
                and leaf.shape == value.shape
                and torch.equal(density.cast(leaf).to(value), value)
            ):
                places[name] = position
                break
    return places


def _require_one_use(
    density: Density, held: Density, leaves: list[Any], places: Mapping[str, int]
) -> None:
    """Refuse a model in which data also enter elsewhere: as lags, or in a prior.

    Args:
        density: The model.
        held: The model with its observed sites held at their values, whatever its arguments.
        leaves: The model's arguments, flat.
        places: The argument that each observed site's values are, where there is one.

    Raises:
        ModelError: Naming the site and the argument.
    """
    model = density.model
    named = [*zip(model.argument_names, model.args, strict=True), *model.kwargs.items()]
    names = [name for name, value in named for _ in tree_flatten(value)[0]]
    sites = {position: name for name, position in places.items()}
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for position, leaf in enumerate(tensors):
        site = sites.get(leaf)
        # A site's own values are data; so are numbers that an observed value is made of.
        data = torch.ones_like(held.data[position], dtype=torch.bool)
        used = _matters(held, position, data if site else _reaching(density, position))
        if site is None:
            site = _copied(density, leaves[leaf])
            used = used or site is not None
        if used:
            site = site or next(iter(density.observed))
            raise ModelError(
                f"argument {names[leaf]!r} holds data of site {site!r}, and the model uses them "
                "elsewhere too (as lags of a series, in a prior, as a mask): what is drawn at the site "
                "alone is not drawn from the model. Take what is used from the statement itself, "
                f"`y = pyro.sample({site!r}, ..., obs=y)`, in a series one time after another"
            )


def _reaching(density: Density, position: int) -> Tensor:
    """Which numbers of an argument an observed value is made of, by derivatives; of integers none."""
    leaf = density.data[position].detach().clone()
    nothing = torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device)
    if not leaf.is_floating_point():
        return nothing
    data = [*density.data[:position], leaf.requires_grad_(), *density.data[position + 1 :]]
    with torch.enable_grad():
        values = density.observations(data, attached=True).values()
        total = sum((v.sum() for v in values if v.is_floating_point()), torch.zeros(()))
        if not total.requires_grad:
            return nothing
        (slope,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return nothing if slope is None else slope != 0


def _matters(held: Density, position: int, entries: Tensor) -> bool:
    """Whether others of these numbers change the log joint though the observed values are held.

    They are values of the same kind, each second one twice and in the opposite order, so that neither
    their mean nor their signs are the same; continuous ones move besides, since all may be zero.
    """
    if not bool(entries.any()):
        return False
    leaf = held.data[position]
    own = leaf[entries]
    other = own[torch.arange(len(own), device=own.device) // 2].flip(0)
    changed = leaf.clone()
    changed[entries] = 0.9 * other + 0.05 if own.is_floating_point() else other
    with RandomStream(20265):
        z = held.cast(0.3 * torch.randn(1, held.dim, dtype=held.dtype, device="cpu"))
    data = [*held.data[:position], changed, *held.data[position + 1 :]]
    with torch.no_grad():
        return not torch.equal(held.log_prob(z), held.log_prob(z, data=data))


def _turned(values: Tensor) -> Tensor:
    """Other data of the same kind: the values in the opposite order."""
    return values.flatten().flip(0).reshape(values.shape)


def _copied(density: Density, leaf: Tensor) -> str | None:
    """The observed site whose values an argument holds, shifted or sorted; None where it holds none."""
    if not leaf.is_floating_point():
        return None
    for name, value in density.observed.items():
        distinct = torch.unique(value)
        # Whole numbers may well be equal by chance.
        telling = value.is_floating_point() and not torch.equal(distinct, distinct.round())
        if not telling or len(distinct) < max(_ENOUGH, 0.9 * value.numel()):
            continue
        if float(torch.isin(distinct, density.cast(leaf).to(value)).double().mean()) > _SHARED:
            return name
    return None

"""Draws and data under the names that the model gives them: the groups of an ArviZ object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import ModelError, UnknownNameError, first_line
from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density, Site
from pyro_vi_kit.model.model import Model

Values = dict[str, Tensor]
Arrays = dict[str, np.ndarray]

_CHUNK_NUMBERS = 4_000_000
# Purpose of the seed of what is drawn given the latents, discrete sites and data alike: the same
# everywhere, so that all groups of one seed go with each other.
GIVEN_DRAWS = "given draws"


def chunks_of(total: int, width: int) -> list[int]:
    """How many of so many points are evaluated at a time, so that memory stays bounded.

    Args:
        total: How many there are.
        width: Numbers that one point makes, roughly.
    """
    size = max(1, _CHUNK_NUMBERS // max(width, 1))
    return [min(size, total - i) for i in range(0, total, size)]


def in_chunks(function: Callable[[Values], Values], z: Mapping[str, Tensor], width: int) -> Values:
    """Apply ``function`` to K points a few at a time, so that memory stays bounded.

    Args:
        function: From points to `{name: [k, ...]}`.
        z: `{site: [K, ...]}`.
        width: Numbers that one point makes, roughly.
    """
    sizes = chunks_of(len(next(iter(z.values()))), width)
    pieces = zip(*(value.split(sizes) for value in z.values()), strict=True)
    parts = [function(dict(zip(z, piece, strict=True))) for piece in pieces]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def width_of(density: Density) -> int:
    """Numbers that one particle makes in the model, roughly: data, observations and latents.

    Or those of the largest tensor where discrete latents hold all their values.
    """
    return max(density.width, density.largest)


def shares_outside(
    density: Density, z: Values, params: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Which share of K points leaves the domain of a distribution, by site and what does, in words."""

    def found(part: Values) -> Values:
        flags = density.outside(part, params)
        return {f"site {site!r}: {what}": where for (site, what), where in flags.items()}

    flags = in_chunks(found, z, width_of(density))
    return {what: float(where.double().mean()) for what, where in flags.items() if where.any()}


def squeeze(site: Site, value: Tensor) -> np.ndarray:
    """A value `[K, *batch, *event]` in the site's own shape, without the dims that no plate made."""
    batch = value.dim() - 1 - len(site.event_shape)
    plates = {plate.dim for plate in site.plates}
    stray = [1 + i for i in range(batch) if value.shape[1 + i] == 1 and i - batch not in plates]
    return value.detach().cpu().numpy().squeeze(axis=tuple(stray))


def dims_of(model: Model, site: Site, *, unconstrained: bool = False) -> list[str]:
    """Names of a site's dims after `squeeze`: plates, then what ``dims=`` says, then numbered ones."""
    shape = site.batch_shape + site.event_shape
    event = len(site.event_shape)
    if unconstrained and site.unconstrained_shape != shape:
        shape, event = site.unconstrained_shape, site.unconstrained_event_dim
        given: Sequence[str] = ()
        stem = f"{site.name}_unconstrained"
    else:
        given, stem = model.dims.get(site.name, ()), site.name
    batch = len(shape) - event
    plates = {plate.dim: plate.name for plate in site.plates}
    kept = [i for i in range(batch) if shape[i] != 1 or i - batch in plates]
    names = [plates.get(i - batch, f"{stem}_dim_{k}") for k, i in enumerate(kept)]
    names += [f"{stem}_dim_{len(kept) + k}" for k in range(event)]
    if len(given) == len(names):
        return list(given)
    if given and len(given) != event:
        raise ModelError(
            f"dims[{site.name!r}] names {len(given)} dimension(s); the site has {event} event "
            f"dimension(s) and {len(names)} in all"
        )
    return names[: len(kept)] + list(given) if given else names


def sampled(
    density: Density,
    values: Mapping[str, Tensor],
    chains: int,
    *,
    unconstrained: bool = False,
) -> Group:
    """A group of draws: `{site: [chains * draws, ...]}` as `[chain, draw, ...]` with dims.

    Sites that ``density`` does not know, as those of a prediction, get numbered dims.
    """
    variables, dims = {}, {}
    for name, value in values.items():
        site = density.structure.sites.get(name)
        if site is None:
            array = value.detach().cpu().numpy()
        else:
            array = squeeze(site, value)
            dims[name] = dims_of(density.model, site, unconstrained=unconstrained)
        variables[name] = by_chain(array, chains)
    return Group(variables, dims)


def by_chain(array: np.ndarray, chains: int) -> np.ndarray:
    """`[chains * draws, ...]` as `[chain, draw, ...]`; a site may have no numbers."""
    return array.reshape(chains, len(array) // chains, *array.shape[1:])


def model_groups(
    density: Density,
    z: Mapping[str, Tensor],
    *,
    chains: int = 1,
    params: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    prior_draws: int = 500,
) -> dict[str, Group]:
    """Every group that follows from unconstrained draws and the model.

    Args:
        density: The model.
        z: Unconstrained draws `{site: [chains * draws, *batch, *event]}`, one chain after another.
        chains: How many chains the draws are of.
        params: Unconstrained learned parameters.
        seed: Of the discrete, predictive and prior draws.
        prior_draws: Draws of the prior groups; left out where a prior is improper.

    Returns:
        posterior, unconstrained_posterior, posterior_predictive, log_likelihood, prior,
        prior_predictive, observed_data and constant_data, those that the model has. Predictive and
        prior groups are left out where a distribution cannot be sampled; of a streamed model, whatever
        has a row for each datum is.
    """
    with RandomStream(seed, GIVEN_DRAWS):  # for discrete sites
        values = in_chunks(lambda part: density.constrain(part, params), z, width_of(density))
    outside = {name: value for name, value in z.items() if name not in density.inside}
    groups = {
        "posterior": sampled(density, values, chains),
        "unconstrained_posterior": sampled(density, outside, chains, unconstrained=True),
    }
    if density.streamed is None:
        groups |= _groups_given_data(density, z, chains, params, seed)
    groups |= prior_groups(density, prior_draws, params=params, seed=seed)
    return groups if density.streamed is not None else groups | data_groups(density)


def _groups_given_data(
    density: Density,
    z: Mapping[str, Tensor],
    chains: int,
    params: Mapping[str, Tensor] | None,
    seed: int,
) -> dict[str, Group]:
    """Predictions and log densities of what was observed."""
    groups = {}
    observed = [site.name for site in density.structure.of_kind("observed")]
    if observed:
        try:
            with RandomStream(seed, GIVEN_DRAWS):
                simulated = in_chunks(
                    lambda part: density.simulate(part, params=params), z, width_of(density)
                )
        except ModelError as error:
            density.give_up(f"No posterior_predictive group: {first_line(error)}")
        else:
            predictive = {name: simulated[name] for name in observed}
            groups["posterior_predictive"] = sampled(density, predictive, chains)
    if density.structure.likelihood:
        found = log_likelihood(density, z, chains, params, seed, own=observed)
        groups["log_likelihood"] = _without_hidden(density, found)
    return groups


def log_likelihood(
    density: Density,
    z: Mapping[str, Tensor],
    chains: int = 1,
    params: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    own: Sequence[str] = (),
) -> Group:
    """The log density of each observation, nats; arguments as `model_groups` has them.

    ``own`` are the sites that are wanted, all of the likelihood's where there is none.
    """
    with RandomStream(seed, GIVEN_DRAWS):  # for discrete sites
        values = in_chunks(lambda part: density.log_likelihood(part, params), z, width_of(density))
    return by_observation(density, {n: v for n, v in values.items() if not own or n in own}, chains)


def by_observation(density: Density, values: Mapping[str, Tensor], chains: int) -> Group:
    """One number per observation: the observed site's dims without its event dims.

    Args:
        density: The model.
        values: `{site: [chains * draws, *batch]}`.
        chains: How many chains the draws are of.
    """
    variables, dims = {}, {}
    for name, value in values.items():
        site = density.structure.sites[name]
        names = dims_of(density.model, site)
        dims[name] = names[: len(names) - len(site.event_shape)]
        batch_only = value.reshape(*value.shape, *(1,) * len(site.event_shape))
        array = squeeze(site, batch_only)
        array = array.reshape(array.shape[: array.ndim - len(site.event_shape)])
        variables[name] = by_chain(array, chains)
    return Group(variables, dims)


def prior_groups(
    density: Density,
    draws: int,
    *,
    params: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Group]:
    """Draws from the prior and of the data under it; none where a prior cannot be sampled."""
    if any(site.improper for site in density.latents):
        return {}
    try:
        with RandomStream(seed, "prior"):
            values = density.simulate(None, params=params, draws=draws)
    except ModelError as error:
        density.give_up(f"No prior groups: {first_line(error)}")
        return {}
    values = {n: v for n, v in values.items() if n not in density.inside}
    observed = {site.name for site in density.structure.of_kind("observed")} & set(values)
    inner = {name: value for name, value in values.items() if name not in observed}
    groups = {"prior": sampled(density, inner, 1)}
    if observed:
        outer = {name: value for name, value in values.items() if name in observed}
        groups["prior_predictive"] = sampled(density, outer, 1)
    return groups


def data_groups(density: Density) -> dict[str, Group]:
    """What was observed, and the other tensors that the model was given."""
    model, groups = density.model, {}
    variables, dims = {}, {}
    for name, value in density.observed.items():
        site = density.structure.sites[name]
        variables[name] = squeeze(site, value.unsqueeze(0))[0]
        dims[name] = dims_of(model, site)[-variables[name].ndim :] if variables[name].ndim else []
    if variables:
        groups["observed_data"] = _without_hidden(density, Group(variables, dims, sampled=False))
    constants = _constants(density)
    if constants:
        dims = {name: _argument_dims(density, name, array) for name, array in constants.items()}
        groups["constant_data"] = Group(constants, dims, sampled=False)
    return groups


def _without_hidden(density: Density, group: Group) -> Group:
    """The group with NaN in the place of what a mask hides of its observed sites."""
    if density.streamed is not None:
        return group
    visits, _ = density.visits(density.somewhere())
    variables = dict(group.variables)
    for name, values in variables.items():
        site = density.structure.sites[name]
        counted = squeeze(site, visits[name].shown(site.batch_shape, site.event_shape)[None])[0]
        if group.sampled:  # a number for each whole observation
            event = range(counted.ndim - len(site.event_shape), counted.ndim)
            counted = counted.any(axis=tuple(event))
        if not counted.all():
            real = values if values.dtype.kind == "f" else values.astype(float)
            variables[name] = np.where(counted, real, np.nan)
    return replace(group, variables=variables)


def _constants(density: Density) -> Arrays:
    """Tensors among the arguments that are not observed values, by argument name."""
    model = density.model
    args, kwargs = density.arguments()
    arguments = dict(zip(model.argument_names, args, strict=True)) | dict(kwargs)
    constants: Arrays = {}
    for name, argument in arguments.items():
        leaves = [leaf for leaf in tree_flatten(argument)[0] if isinstance(leaf, Tensor)]
        for i, leaf in enumerate(leaves):
            seen = any(
                leaf.shape == value.shape and torch.equal(leaf, value.to(leaf.dtype))
                for value in density.observed.values()
            )
            if not seen:
                label = name if len(leaves) == 1 else f"{name}_{i}"
                constants[label] = leaf.detach().cpu().numpy()
    return constants


def _argument_dims(density: Density, name: str, array: np.ndarray) -> list[str]:
    """Names an argument's dims after the one plate of their length; ``dims=`` goes first."""
    given: Sequence[Any] = density.model.dims.get(name, ())
    if len(given) == array.ndim:
        return list(given)
    names: list[str] = []
    for i, length in enumerate(array.shape):
        matches = [p.name for p in density.structure.plates.values() if p.size == length]
        unique = len(matches) == 1 and matches[0] not in names
        names.append(matches[0] if unique else f"{name}_dim_{i}")
    return names


def require_names(density: Density) -> None:
    """Refuse ``dims=`` and ``coords=`` that name nothing or do not fit, before any work.

    Raises:
        UnknownNameError: If a name is that of no site, argument or dimension; names the nearest.
        ModelError: If a dimension has another length than its ``coords``.
    """
    model, structure = density.model, density.structure
    args, kwargs = density.arguments()
    sites = structure.of_kind("latent", "discrete", "deterministic", "observed")
    constants = _constants(density)
    named = [
        *(site.name for site in sites),
        *model.argument_names[: len(args)],
        *kwargs,
        *constants,
    ]
    for name in model.dims:
        if name not in named:
            raise UnknownNameError("dims= name", name, dict.fromkeys(named))
    lengths: dict[str, tuple[int, str]] = {}
    for site in sites:
        for dim, length in zip(dims_of(model, site), _own_shape(site), strict=True):
            lengths.setdefault(dim, (length, f"site {site.name!r}"))
    for name, array in constants.items():
        for dim, length in zip(_argument_dims(density, name, array), array.shape, strict=True):
            lengths.setdefault(dim, (length, f"argument {name!r}"))
    for dim, labels in model.coords.items():
        if dim not in lengths:
            raise UnknownNameError("coords= dimension", dim, lengths)
        length, where = lengths[dim]
        # Of streamed data an example is at hand, whose plate is as long as a batch.
        if len(labels) != length and not (density.streamed and dim in structure.plates):
            raise ModelError(
                f"coords[{dim!r}] holds {len(labels)} names, and dimension {dim!r} of {where} has "
                f"length {length}: give one name for each position"
            )


def _own_shape(site: Site) -> list[int]:
    """A site's shape after `squeeze`."""
    plates, batch = {plate.dim for plate in site.plates}, len(site.batch_shape)
    kept = [n for i, n in enumerate(site.batch_shape) if n != 1 or i - batch in plates]
    return [*kept, *site.event_shape]


def coords_of(model: Model, groups: Mapping[str, Group]) -> dict[str, Sequence[Any]]:
    """The model's coordinates for the dims that the groups have."""
    used = {dim for group in groups.values() for dims in group.dims.values() for dim in dims}
    return {dim: values for dim, values in model.coords.items() if dim in used}

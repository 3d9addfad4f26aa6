"""Whether a model uses its data at its observed sites alone, so that drawing them there draws all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density

# Of the values of a series that another argument also holds: more is no chance, it is the series.
_SHARED = 0.5
_ENOUGH = 5


def require_one_use(
    density: Density, given: Density, leaves: list[Any], places: Mapping[str, int]
) -> None:
    """Refuse a model in which data also enter elsewhere: as lags, or in a prior.

    Args:
        density: The model.
        given: The model with its observed values as further data, held at its sites.
        leaves: The model's arguments, flat.
        places: The argument that each observed site's values are, where there is one.

    Raises:
        ModelError: Naming the site and the argument.
    """
    names = _names(density)
    sites = {position: name for name, position in places.items()}
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for position, leaf in enumerate(tensors):
        site = sites.get(leaf)
        used = _reaches_more(density, given, position)
        if site is not None:
            used = used or _matters(given, position)
        else:
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


def _names(density: Density) -> list[str]:
    """The argument that each leaf belongs to."""
    model = density.model
    named = [*zip(model.argument_names, model.args, strict=True), *model.kwargs.items()]
    return [name for name, value in named for _ in tree_flatten(value)[0]]


def _reaches_more(density: Density, given: Density, position: int) -> bool:
    """Whether numbers of an argument that reach an observed value also reach the rest of the model.

    By derivatives: of the observed values, and of the log joint where these are held.
    """

    def total(data: list[Tensor]) -> Tensor:
        values = density.observations(data, attached=True).values()
        return sum((v.sum() for v in values if v.is_floating_point()), torch.zeros(()))

    def log_joint(data: list[Tensor]) -> Tensor:
        return given.log_prob(_point(given), data=data).sum()

    observed = _influence(total, density.data, position)
    if not bool(observed.any()):
        return False
    return bool((observed & _influence(log_joint, given.data, position)).any())


def _influence(
    function: Callable[[list[Tensor]], Tensor], data: list[Tensor], position: int
) -> Tensor:
    """Which numbers of one of the data tensors have a derivative."""
    leaf = data[position].detach().clone()
    nothing = torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device)
    if not leaf.is_floating_point():
        return nothing
    with torch.enable_grad():
        value = function([*data[:position], leaf.requires_grad_(), *data[position + 1 :]])
        if not value.requires_grad:
            return nothing
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return nothing if slope is None else slope != 0


def _matters(given: Density, position: int) -> bool:
    """Whether other numbers in an argument change the log joint though the observed values are held."""
    leaf = given.data[position]
    other = leaf.flatten().flip(0).reshape(leaf.shape)
    data = [*given.data[:position], other, *given.data[position + 1 :]]
    z = _point(given)
    with torch.no_grad():
        return not torch.equal(given.log_prob(z), given.log_prob(z, data=data))


def _point(density: Density) -> Tensor:
    with RandomStream(20265):
        return density.cast(0.3 * torch.randn(1, density.dim, dtype=density.dtype, device="cpu"))


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

"""What a model is made of: its sites, plates and learned parameters, found by running it twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import ImproperUniform
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

from pyro_vi_kit.density.handlers import Kind, Replay, Visit, subsample_indices
from pyro_vi_kit.errors import ModelError


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: `dim` counts from the right and is negative, `size` is the full size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True, eq=False)
class Site:
    """One sample site.

    Attributes:
        name: The site's name.
        kind: latent, observed, deterministic, factor or discrete.
        batch_shape: Batch shape on the full data.
        event_shape: Event shape.
        plates: The vectorised plates around it, the outermost first.
        unconstrained_shape: Shape in unconstrained space, batch dims first; empty for other kinds.
        transform: Unconstrained to constrained, or None where it changes with other latents or is
            made of data, and so has to be rebuilt at each run.
        improper: Whether the prior is an `ImproperUniform`.
        fn_name: Name of the distribution's class.
    """

    name: str
    kind: Kind
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    unconstrained_shape: torch.Size
    transform: Any
    improper: bool
    fn_name: str

    @property
    def data_plate(self) -> Plate | None:
        """The plate whose local term the site belongs to: the outermost one around it."""
        return self.plates[0] if self.plates else None

    @property
    def unconstrained_event_dim(self) -> int:
        """How many of the unconstrained dims, from the right, are not batch dims."""
        return len(self.unconstrained_shape) - len(self.batch_shape)


@dataclass(frozen=True)
class Parameter:
    """A learned parameter (`pyro.param`, `pyro.module`, `PyroModule`).

    Attributes:
        name: Pyro's name of it.
        value: Unconstrained value at the time of the first run, a copy.
        constraint: Its constraint.
        owner: The module that holds it, if one does.
        attribute: Its name in that module.
    """

    name: str
    value: Tensor
    constraint: Any
    owner: nn.Module | None
    attribute: str


@dataclass(frozen=True)
class Structure:
    """Sites in the model's order, plates by name, learned parameters by name."""

    sites: dict[str, Site]
    plates: dict[str, Plate]
    parameters: dict[str, Parameter]
    subsampled: dict[str, int]

    def of_kind(self, *kinds: Kind) -> list[Site]:
        """The sites of these kinds, in the model's order."""
        return [site for site in self.sites.values() if site.kind in kinds]


def discover(run: Callable[[Replay], None]) -> tuple[Structure, dict[str, Visit]]:
    """Find a model's structure from two runs at different values of its latents.

    Args:
        run: Runs the model under the given handler, with the user's data.

    Returns:
        The structure, and the visits of the second run.

    Raises:
        ModelError: If the two runs meet different sites or shapes, or a site's support cannot be
            unconstrained.
    """
    seen: dict[str, int] = {}
    with subsample_indices({}, seen):
        first, second = Replay(fill=torch.zeros), Replay(fill=_leaf_normals())
        run(first)
        run(second)
    _require_same(first.visits, second.visits)
    sites = {name: _site(visit) for name, visit in second.visits.items()}
    plates = {plate.name: plate for site in sites.values() for plate in site.plates}
    structure = Structure(
        sites=sites,
        plates=plates,
        parameters=_parameters(second),
        subsampled={name: size for name, size in seen.items() if name in plates},
    )
    return structure, second.visits


def _leaf_normals() -> Callable[[torch.Size], Tensor]:
    """Small normal values that require gradients, so that what depends on them can be told."""
    generator = torch.Generator().manual_seed(20260)

    def fill(shape: torch.Size) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).requires_grad_()

    return fill


def _require_same(first: dict[str, Visit], second: dict[str, Visit]) -> None:
    """Refuse a model whose sites change with its latents' values."""
    if list(first) != list(second):
        changed = sorted(set(first) ^ set(second)) or list(second)
        raise ModelError(
            f"the model's structure changes with its latents' values: site(s) {', '.join(changed)} "
            "are not met in every run. Write the choice as a mixture, a mask or torch.where, or pass "
            "a Pyro guide of your own as guide= with engine='pyro'."
        )
    for name, visit in second.items():
        if first[name].value.shape != visit.value.shape:
            raise ModelError(
                f"site {name!r} has shape {tuple(first[name].value.shape)} in one run and "
                f"{tuple(visit.value.shape)} in the next: shapes must not depend on latents."
            )


def _site(visit: Visit) -> Site:
    latent = visit.kind == "latent"
    plates = tuple(
        Plate(frame.name, int(frame.dim or 0), int(frame.full_size or frame.size))
        for frame in visit.frames
    )
    batch_shape, event_shape = visit.fn.batch_shape, visit.fn.event_shape
    if visit.kind == "deterministic" and visit.value.shape != batch_shape + event_shape:
        # Without event_dim, Pyro counts every dim of a deterministic value as an event dim, plates
        # included; the value's own shape says where the plates are.
        shape = visit.value.shape
        plates = tuple(p for p in plates if len(shape) >= -p.dim and shape[p.dim] == p.size)
        batch_shape, event_shape = (shape, shape[:0]) if plates else (shape[:0], shape)
    return Site(
        name=visit.name,
        kind=visit.kind,
        batch_shape=batch_shape,
        event_shape=event_shape,
        plates=plates,
        unconstrained_shape=visit.unconstrained.shape  # type: ignore[union-attr]
        if latent
        else torch.Size(),
        transform=biject_to(visit.fn.support) if latent and _is_fixed(visit.fn.support) else None,
        improper=isinstance(_innermost(visit.fn), ImproperUniform),
        fn_name=type(_innermost(visit.fn)).__name__,
    )


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        fn = fn.base_dist
    return fn


def _is_fixed(support: Any) -> bool:
    """Whether a support is the same at every run: it holds no tensor but plain scalars."""
    for value in vars(support).values():
        if isinstance(value, Tensor):
            if value.requires_grad or value.numel() != 1:
                return False
        elif hasattr(value, "check"):
            if not _is_fixed(value):
                return False
        elif isinstance(value, list | tuple) and any(
            hasattr(part, "check") and not _is_fixed(part) for part in value
        ):
            return False
    return True


def _parameters(replay: Replay) -> dict[str, Parameter]:
    """Copies of the learned parameters; the user's own are never trained in place."""
    store = pyro.get_param_store()
    found = {}
    for name, visit in replay.param_visits.items():
        if visit.owner is not None:
            tensor = visit.owner._parameters[visit.attribute]
            assert tensor is not None
        else:
            # The run has put it into the store, from its initial value or from what was there.
            tensor = transform_to(visit.constraint).inv(store[name])
        value = tensor.detach().clone()
        found[name] = Parameter(name, value, visit.constraint, visit.owner, visit.attribute)
    return found

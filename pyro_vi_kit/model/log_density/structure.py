"""What a model is made of: sites, plates, learned parameters; and how latents lie in flat vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_vi_kit.model.log_density.handlers import Replay
from pyro_vi_kit.model.log_density.supports import bijector, innermost
from pyro_vi_kit.model.log_density.visits import Kind, Visit


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
        states: S of a discrete latent that is not summed out, whose unconstrained value is a weight for
            each state, `[..., S]`; 0 for any other site.
    """

    name: str
    kind: Kind
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    unconstrained_shape: torch.Size
    transform: Any
    improper: bool
    states: int = 0

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
    """Sites in the model's order, plates by name, learned parameters by name.

    Attributes:
        sites: Sites by name.
        plates: Vectorised plates by name.
        parameters: Learned parameters by name.
        subsampled: The subsample size of each plate that declares one.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    parameters: dict[str, Parameter]
    subsampled: dict[str, int]

    def of_kind(self, *kinds: Kind) -> list[Site]:
        """The sites of these kinds, in the model's order."""
        return [site for site in self.sites.values() if site.kind in kinds]

    @property
    def likelihood(self) -> list[Site]:
        """Observed sites, and factors in plates, each of which is what the model says of some row."""
        seen = self.of_kind("observed", "factor")
        return [site for site in seen if site.kind == "observed" or site.plates]


def structure_of(replay: Replay, at_hand: frozenset[str] = frozenset()) -> Structure:
    """What a run met; plates whose rows are at hand are as long as these."""
    sites = {name: _site(visit, at_hand) for name, visit in replay.visits.items()}
    plates = {plate.name: plate for site in sites.values() for plate in site.plates}
    declared = {name: size for name, size in replay.declared.items() if name in plates}
    return Structure(sites, plates, parameters_of(replay), declared)


def _event_of(value: torch.Size, event: torch.Size) -> torch.Size:
    """The event shape of data: a hidden Markov model of no length of its own says 1 for any length."""
    own = torch.Size(value[len(value) - len(event) :])
    longer = len(own) == len(event) and all(n in (1, m) for n, m in zip(event, own, strict=True))
    return own if longer else event


def _site(visit: Visit, at_hand: frozenset[str]) -> Site:
    latent = visit.kind == "latent" and visit.choice is None
    batch_shape, event_shape, plates = _shapes(visit, at_hand)
    return Site(
        name=visit.name,
        kind=visit.kind,
        batch_shape=batch_shape,
        event_shape=event_shape,
        plates=plates,
        unconstrained_shape=torch.Size()
        if visit.unconstrained is None
        else visit.unconstrained.shape,
        transform=bijector(visit.name, visit.fn)
        if latent and _is_fixed(visit.fn.support)
        else None,
        improper=is_improper(visit.fn),
        states=0 if visit.choice is None else len(visit.choice.states),
    )


def _shapes(
    visit: Visit, at_hand: frozenset[str]
) -> tuple[torch.Size, torch.Size, tuple[Plate, ...]]:
    """Batch shape, event shape and plates of a site."""
    plates = tuple(
        Plate(
            frame.name,
            int(frame.dim or 0),
            int(frame.size if frame.name in at_hand else frame.full_size or frame.size),
        )
        for frame in visit.frames
    )
    shape = visit.value.shape
    # A user's own distribution may have lists.
    batch_shape, event_shape = torch.Size(visit.fn.batch_shape), torch.Size(visit.fn.event_shape)
    if visit.kind == "factor":
        event_shape = torch.Size()  # Pyro's value of a factor has no elements
    if visit.kind == "observed":
        event_shape = _event_of(shape, event_shape)
    if visit.kind == "deterministic" and shape != batch_shape + event_shape:
        # Without event_dim, Pyro counts every dim of a deterministic value as an event dim, plates
        # included; the value's own shape says where the plates are.
        plates = tuple(p for p in plates if len(shape) >= -p.dim and shape[p.dim] == p.size)
        batch_shape, event_shape = (shape, torch.Size()) if plates else (torch.Size(), shape)
    return batch_shape, event_shape, plates


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an improper uniform."""
    return isinstance(innermost(fn), ImproperUniform)


def _is_fixed(support: Any) -> bool:
    """Whether a support is the same at every run: it holds no tensor but plain scalars."""
    if isinstance(support, Tensor):
        return not support.requires_grad and support.numel() == 1
    if isinstance(support, list | tuple):
        return all(_is_fixed(part) for part in support if hasattr(part, "check"))
    held = vars(support).values() if hasattr(support, "check") else ()
    return all(map(_is_fixed, held))


def parameters_of(replay: Replay) -> dict[str, Parameter]:
    """Copies of the learned parameters; the user's own are never trained in place."""
    found = {}
    for name, visit in replay.param_visits.items():
        tensor = visit.owner._parameters[visit.attribute] if visit.owner is not None else None
        if tensor is None and visit.value is not None:
            tensor = transform_to(visit.constraint).inv(visit.value)
        if tensor is not None:
            value = tensor.detach().clone()
            found[name] = Parameter(name, value, visit.constraint, visit.owner, visit.attribute)
    return found


@dataclass(frozen=True)
class Block:
    """Latent sites that share one distribution of the guide.

    Attributes:
        name: What the guide calls it.
        sites: Its latents, in the model's order.
        plate: None for a global block of `D` numbers; else the data plate, for rows of `d` numbers,
            one per datum.
    """

    name: str
    sites: tuple[Site, ...]
    plate: Plate | None = None

    @property
    def dim(self) -> int:
        """Numbers in the block: D for all, or d for each datum."""
        return sum(prod(self.rest(site)) for site in self.sites)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Split `[K, D]`, or `[K, B, d]`, into `{site: [K, *batch, *event]}`, unconstrained."""
        values, start = {}, 0
        for site in self.sites:
            rest = self.rest(site)
            size = prod(rest)
            part = flat[..., start : start + size].reshape(*flat.shape[:-1], *rest)
            if self.plate is not None:
                part = torch.movedim(part, 1, 1 + self.axis(site))
            values[site.name] = part
            start += size
        return values

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            if self.plate is None:
                parts.append(value.reshape(value.shape[0], -1))
            else:
                rows = torch.movedim(value, 1 + self.axis(site), 1)
                parts.append(rows.reshape(*rows.shape[:2], -1))
        return torch.cat(parts, -1)

    def labels(self) -> list[tuple[str, int]]:
        """Site name and position in the flattened site, for each number of the block."""
        return [(site.name, i) for site in self.sites for i in range(prod(self.rest(site)))]

    def axis(self, site: Site) -> int:
        """Where the data plate lies among the site's dims, counted from the left."""
        return len(site.batch_shape) + (self.plate.dim if self.plate is not None else 0)

    def rest(self, site: Site) -> tuple[int, ...]:
        """Unconstrained shape of a site in the block: of all of it, or of one datum's part."""
        shape = list(site.unconstrained_shape)
        if self.plate is not None:
            del shape[self.axis(site)]
        return tuple(shape)


def global_block(sites: Sequence[Site]) -> Block:
    """One block for all these latents."""
    return Block("latent", tuple(sites))

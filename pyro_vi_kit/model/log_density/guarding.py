"""Which sites of a model can leave the domain of their distribution, found by looking far out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ViError
from pyro_vi_kit.model.log_density.handlers import Visit

# A site, and what leaves its constraint there, in words.
Key = tuple[str, str]

# Distances from the start in unconstrained space (the origin where none is given), some points at each:
# from where a fit begins to what is beyond any prior. Exponentials overflow on the way, which is no way
# out of a domain.
_RADII = (0.5, 2.0, 8.0, 30.0, 300.0, 1e4)
_POINTS = 6
# Of all points together, in numbers of the model.
_NUMBERS = 4_000_000
_SEED = 20265


class Evaluated(Protocol):
    """What is asked of a `Density` here."""

    batching: Any
    block: Any
    dim: int
    start: Any

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor in its precision and on its device."""
        ...

    def within(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values whose weights of states are on the simplex."""
        ...

    def outside(self, z: Any) -> dict[Key, Tensor]:
        """Which of K points leave the domain of a distribution, `[K]`, by site and what does."""
        ...


def sites_that_leave(density: Evaluated, width: int) -> dict[str, str]:
    """What leaves its constraint at some of a few dozen points, in words, by site.

    Args:
        density: The model.
        width: Numbers that one point makes in the model, roughly.
    """
    each = max(1, min(_POINTS, _NUMBERS // (len(_RADII) * max(width, 1))))
    if density.batching == "loop":
        each = 1
    generator = torch.Generator().manual_seed(_SEED)
    radii = torch.tensor(_RADII, dtype=torch.float64).repeat_interleave(each)
    normal = torch.randn(len(radii), density.dim, generator=generator, dtype=torch.float64)
    points = density.cast(radii[:, None] * normal)
    z = density.block.unpack(points if density.start is None else density.start + points)
    return dict(_anywhere(density, density.within(z)))


def _anywhere(density: Evaluated, z: Mapping[str, Tensor]) -> set[Key]:
    """What holds at some of these points."""
    try:
        flags = density.outside(z)
        return {key for key, where in flags.items() if bool(where.any())}
    except ViError:
        raise
    except Exception:  # noqa: BLE001  a model may raise far out; the other points are asked one by one
        points = len(next(iter(z.values())))
        if points == 1:
            return set()
        single = [{name: value[k : k + 1] for name, value in z.items()} for k in range(points)]
        return set().union(*(_anywhere(density, point) for point in single))


def flags(visits: Mapping[str, Visit], exempt: frozenset[str]) -> dict[Key, Tensor]:
    """Whether, in one run, something leaves its constraint.

    Args:
        visits: The run's sites.
        exempt: Those made with ``validate_args=False``.
    """
    found: dict[Key, Tensor] = {}
    for visit in visits.values():
        if visit.kind != "deterministic" and visit.name not in exempt:
            for what, outside in _of(visit):
                key = (visit.name, what)
                found[key] = found[key] | outside if key in found else outside
    return found


def _of(visit: Visit) -> list[tuple[str, Tensor]]:
    """What can leave its constraint at a site, and whether it does where nothing hides it."""
    if visit.mask is False:
        return []
    wheres = [(bound.what, bound.margin < 0) for bound in visit.bounds()]
    if isinstance(visit.mask, Tensor):
        wheres = [(what, where & visit.mask) for what, where in wheres]
    return [(what, where.any()) for what, where in wheres]

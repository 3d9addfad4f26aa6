"""Guides for minibatches: latents inside the subsampled plates get numbers of their own, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides.discrete import by_plate, drawing
from pyro_vi_kit.guides.families import Family, PointMass
from pyro_vi_kit.guides.local.local import LocalFamily, Table
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.guides.spec import REGISTRY, GuideSpec
from pyro_vi_kit.model.log_density import Block, Density, Plate

_DRAWS = 10_000
_SEED = 7031


def per_datum(spec: object, density: Density, plates: Sequence[Plate]) -> Guide:
    """A guide whose latents in these plates are stored row by row, and the others as usual.

    A step then needs, and moves, the rows of its minibatch alone. Given the globals, rows are
    independent in it: ``"full_rank"`` is one normal for the globals and one for each datum.

    Args:
        spec: The configured guide.
        density: The model.
        plates: Plates that steps see some rows of, with latents inside them.

    Raises:
        OptionError: If the guide has no form for a single datum.
    """
    if not isinstance(spec, GuideSpec) or spec.per_datum is None:
        known = ", ".join(name for name, cls in REGISTRY.items() if cls.per_datum is not None)
        name = spec.name if isinstance(spec, GuideSpec) else type(spec).__name__
        raise OptionError(
            f"batch_size= with latents inside plate {plates[0].name!r} needs guide='amortized' or one "
            f"of {known}, which have a form for a single datum; got {told(name)}"
        )
    if spec.discrete is not None:
        density = drawing(density, spec.discrete)
    inside = {
        plate: tuple(s for s in density.latents if s.plates and s.plates[0] == plate)
        for plate in plates
    }
    spec.family(1)  # refuses, before all else, what it cannot be without knowing sites
    # Drawn discrete sites have tables wherever they are.
    inside |= {plate: sites for plate, sites in by_plate(density).items() if plate not in inside}
    return spec.with_tables(density, inside, spec.per_datum)


def tabulated(guide: Guide, plates: Sequence[Plate] | None = None) -> Guide:
    """A copy of a guide whose encoders are replaced by tables of what they say of each row.

    Where an encoder sees the draws of the globals, the table holds what it says at their mean.

    Args:
        guide: A trained guide.
        plates: The plates whose encoders are replaced; all when None.
    """
    blocks: dict[Block, Family] = {}
    for block in guide.blocks:
        family = copy.deepcopy(guide.families[block.name])
        wanted = block.plate is not None and (plates is None or block.plate in plates)
        if isinstance(family, LocalFamily) and family.table is None and wanted:
            family = LocalFamily(_as_table(guide, block, family), family.head)
        blocks[block] = family  # type: ignore[assignment]
    return guide.of_families(blocks)


@torch.no_grad()
def _as_table(guide: Guide, block: Block, family: LocalFamily) -> nn.Module:
    rows = guide.rows(block)
    if family.conditioned:
        mean: Any = mean_of_globals(guide)
        rows = torch.cat([rows, mean.expand(len(rows), -1)], -1)
    return Table(family.source(rows))


@torch.no_grad()
def mean_of_globals(guide: Guide) -> Tensor | None:
    """The mean of q's global block, unconstrained `[D]`; None where nothing is global.

    Of a flow, which has no mean in closed form, that of 10,000 draws, always the same.
    """
    shared = [block.name for block in guide.blocks if block.plate is None]
    if not shared:
        return None
    family: Any = guide.families[shared[0]]
    distribution = family()
    try:
        return distribution.mean
    except NotImplementedError:
        with RandomStream(_SEED):
            return distribution.sample((_DRAWS,)).mean(0)


def held_at_mean(guide: Guide) -> Guide:
    """A copy of a guide whose globals are a point, the mean of what they were.

    Its log weights are those of the local latents given that point, but for a constant in their shared
    part.
    """
    blocks: dict[Block, Family] = {}
    mean = mean_of_globals(guide)
    for block in guide.blocks:
        family: Any = copy.deepcopy(guide.families[block.name])
        if block.plate is None and mean is not None:
            family = PointMass(block.dim)
            family.loc = nn.Parameter(mean.clone(), requires_grad=False)
        blocks[block] = family
    return guide.of_families(blocks)

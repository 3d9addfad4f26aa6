"""Guides for minibatches: latents inside the subsampled plates get numbers of their own, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.guides.discrete import arranged, by_plate, drawing, head_of
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.local.amortized import GlobalSpec
from pyro_vi_kit.guides.local.condition_on_globals import mean_of_globals
from pyro_vi_kit.guides.local.local import LocalFamily, Table, local_name
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.model.log_density import Block, Density, Plate

# What a guide is for a single datum.
_LOCAL = {
    "delta": "delta",
    "mean_field": "mean_field",
    "low_rank": "full_rank",
    "full_rank": "full_rank",
    "student_t": "full_rank",
    "planar": "affine_coupling",
    "radial": "affine_coupling",
    "affine_coupling": "affine_coupling",
    "mixture": "mixture",
    "autoregressive": "affine_coupling",
    "neural_spline": "affine_coupling",
}
_INIT_SCALE = 0.1


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
    name = getattr(spec, "name", type(spec).__name__)
    if name not in _LOCAL or not isinstance(spec, GlobalSpec):
        raise OptionError(
            f"batch_size= with latents inside plate {plates[0].name!r} needs guide='amortized' or one "
            f"of {', '.join(_LOCAL)}, which have a form for a single datum; got {told(name)}"
        )
    discrete = getattr(spec, "discrete", None)
    if discrete is not None:
        density = drawing(density, discrete)
    inside = {
        plate: tuple(s for s in density.latents if s.plates and s.plates[0] == plate)
        for plate in plates
    }
    spec.family(1)  # refuses, before all else, what it cannot be without knowing sites
    # Drawn discrete sites have tables wherever they are.
    inside |= {plate: sites for plate, sites in by_plate(density).items() if plate not in inside}
    local = {site.name for sites in inside.values() for site in sites}
    outside = tuple(site for site in density.latents if site.name not in local)
    blocks: dict[Block, Family] = {}
    if outside:
        shared = Block("global", outside)
        blocks[shared] = spec.family(shared.dim)
    scale = getattr(spec, "init_scale", _INIT_SCALE)
    for plate, sites in inside.items():
        block = Block(local_name(plate, len(inside)), arranged(sites), plate)
        head = head_of(_LOCAL[name], block, discrete)
        numbers = head.initial(scale).expand(plate.size, -1)
        blocks[block] = LocalFamily(Table(numbers), head)
    return Guide(name, density, blocks, point=name == "delta")


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
    return Guide(guide.name, guide.density, blocks, point=guide.point)


@torch.no_grad()
def _as_table(guide: Guide, block: Block, family: LocalFamily) -> nn.Module:
    rows = guide.rows(block)
    if family.conditioned:
        mean: Any = mean_of_globals(guide)
        rows = torch.cat([rows, mean.expand(len(rows), -1)], -1)
    return Table(family.source(rows))

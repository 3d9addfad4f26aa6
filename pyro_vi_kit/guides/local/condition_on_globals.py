"""A guide given its globals: what is left is one distribution per datum."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides.families import Family, PointMass
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.model.log_density import Block

_DRAWS = 10_000
_SEED = 7031


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

"""What masks hide of an observed site."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_kit.model.log_density.handlers import Visit
from pyro_vi_kit.model.log_density.structure import Site

WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


def shown(visit: Visit, site: Site) -> Tensor:
    """What neither `poutine.mask` nor the masks in the distribution hide, `[*batch, *event]`."""
    shape = site.batch_shape + site.event_shape
    seen = torch.ones(shape, dtype=torch.bool, device=visit.value.device)
    masks = [] if visit.mask is None else [(visit.mask, len(site.event_shape))]
    fn = visit.fn
    while type(fn).__name__ in WRAPPERS:
        if type(fn).__name__ == "MaskedDistribution":
            masks.append((fn._mask, min(len(fn.event_shape), len(site.event_shape))))
        fn = fn.base_dist
    for mask, event in masks:
        hides = torch.as_tensor(mask, device=seen.device)
        seen = seen & hides.reshape((*hides.shape, *(1,) * event))
    return seen

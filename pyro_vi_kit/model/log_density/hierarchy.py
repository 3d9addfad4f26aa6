"""Which latents have a prior whose location or scale is another latent: centred hierarchies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Cauchy, Laplace, Normal, StudentT

from pyro_vi_kit.model.log_density.density import Density

# What `pyro.infer.reparam.LocScaleReparam` takes, in any expansion or mask.
_LOCATION_SCALE = (Normal, StudentT, Cauchy, Laplace)


class Centred(NamedTuple):
    """A latent with a location-scale prior that depends on other latents.

    Attributes:
        site: Its name.
        scale: Latents that the scale depends on.
        location: Latents that the location depends on.
    """

    site: str
    scale: tuple[str, ...]
    location: tuple[str, ...]


def centred_sites(density: Density) -> list[Centred]:
    """The latents whose prior's scale or location depends on other latents, in the model's order."""
    with density._runner.isolated(), torch.enable_grad():
        replay = density.leaves()
        density._run(replay)
        leaves = {
            name: visit.unconstrained
            for name, visit in replay.visits.items()
            if visit.kind == "latent" and visit.choice is None and visit.unconstrained is not None
        }
        found = []
        for site in density.latents:
            prior = replay.visits[site.name].fn
            while hasattr(prior, "base_dist") and not isinstance(prior, _LOCATION_SCALE):
                prior = prior.base_dist
            if isinstance(prior, _LOCATION_SCALE):
                others = {name: leaf for name, leaf in leaves.items() if name != site.name}
                scale, location = _behind(prior.scale, others), _behind(prior.loc, others)
                if scale or location:
                    found.append(Centred(site.name, scale, location))
    return found


def _behind(value: Tensor, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The latents that a parameter depends on."""
    if not value.requires_grad or not leaves:
        return ()
    slopes = torch.autograd.grad(
        value.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    pairs = zip(leaves, slopes, strict=True)
    # `LocScaleReparam(0.0)` leaves a scale to the power of zero behind, whose slope is zero.
    return tuple(name for name, slope in pairs if slope is not None and bool(slope.any()))

"""What depends on what in a model, found by trying it at one point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Cauchy, Laplace, Normal, StudentT

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.density import Density
from pyro_vi_kit.model.log_density.structure import Block, Site

_SEED = 4096
# What `pyro.infer.reparam.LocScaleReparam` takes, in any expansion or mask.
_LOCATION_SCALE = (Normal, StudentT, Cauchy, Laplace)


@torch.no_grad()
def rows_apart(density: Density, blocks: Sequence[Block]) -> bool:
    """Whether latents of a plate's row enter the log joint in the terms of that row alone.

    It is tried at one point: every other row of a plate gets other latents, and nothing else may change.

    Args:
        density: The model.
        blocks: Those with a plate are looked at.
    """
    z = density.trial(_SEED)
    before = density.terms(z)
    for block in blocks:
        if block.plate is None:
            continue
        after = density.terms(z | {site.name: _moved(z, block, site) for site in block.sites})
        if not agree(before.shared, after.shared, 1e-9, 1e-4):
            return False
        for plate, rows in before.local.items():
            kept = slice(1, None, 2) if plate == block.plate.name else slice(None)
            if not agree(rows[:, kept], after.local[plate][:, kept], 1e-9, 1e-4):
                return False
    return True


def _moved(z: dict[str, Tensor], block: Block, site: Site) -> Tensor:
    """A site's value with every other row changed."""
    value = z[site.name]
    rows = torch.movedim(value, 1 + block.axis(site), 0).clone()
    rows[::2] = rows[::2].roll(1, -1) if site.states else rows[::2] + 0.25
    return torch.movedim(rows, 0, 1 + block.axis(site))


def require_smooth(density: Density) -> None:
    """Refuse a model that rounds the value of a relaxed discrete site, or uses it as an index.

    The rest of the model has to have a derivative in it wherever its states matter.

    Raises:
        OptionError: With the remedy.
    """
    drawn = density.drawn
    relaxed = [s.name for s in density.latents if s.states and drawn and drawn.of(s.name)]
    if not relaxed:
        return
    z = density.trial(_SEED)
    for name in relaxed:
        weights = z[name].detach().requires_grad_()
        total = _others(density, z | {name: weights}, name)
        slope = None
        if total.requires_grad:
            (slope,) = torch.autograd.grad(total, weights, allow_unused=True)
        if slope is None or not bool((slope != 0).any()):
            whole = [torch.zeros_like(z[name]).index_fill(-1, i, 1.0) for i in _states(z[name])]
            ends = [_others(density, z | {name: one}, name) for one in whole]
            if any(not torch.isclose(end, total) for end in ends):
                raise OptionError(
                    f"discrete='relaxed' gives the model values between the states of site {name!r}, "
                    "and it rounds them or uses them as an index: multiply by them (a one-hot row times "
                    f"a table, 1 - z and z), or take discrete={{{name!r}: 'score'}}"
                )


def _states(weights: Tensor) -> list[Tensor]:
    return list(torch.arange(weights.shape[-1], device=weights.device).unsqueeze(-1).unbind())


def _others(density: Density, z: Mapping[str, Tensor], name: str) -> Tensor:
    """The log density of all sites but this one at the first point, nats."""
    visits = density.differentiable_visits(z)
    parts = [
        visit.log_prob().sum() for site, visit in visits.items() if site != name and visit.counts
    ]
    return torch.stack([density.cast(torch.zeros(())), *parts]).sum()


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
    z = {name: value.requires_grad_() for name, value in density.trial(_SEED).items()}
    leaves = {site.name: z[site.name] for site in density.latents if not site.states}
    visits = density.differentiable_visits(z)
    found = []
    for site in density.latents:
        prior = visits[site.name].fn
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

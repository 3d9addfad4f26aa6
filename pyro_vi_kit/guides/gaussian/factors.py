"""The factors of a mean-field guide as Pyro distributions of each site's constrained value."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import (
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    identity_transform,
)

from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.guides.families import DiagonalNormal
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.guides.supports.by_support import Place, places_of
from pyro_vi_kit.guides.supports.support_family import SupportFamily, log_shares, stick_offset
from pyro_vi_kit.model.log_density import Site
from pyro_vi_kit.model.log_density.supports import Turn

_TURN = 2.0 * math.pi
_CLASSES: dict[str, Any] = {
    "normal": torch.distributions.Normal,
    "gamma": torch.distributions.Gamma,
    "beta": torch.distributions.Beta,
    "dirichlet": torch.distributions.Dirichlet,
    "von_mises": torch.distributions.VonMises,
}
_TABLE = (
    "a real site has a Normal, a positive one a Gamma, one in the unit interval a Beta, a simplex a "
    "Dirichlet, an angle a VonMises"
)


class Factors:
    """Reads and writes the factor of each site of a mean-field guide.

    Args:
        guide: A `mean_field` guide with one block for all latents.

    Raises:
        OptionError: If the guide is another, or a site's support has no factor in it.
    """

    def __init__(self, guide: Guide) -> None:
        family: Any = guide.families[guide.blocks[0].name]
        if len(guide.blocks) > 1 or not isinstance(family, SupportFamily | DiagonalNormal):
            raise OptionError(
                f"method='cavi' sets the factors of guide 'mean_field', and guide {guide.name!r} has "
                "none: use guide='mean_field', or leave method= out"
            )
        self._family: SupportFamily | DiagonalNormal = family
        self._places = {place.site.name: place for place in places_of(guide.density.block)}
        for place in self._places.values():
            self._require(place)

    @property
    def sites(self) -> tuple[str, ...]:
        """The latents, in the model's order."""
        return tuple(self._places)

    def _require(self, place: Place) -> None:
        name, by_support = place.site.name, isinstance(self._family, SupportFamily)
        if place.kind != "normal" and not by_support:
            raise OptionError(
                f"method='cavi': site {name!r} is not real, and its optimal factor no normal in "
                "unconstrained space: use guide=vi.guides.MeanField(families='support')"
            )
        if place.kept or not _is_plain(place):
            raise OptionError(
                f"method='cavi': the support of site {name!r} has no factor ({_TABLE}): leave method= "
                "out"
            )

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """The factor of each site, batch and event shape as in the model."""
        family: Any = self._family
        if isinstance(family, SupportFamily):
            loc, log_spread = family.numbers()
        else:
            loc, log_spread = family().base_dist.loc, family().base_dist.scale.log()
        return {
            name: _distribution(place, loc[place.columns], log_spread[place.spreads])
            for name, place in self._places.items()
        }

    @torch.no_grad()
    def write(self, site: str, factor: object) -> None:
        """Give a site this factor.

        Args:
            site: Its name.
            factor: A distribution of its constrained value.

        Raises:
            ModelError: If the factor is of another kind or shape, or has parameters that are not finite.
        """
        place, family = self._places[site], self._family
        loc, unit, log_spread = _numbers(place, factor)
        if not all(bool(x.isfinite().all()) for x in (loc, unit, log_spread)):
            raise ModelError(f"updates[{site!r}] gave a factor whose parameters are not finite")
        loc, unit, log_spread = (x.to(family.loc) for x in (loc, unit, log_spread))
        if isinstance(family, SupportFamily):
            family.become(place, loc, unit, log_spread)
            return
        here = place.columns
        family.centre[here], family.unit[here] = loc, unit
        family.loc[here], family.log_scale[here] = 0.0, 0.0

    def centre_on(self, point: Tensor) -> None:
        """Put all factors at an unconstrained point `[D]`; their spreads stay."""
        self._family.centre_on(point)

    def columns(self, site: str) -> tuple[slice, slice]:
        """Where a site's places and spreads are among the family's parameters."""
        return self._places[site].columns, self._places[site].spreads


def _is_plain(place: Place) -> bool:
    """Whether a support is the family's own: neither moved nor scaled."""
    transform: Any = place.site.transform
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if place.kind == "dirichlet":
        return True
    own = {
        "normal": identity_transform,
        "gamma": ExpTransform(),
        "beta": SigmoidTransform(),
        "von_mises": Turn(),
    }[place.kind]
    probe = torch.tensor([-1.5, 0.5], dtype=torch.float64)
    return torch.allclose(transform(probe).double(), own(probe))


def _distribution(place: Place, loc: Tensor, log_spread: Tensor) -> Any:
    """The factor with these numbers."""
    site, kind = place.site, place.kind
    shape = site.batch_shape + site.event_shape
    concentration = (-2.0 * log_spread).exp()
    if kind == "dirichlet":
        shares = log_shares(loc.reshape(-1, place.width)).exp()
        alpha = (concentration.unsqueeze(-1) * shares).reshape(shape)
        return dist.Dirichlet(alpha).to_event(len(site.event_shape) - 1)
    loc, concentration = loc.reshape(shape), concentration.reshape(shape)
    if kind == "normal":
        found: Any = dist.Normal(loc, concentration.rsqrt())
    elif kind == "gamma":
        found = dist.Gamma(concentration, concentration / loc.exp())
    elif kind == "beta":
        found = dist.Beta(concentration * loc.sigmoid(), concentration * (-loc).sigmoid())
    else:
        found = dist.VonMises(torch.remainder(loc + math.pi, _TURN) - math.pi, concentration)
    return found.to_event(len(site.event_shape))


def _numbers(place: Place, factor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Place, unit and log spread of a factor, each flat."""
    site, kind = place.site, place.kind
    while hasattr(factor, "base_dist") and not isinstance(factor, _CLASSES[kind]):
        factor = factor.base_dist
    if not isinstance(factor, _CLASSES[kind]):
        raise ModelError(
            f"updates[{site.name!r}] gave a {type(factor).__name__}, and the factor of this site is a "
            f"{_CLASSES[kind].__name__} ({_TABLE})"
        )

    def shaped(parameter: Tensor) -> Tensor:
        return _expanded(site, parameter)

    if kind == "normal":
        scale = shaped(factor.scale).flatten()
        return shaped(factor.loc).flatten(), scale, scale.log()
    if kind == "gamma":
        spread = shaped(factor.concentration).flatten().rsqrt()
        rate = shaped(factor.rate).flatten()
        return -2.0 * spread.log() - rate.log(), spread, spread.log()
    if kind == "von_mises":
        spread = shaped(factor.concentration).flatten().rsqrt()
        return shaped(factor.loc).flatten(), spread.clamp(max=1.0), spread.log()
    if kind == "beta":
        a, b = shaped(factor.concentration1), shaped(factor.concentration0)
        return _of_simplex(torch.stack([a, b], -1))
    return _of_simplex(shaped(factor.concentration))


def _expanded(site: Site, parameter: Tensor) -> Tensor:
    shape = site.batch_shape + site.event_shape
    try:
        return parameter.expand(shape)
    except RuntimeError:
        raise ModelError(
            f"updates[{site.name!r}] gave a factor of shape {tuple(parameter.shape)}, and the site has "
            f"shape {tuple(shape)}"
        ) from None


def _of_simplex(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of Dirichlets with alpha `[..., K]`."""
    total = alpha.sum(-1)
    rest = alpha.flip(-1).cumsum(-1).flip(-1)
    stick, after = alpha[..., :-1], rest[..., 1:]
    loc = (stick / after).log()
    unit = ((stick + after) / (stick * after)).sqrt()
    return (loc + stick_offset(loc)).flatten(), unit.flatten(), -0.5 * total.log().flatten()

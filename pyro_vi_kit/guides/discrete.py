"""Discrete latents that a guide holds itself: a categorical for each, trained by its score or relaxed.

``"score"``: draws are discrete, and log q moves up where they turned out well, compared with the other
draws of the same step (`objectives.estimators`). ``"relaxed"``: while training, draws are softened by
Gumbel noise and a temperature (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017), so that they have a
derivative; it is that of another bound, the nearer the lower the temperature. Everywhere else draws are
discrete, and the density of both is that of the categorical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told
from pyro_vi_kit.guides.local.heads import Head
from pyro_vi_kit.guides.local.local import head_for
from pyro_vi_kit.guides.supports.mixed import DiscreteHead, Part, Relaxed
from pyro_vi_kit.model.log_density import Block, Density, Drawn, Plate, Site
from pyro_vi_kit.model.log_density.dependence import require_smooth

NAMES = ("score", "relaxed")


How = str | Relaxed
Discrete = How | Mapping[str, How]


def require_discrete(guide: str, discrete: object) -> None:
    """Refuse a value of ``discrete=`` that means nothing.

    Raises:
        OptionError: Or UnknownNameError, with what can be given.
    """
    for how in discrete.values() if isinstance(discrete, Mapping) else [discrete]:
        if isinstance(how, str) and how not in NAMES:
            raise UnknownNameError("discrete", how, list(NAMES))
        if how is not None and not isinstance(how, str | Relaxed):
            raise OptionError(
                f"{guide}: discrete= takes 'score', 'relaxed', vi.guides.Relaxed(temperature=0.3), or a "
                f"dict of these by site, got {told(how)}"
            )
    if isinstance(discrete, Mapping) and (not discrete or None in discrete.values()):
        raise OptionError(
            f"{guide}: discrete= names the sites that are not summed out, each with 'score' or "
            "'relaxed'; leave the others out of the dict"
        )


def drawn(discrete: Discrete) -> Drawn:
    """The discrete latents that a guide with this option holds."""
    if isinstance(discrete, Mapping):
        return Drawn({name: _how(how) is not None for name, how in discrete.items()})
    return Drawn({}, _how(discrete) is not None)


def drawing(density: Density, discrete: Discrete) -> Density:
    """The density in which these sites are not summed out; itself where it is that.

    Raises:
        OptionError: If a site is in no data plate, or the model rounds its relaxed values.
    """
    wanted = drawn(discrete)
    if density.drawn != wanted:
        params = density.params
        density = Density(
            density.model,
            dtype=density.dtype,
            device=density.device,
            drawn=wanted,
            init=density.initial(),
        )
        density.params = params
    for site in density.latents:
        if site.states and not site.plates:
            raise OptionError(
                f"discrete= keeps a distribution for each row of a data plate, and {site.name!r} is "
                "in none: leave it to be summed out, with a dict of the other sites as discrete="
            )
    require_smooth(density)
    return density


def by_plate(density: Density) -> dict[Plate, tuple[Site, ...]]:
    """The drawn discrete sites by the outermost plate around them."""
    found: dict[Plate, list[Site]] = {}
    for site in density.latents:
        if site.states:
            found.setdefault(density.structure.plates[site.plates[0].name], []).append(site)
    return {plate: tuple(sites) for plate, sites in found.items()}


def arranged(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of a local block in the order of a `DiscreteHead`: discrete ones last."""
    return tuple(sorted(sites, key=lambda site: bool(site.states)))


def head_of(local: Any, block: Block, discrete: Discrete | None) -> Head:
    """The head of a local block: that of its continuous latents, beside a categorical for each other.

    Args:
        local: What ``local=`` names, for the continuous latents.
        block: The block, its sites `arranged`.
        discrete: The guide's option.
    """
    parts = []
    for site in block.sites:
        if site.states and discrete is not None:
            how = discrete[site.name] if isinstance(discrete, Mapping) else discrete
            parts.append(Part(math.prod(block.rest(site)) // site.states, site.states, _how(how)))
    if not parts:
        return head_for(local, block.dim)
    rest = block.dim - sum(part.size * part.states for part in parts)
    return DiscreteHead(head_for(local, rest) if rest else None, parts)


def _how(how: How) -> Relaxed | None:
    """What a name stands for; None for the score function."""
    if isinstance(how, Relaxed):
        return how
    return Relaxed() if how == "relaxed" else None

"""Which deterministic search fits a guide."""

from __future__ import annotations

from collections.abc import Callable

from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.laplace import ModeNormal
from pyro_vi_kit.guides.gaussian.pathfinder import PathMixture
from pyro_vi_kit.optimize.deterministic import fixed_draws, laplace_fit, mixtures, pathfinder
from pyro_vi_kit.optimize.result import Outcome

Fit = Callable[..., Outcome]
"""Fits a guide in place; see `fixed_draws.fit`, and `mixtures.fit` for what that takes beside."""


def is_searched(guide: Guide) -> bool:
    """Whether steps on a bound have no part in fitting a guide."""
    return any(getattr(family, "searched", False) for family in guide.families.values())


def search_for(guide: object) -> Fit | None:
    """What fits this guide without stochastic steps; None where nothing does."""
    if mixtures.applies_to(guide):
        return mixtures.fit
    if not isinstance(guide, Guide) or not is_searched(guide):
        return fixed_draws.fit if fixed_draws.applies_to(guide) else None
    if guide.density.params or guide.density.dim > fixed_draws.MAX_DIM:
        return None
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, ModeNormal):
        return laplace_fit.fit
    return pathfinder.fit if isinstance(family, PathMixture) else None

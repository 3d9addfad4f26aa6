"""Laplace's approximation: a mode, and the curvature there; no bound is maximised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.laplace import ModeNormal
from pyro_vi_kit.optimize.deterministic.fixed_draws import NAME
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import (
    Laplace,
    Mode,
    find_modes,
    laplace,
    laplace_at_modes,
    modes_words,
    newton_refine,
    starting_points,
    with_modes,
)
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.result import Outcome

_TOLERANCE = 1e-9
_NEWTON_STEPS = 5


def fit(guide: Guide, search: Search, start: Tensor | Gaussian | None = None) -> Outcome:
    """Put a Laplace guide on the best mode, in place, as exactly as numbers allow.

    Args:
        guide: One whose only family is a `ModeNormal`.
        search: Model, seed of the starting points, and budget.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian at whose mean to
            begin.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    family = cast(ModeNormal, guide.families[guide.blocks[0].name])
    point = start.loc if isinstance(start, Gaussian) else start
    starts = starting_points(search) if point is None else point.unsqueeze(0)
    found = sorted(find_modes(search, starts, tolerance=_TOLERANCE), key=lambda m: m.value)
    known = [] if search.stopped else laplace_at_modes(search, found)
    best = _polished(search, known[0]) if known else _at(search, found[0])
    family.start_from(best.gaussian.loc, best.gaussian.scale_tril)
    search.losses.append(-best.log_prob)
    modes = [m.mode for m in known]
    return search.outcome(NAME, with_modes(_status(search, best, found[0], modes), modes, guide))


def _at(search: Search, end: Minimum) -> Laplace:
    """The curvature where the best search ended, which is no mode with curvature on all sides."""
    if search.stopped or not bool(torch.isfinite(end.gradient).all()):
        return Laplace(round_at(end.x), -end.value, torch.inf)
    return newton_refine(search, laplace(search, end.x, -end.value, -end.gradient))


def _polished(search: Search, mode: Laplace) -> Laplace:
    """Newton's method until nothing is left to gain: a mode that is known to 0.01 nat is 0.1 sd off."""
    for _ in range(_NEWTON_STEPS):
        if mode.left < _TOLERANCE:
            break
        tril = mode.gaussian.scale_tril
        _, gradient = search.evaluate(mode.gaussian.loc.unsqueeze(0))
        z = mode.gaussian.loc + tril @ (tril.T @ gradient[0])
        log_p, gradient = search.evaluate(z.unsqueeze(0))
        after = laplace(search, z, float(log_p[0]), gradient[0])
        if not after.left < mode.left:
            break
        mode = after
    return mode


def _status(search: Search, best: Laplace, end: Minimum, modes: list[Mode]) -> Status:
    if search.stopped:
        return search.stopped_status()
    if modes:
        said = "The mode of the unconstrained density was found, and the Hessian there"
        if len(modes) > 1:
            said = f"{modes_words(modes)}. The Hessian is of that one"
        return Status(True, "converged", f"{said}.")
    if end.converged and best.flat:
        return Status(
            True,
            "converged",
            f"The mode was found, but the Hessian there is singular in {best.flat} of "
            f"{len(best.gaussian.loc)} directions, and a jitter was added: sds in these directions mean "
            "nothing. Look at vi.check(model) for latents that the data and priors do not "
            "determine, or use guide='full_rank'.",
        )
    return Status(
        False,
        "not converged",
        f"The mode search gave up ({end.message}): the density may have no mode (a hierarchical sd at "
        "0 does this), and the curvature is that of the best point met. Use guide='full_rank'.",
    )

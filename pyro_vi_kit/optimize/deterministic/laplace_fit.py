"""Laplace's approximation: a mode, and the curvature there; no bound is maximised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.laplace import ModeNormal
from pyro_vi_kit.optimize.deterministic.fixed_draws import NAME, modes_words, stopped_status
from pyro_vi_kit.optimize.deterministic.laplace import Laplace, laplace
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import Peak, with_peaks
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.deterministic.starts import (
    expansions,
    find_modes,
    settled,
    starting_points,
)
from pyro_vi_kit.optimize.result import Budget, Outcome

_TOLERANCE = 1e-9
_NEWTON_STEPS = 5


def fit(
    guide: Guide,
    *,
    seed: int,
    tolerance: float,
    budget: Budget,
    progress: Progress,
    start: Tensor | Gaussian | None = None,
) -> Outcome:
    """Put a Laplace guide on the best mode, in place.

    Args:
        guide: One whose only family is a `ModeNormal`.
        seed: Of the starting points.
        tolerance: Unused: the mode is found as exactly as numbers allow.
        budget: What may be spent.
        progress: Told each evaluation.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian at whose mean to
            begin.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    search = Search(guide.density, seed, budget, progress)
    family = cast(ModeNormal, guide.families[guide.blocks[0].name])
    point = start.loc if isinstance(start, Gaussian) else start
    starts = starting_points(search) if point is None else point.unsqueeze(0)
    found = sorted(find_modes(search, starts, tolerance=_TOLERANCE), key=lambda m: m.value)
    modes = [] if search.stopped else expansions(search, found)
    best = _polished(search, modes[0]) if modes else _at(search, found[0])
    family.start_from(best.gaussian.loc, best.gaussian.scale_tril)
    search.losses.append(-best.log_prob)
    peaks = tuple(Peak(m.gaussian, m.log_evidence) for m in modes)
    status = _status(search, best, found[0], tuple(m.log_evidence for m in modes))
    status = with_peaks(status, peaks, guide)
    return Outcome(
        NAME,
        status,
        search.losses,
        search.evaluations,
        engine=search.engine,
        error=search.error,
    )


def _at(search: Search, end: Minimum) -> Laplace:
    """The curvature where the best search ended, which is no mode with curvature on all sides."""
    if search.stopped or not bool(torch.isfinite(end.gradient).all()):
        return Laplace(round_at(end.x), -end.value, torch.inf)
    return settled(search, laplace(search, end.x, -end.value, -end.gradient))


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


def _status(search: Search, best: Laplace, end: Minimum, evidence: tuple[float, ...]) -> Status:
    if search.stopped:
        return stopped_status(search)
    if evidence:
        said = "The mode of the unconstrained density was found, and the Hessian there"
        if len(evidence) > 1:
            said = f"{modes_words(evidence)}. The Hessian is of that one"
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

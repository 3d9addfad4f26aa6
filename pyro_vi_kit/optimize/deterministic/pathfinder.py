"""Pathfinder: searches from several points, and the Gaussian of the best ELBO on each one's way.

Zhang, Carpenter, Gelman & Vehtari (2022) resample the pooled draws of all paths, each weighed by its own
path's density. Here the result is the mixture of the paths, and its own density is in the weights: they
are bounded where paths overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.pathfinder import PathMixture
from pyro_vi_kit.optimize.deterministic.draws import matched_normals
from pyro_vi_kit.optimize.deterministic.fixed_draws import NAME, stopped_status
from pyro_vi_kit.optimize.deterministic.inverse_hessian import LowRankGaussian, along
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.deterministic.starts import find_modes, starting_points
from pyro_vi_kit.optimize.result import Budget, Outcome

_TOLERANCE = 1e-8
# Points of a path that are looked at, draws for each, and draws for the best one.
_WAYPOINTS = 100
_DRAWS = 10
_LOOK = 200
# A path this many nats behind the best one has no share in the mixture that could be seen.
_BEHIND = 10.0


@dataclass(frozen=True)
class _Path:
    """The best Gaussian of a path, and its ELBO in nats."""

    gaussian: Gaussian
    elbo: float


def fit(
    guide: Guide,
    *,
    seed: int,
    tolerance: float,
    budget: Budget,
    progress: Progress,
    start: Tensor | Gaussian | None = None,
) -> Outcome:
    """Put a Pathfinder guide on the ways of its searches, in place.

    Args:
        guide: One whose only family is a `PathMixture`.
        seed: Of the starting points and of the draws along the paths.
        tolerance: Unused: no bound is maximised.
        budget: What may be spent.
        progress: Told each path's ELBO.
        start: Unconstrained starting point `[D]`, of the only path then, or a Gaussian at whose mean to
            begin.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    search = Search(guide.density, seed, budget, progress)
    family = cast(PathMixture, guide.families[guide.blocks[0].name])
    point = start.loc if isinstance(start, Gaussian) else start
    count = len(family.locs)
    starts = starting_points(search, count) if point is None else point.unsqueeze(0)
    searches = _searches(search, starts)
    paths = []
    for end in searches:
        if search.stopped and paths:
            break
        paths.append(_best(search, end, family.history))
        search.record(-paths[-1].elbo)
    _hand_over(family, paths)
    status = _status(search, paths, searches)
    return Outcome(
        NAME,
        status,
        search.losses,
        search.evaluations,
        engine=search.engine,
        error=search.error,
    )


def _searches(search: Search, starts: Tensor) -> list[Minimum]:
    """Searches for a mode from each start, to their end; those that found finite ground."""

    def negative(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = search.evaluate(z)
        return -log_p, -gradient

    limit = 200 + 2 * search.density.dim
    found = search.minimise(negative, list(starts), tolerance=_TOLERANCE, max_evaluations=limit)
    finite = [m for m in found if math.isfinite(m.value)]
    return finite or find_modes(search, starts)[: len(starts)]


def _best(search: Search, end: Minimum, history: int) -> _Path:
    """The Gaussian of the highest ELBO along a path; a round one at its end where there is none."""
    log_p, gradients = search.evaluate(end.path)
    finite = log_p.isfinite() & gradients.isfinite().all(-1)
    candidates = [c for c in along(end.path[finite], gradients[finite], history) if c is not None]
    if len(candidates) > _WAYPOINTS:
        places = torch.linspace(0, len(candidates) - 1, _WAYPOINTS).round().long().tolist()
        candidates = [candidates[i] for i in places]
    elbos = _elbos(search, candidates, _DRAWS)
    if not elbos or max(elbos) == -math.inf:
        return _Path(round_at(end.x), -math.inf)
    best = candidates[elbos.index(max(elbos))]
    # The highest of many noisy ones is too high: it is looked at again.
    return _Path(best.dense(), _elbos(search, [best], _LOOK)[0])


def _elbos(search: Search, gaussians: list[LowRankGaussian], draws: int) -> list[float]:
    """The ELBOs on a few draws, nats; minus infinity where one is not finite."""
    if not gaussians:
        return []
    noise = matched_normals(draws, search.density.dim, seed_of(search.seed, "paths", draws))
    noise = search.density.cast(noise)
    log_p, _ = search.evaluate(torch.cat([g.place(noise) for g in gaussians]))
    log_q = torch.stack([g.log_q(noise) for g in gaussians])
    elbos = (log_p.reshape(log_q.shape) - log_q).mean(-1)
    return torch.where(elbos.isfinite(), elbos, -math.inf).tolist()


def _hand_over(family: PathMixture, paths: list[_Path]) -> None:
    """Give the family its components, weighted by what each ELBO says of the mass around it."""
    best = max(paths, key=lambda path: path.elbo)
    if best.elbo == -math.inf:
        paths = [_Path(path.gaussian, 0.0) for path in paths]
    # Slots that no path came to stand on the best one, without weight.
    idle = [_Path(best.gaussian, -math.inf)] * (len(family.locs) - len(paths))
    paths = [*paths, *idle][: len(family.locs)]
    family.become(
        torch.tensor([path.elbo for path in paths], dtype=torch.float64),
        torch.stack([path.gaussian.loc for path in paths]),
        torch.stack([path.gaussian.scale_tril for path in paths]),
    )


def _status(search: Search, paths: list[_Path], searches: list[Minimum]) -> Status:
    if search.stopped:
        return stopped_status(search)
    elbos = sorted((path.elbo for path in paths), reverse=True)
    if not math.isfinite(elbos[0]):
        return Status(
            False,
            "diverged",
            "On no path was there a Gaussian with a finite ELBO: look at vi.check(model), or give a "
            "point to begin at, init={site: value}.",
        )
    near = sum(elbo > elbos[0] - _BEHIND for elbo in elbos)
    ended = sum(end.converged for end in searches)
    said = (
        f"Paths: {len(paths)}, of which {ended} ended in a mode; the best Gaussian on a path has ELBO "
        f"{elbos[0]:.3f} nats, and {near} are within {_BEHIND:g} nats of it. Its draws are meant to be "
        "resampled: posterior.resample()"
    )
    return Status(True, "converged", f"{said}.")

"""Pathfinder: searches from several points, and the Gaussian of the best ELBO on each one's way.

Zhang, Carpenter, Gelman & Vehtari (2022) resample the pooled draws of all paths, each weighed by its own
path's density. Here the result is the mixture of the paths, and its own density is in the weights: they
are bounded where paths overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.pathfinder import PathMixture
from pyro_vi_kit.optimize.deterministic.fixed_draws import NAME
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import find_modes, starting_points
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search, matched_normals
from pyro_vi_kit.optimize.result import Outcome

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


def fit(guide: Guide, search: Search, start: Tensor | Gaussian | None = None) -> Outcome:
    """Put a Pathfinder guide on the ways of its searches, in place; no bound is maximised.

    Args:
        guide: One whose only family is a `PathMixture`.
        search: Model, seed of the starting points and of the draws along the paths, and budget.
        start: Unconstrained starting point `[D]`, of the only path then, or a Gaussian at whose mean to
            begin.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
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
    return search.outcome(NAME, _status(search, paths, searches))


def _searches(search: Search, starts: Tensor) -> list[Minimum]:
    """Searches for a mode from each start, to their end; those that found finite ground."""
    limit = 200 + 2 * search.density.dim
    found = search.minimise(
        search.negative(), list(starts), tolerance=_TOLERANCE, max_evaluations=limit
    )
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
    log_p, _ = search.evaluate(torch.cat([g.reparameterise(noise) for g in gaussians]))
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
        return search.stopped_status()
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


# -- Gaussians along the way of a search ---------------------------------------------------------------


# Of a change that is nearly across its step nothing can be learned.
_LEAST_BEND = 1e-12


@dataclass(frozen=True)
class LowRankGaussian:
    """A Gaussian of covariance `T T^T`, with `T = diag(sd) (I + Q (inner - I) Q^T)`.

    Attributes:
        loc: Mean, `[D]`.
        sd: `[D]`.
        basis: Q, orthonormal columns, `[D, r]`.
        inner: A lower triangle, `[r, r]`.
    """

    loc: Tensor
    sd: Tensor
    basis: Tensor
    inner: Tensor

    def reparameterise(self, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from standard normals `[S, D]`."""
        within = noise @ self.basis
        return self.loc + (noise + (within @ self.inner.T - within) @ self.basis.T) * self.sd

    def log_q(self, noise: Tensor) -> Tensor:
        """Log density at what these normals give, `[S]`, nats."""
        log_det = self.sd.log().sum() + self.inner.diagonal().log().sum()
        return -0.5 * (noise.square().sum(-1) + len(self.loc) * math.log(2.0 * math.pi)) - log_det

    def dense(self) -> Gaussian:
        """The same with a Cholesky factor."""
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        root = self.reparameterise(identity) - self.loc
        # Rows of `root` are T's columns; the triangle of its QR is the factor, up to signs.
        upper = torch.linalg.qr(root, mode="r")[1]
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
        return Gaussian(self.loc, (signs[:, None] * upper).T.contiguous())


def along(path: Tensor, gradients: Tensor, history: int) -> Iterator[LowRankGaussian | None]:
    """The Gaussian of the curvature known at each point of a search but the first.

    Args:
        path: Points `[T, D]`.
        gradients: Of the log density there, `[T, D]`.
        history: Steps that are remembered.

    Yields:
        T - 1 Gaussians; None where the curvature known is not positive.
    """
    diagonal = torch.ones_like(path[0])
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for t in range(1, len(path)):
        step, change = path[t] - path[t - 1], gradients[t - 1] - gradients[t]
        bend = step @ change
        if bool(bend > _LEAST_BEND * change.square().sum()):
            diagonal = _updated(diagonal, step, change, bend)
            steps, changes = [*steps, step][-history:], [*changes, change][-history:]
        yield _gaussian(path[t], gradients[t], diagonal, steps, changes)


def _updated(diagonal: Tensor, step: Tensor, change: Tensor, bend: Tensor) -> Tensor:
    """The diagonal of the inverse Hessian after one more step (Gilbert & Lemarechal 1989)."""
    a = (change.square() * diagonal).sum()
    c = (step.square() / diagonal).sum()
    precision = a / (bend * diagonal) + change.square() / bend
    precision = precision - a * step.square() / (bend * c * diagonal.square())
    return 1.0 / precision.clamp_min(1e-300)


def _gaussian(
    z: Tensor, gradient: Tensor, diagonal: Tensor, steps: list[Tensor], changes: list[Tensor]
) -> LowRankGaussian | None:
    """A Newton step away from a point, with the inverse Hessian as covariance."""
    sd = diagonal.sqrt()
    if not steps:
        basis, inner = z.new_zeros(len(z), 0), z.new_zeros(0, 0)
    else:
        s, y = torch.stack(steps, -1), torch.stack(changes, -1)
        upper = (s.T @ y).triu()
        identity = torch.eye(len(upper), dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
        middle = upper.diagonal().diag() + y.T @ (diagonal[:, None] * y)
        gamma = torch.cat(
            [
                torch.cat([torch.zeros_like(middle), -inverse], -1),
                torch.cat([-inverse.T, inverse.T @ middle @ inverse], -1),
            ]
        )
        basis, triangle = torch.linalg.qr(torch.cat([sd[:, None] * y, s / sd[:, None]], -1))
        within = triangle @ gamma @ triangle.T
        within = (within + within.T) / 2 + torch.eye(len(within), dtype=z.dtype, device=z.device)
        inner, failed = torch.linalg.cholesky_ex(within)
        if int(failed) or not bool(inner.isfinite().all()):
            return None
    at = LowRankGaussian(torch.zeros_like(z), sd, basis, inner)
    return LowRankGaussian(z + _times_covariance(at, gradient), sd, basis, inner)


def _times_covariance(at: LowRankGaussian, gradient: Tensor) -> Tensor:
    """`T T^T gradient`, `[D]`."""
    scaled = at.sd * gradient
    within = at.basis.T @ scaled
    pulled = scaled + at.basis @ (at.inner.T @ within - within)
    return at.reparameterise(pulled.unsqueeze(0))[0]

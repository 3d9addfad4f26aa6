"""Where to begin: modes found from several points, and the Gaussian to measure in.

The searches run side by side, so that on a small model six of them take the time of one. What they
find is ranked by Laplace's estimate of the evidence. Where no search ends in a mode (a funnel has none)
the way that they took is searched for the Gaussian with the highest ELBO (Zhang et al. 2022,
Pathfinder, with exact Hessians).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ModelError, in_words
from pyro_vi_kit.core.runtime import RandomStream, generator_of, isolated, seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.gradients import second_derivatives
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.parametrisation import Dense, Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search, matched_normals, standard_normals

_STARTS = 6
_MORE = 32
# On data of more numbers than this, six points take longer than one.
_LARGE = 200_000
# The evidence of a mode this many nats below the highest density is not worth a Hessian.
_DEPTH = 30.0
_WAYPOINTS = 8
# Nats; skewness costs a few. A funnel's mode, deep in its neck, misses by hundreds.
_SHORTFALL = 5.0
# In units of conditional sds; below, rounding decides what the curvature is.
_CURVED = 1e-10
# A mode this many nats behind holds a hundredth of the mass.
_CLOSE_CALL = 4.6
_DRAWS = 2000
_SEED = 17_711
# A mode that draws come near this much less often than they should is left out. Laplace's shares are
# rough, and a guide that is merely off by a factor of a few is a matter of weights.
_FAINT = 0.1


class Mode(NamedTuple):
    """A mode of the log density.

    Attributes:
        gaussian: Laplace's approximation there.
        log_evidence: Its estimate of the integral of the density, nats.
    """

    gaussian: Gaussian
    log_evidence: float


@dataclass(frozen=True)
class Found:
    """What the searches for a mode came to.

    Attributes:
        best: The Gaussian to go on from.
        trusted: Whether it sits at a mode, and the ELBO there bears that out.
        modes: Those that were found, best first.
    """

    best: Gaussian
    trusted: bool
    modes: tuple[Mode, ...] = ()


@dataclass(frozen=True)
class Laplace:
    """A Gaussian from the curvature at a point, and whether the point is a mode.

    Attributes:
        gaussian: Mean at the point; covariance minus the inverse of the Hessian, with directions in
            which the log density is not curved downwards bent by the size of their curvature.
        log_prob: Log density at the point, nats.
        left: Nats that a Newton step promises; infinite where some direction is not curved downwards.
        flat: Directions that are not curved downwards, and were bent; 0 where that is not known.
    """

    gaussian: Gaussian
    log_prob: float
    left: float
    flat: int = 0

    @property
    def trusted(self) -> bool:
        """Whether the point is within 0.1 nat of a mode. A funnel, for one, has none."""
        return self.left < 0.1

    @property
    def log_evidence(self) -> float:
        """The integral of the density by this approximation, nats."""
        log_det = float(self.gaussian.scale_tril.diagonal().log().sum())
        return self.log_prob + log_det + 0.5 * len(self.gaussian.loc) * math.log(2.0 * math.pi)

    @property
    def mode(self) -> Mode:
        """What is kept of it."""
        return Mode(self.gaussian, self.log_evidence)


def starting_points(search: Search, count: int = _STARTS) -> Tensor:
    """The origin of unconstrained space and random points of radius 1 and 2 around it, `[M, D]`."""
    generator = generator_of(search.seed, "starting points")
    dim = search.density.dim
    points = standard_normals(count - 1, dim, generator)
    points[count // 2 :] *= 2.0
    return search.density.cast(torch.cat([points.new_zeros(1, dim), points]))


def find_modes(
    search: Search, starts: Tensor, *, jacobian: bool = True, tolerance: float = 1e-3
) -> list[Minimum]:
    """Maximise the log density from each start `[M, D]`; the searches that found finite ground.

    Args:
        search: The fit.
        starts: Where to begin, `[M, D]`.
        jacobian: Whether to find modes of the unconstrained density, or of the constrained one.
        tolerance: Nats.

    Raises:
        ModelError: If the log density is finite at no start, nor at any of 32 more.
    """

    def minimise(points: Tensor) -> list[Minimum]:
        found = search.minimise(
            search.negative(jacobian),
            list(points),
            tolerance=tolerance,
            max_evaluations=200 + 2 * search.density.dim,
            patience=2.5,
        )
        return [m for m in found if math.isfinite(m.value)]

    data = sum(t.numel() for t in search.density.data)
    some = starts[:2] if data > _LARGE else starts
    found = minimise(some)
    if len(some) < len(starts) and not _agree(found) and not search.stopped:
        found += minimise(starts[2:])
    if found:
        return found
    search.require_whole()
    generator = generator_of(search.seed, "more starting points")
    found = minimise(search.density.cast(standard_normals(_MORE, search.density.dim, generator)))
    if not found:
        search.require_whole()
        raise ModelError(
            "the log density or its gradient is not finite at any of "
            f"{len(starts) + _MORE} starting points: see vi.check(model), or give a point with "
            "init={site: value}"
        )
    return found


def _agree(found: list[Minimum]) -> bool:
    return (
        len(found) > 1
        and all(m.converged for m in found)
        and abs(found[0].value - found[1].value) < 0.1
    )


def find_frame(search: Search, start: Tensor | Gaussian | None, count: int = _STARTS) -> Found:
    """A Gaussian to measure in: Laplace's at the best mode, or the best on the way to none.

    Args:
        search: The fit.
        start: The only point `[D]` to begin at, or `[M, D]`, or a Gaussian to go on from, as it is; from
            several points of our own when None.
        count: How many these are.

    Raises:
        ModelError: If the log density is finite nowhere.
    """
    if isinstance(start, Gaussian):
        return Found(start, True)
    starts = starting_points(search, count) if start is None else torch.atleast_2d(start)
    found = sorted(find_modes(search, starts), key=lambda m: m.value)
    if search.stopped:
        return Found(round_at(found[0].x), False)
    known = laplace_at_modes(search, found)
    modes = tuple(m.mode for m in known)
    if search.stopped:
        return Found(modes[0].gaussian if modes else round_at(found[0].x), bool(modes))
    # Where the posterior is near its Laplace approximation, ELBO and evidence are near each other.
    if modes and _elbo(search, modes[0].gaussian) > modes[0].log_evidence - _SHORTFALL:
        return Found(modes[0].gaussian, True, modes)
    return Found(_best_on_the_way(search, found, modes), False, modes)


def laplace_at_modes(search: Search, found: list[Minimum]) -> list[Laplace]:
    """Laplace's approximation at each distinct mode, that of the highest evidence first.

    Args:
        search: The fit.
        found: Where searches ended, the highest density first.
    """
    modes: list[Laplace] = []
    # A search that was given up, or ran off along a funnel, says nothing by how high it got.
    ends = [m for m in found if m.converged] or found[:2]
    for end in ends:
        if (
            search.stopped
            or end.value > ends[0].value + _DEPTH
            or any(_near(m, -end.value, end.x) for m in modes)
        ):
            continue
        at = newton_refine(search, laplace(search, end.x, -end.value, -end.gradient))
        if at.trusted and not any(_near(m, at.log_prob, at.gaussian.loc) for m in modes):
            modes.append(at)
    return sorted(modes, key=lambda m: -m.log_evidence)


def newton_refine(search: Search, at: Laplace) -> Laplace:
    """Go on in units of the curvature where a search stopped short: raw scales hide what is left."""
    for _ in range(3):
        if at.left < 1e-2 or search.stopped:
            break
        frame = at.gaussian

        def negative(x: Tensor, frame: Gaussian = frame) -> tuple[Tensor, Tensor]:
            log_p, gradient = search.evaluate(frame.loc + x @ frame.scale_tril.T)
            return -log_p, -(gradient @ frame.scale_tril)

        (end,) = search.minimise(
            negative,
            [torch.zeros_like(frame.loc)],
            tolerance=1e-3,
            curvature=torch.ones_like(frame.loc),
            max_evaluations=100,
        )
        gradient = torch.linalg.solve_triangular(
            frame.scale_tril.T, -end.gradient[:, None], upper=True
        )[:, 0]
        z = frame.loc + frame.scale_tril @ end.x
        if search.stopped:
            return Laplace(Gaussian(z, frame.scale_tril), -end.value, at.left)
        at = laplace(search, z, -end.value, gradient)
    return at


def _near(mode: Laplace, log_prob: float, z: Tensor) -> bool:
    """Whether a point is within half a sd, and a tenth of a nat, of a mode that is known."""
    if not abs(mode.log_prob - log_prob) < 0.1:
        return False
    shift = (z - mode.gaussian.loc)[:, None]
    unit = torch.linalg.solve_triangular(mode.gaussian.scale_tril, shift, upper=False)
    return float(unit.norm()) < 0.5


def _best_on_the_way(search: Search, found: list[Minimum], modes: Sequence[Mode]) -> Gaussian:
    """The Gaussian with the best ELBO among modes and some points of the two best searches' paths."""
    candidates = [mode.gaussian for mode in modes]
    for end in found[:2]:
        # Close together at the beginning, where a search that runs off down a funnel is still at its
        # mouth.
        part = torch.linspace(0, 1, _WAYPOINTS, dtype=torch.float64).square()
        points = end.path[torch.unique((part * (len(end.path) - 1)).round().long()).tolist()]
        log_p, gradient = search.evaluate(points)
        for z, value, slope in zip(points, log_p.tolist(), gradient, strict=True):
            candidates.append(laplace(search, z, value, slope).gaussian)
    elbos = [_elbo(search, candidate) for candidate in candidates]
    return candidates[elbos.index(max(elbos))]


def _elbo(search: Search, gaussian: Gaussian) -> float:
    """The ELBO on a few draws, nats; minus infinity where it is not finite."""
    family = Dense(gaussian)
    draws = min(max(32, 2 * search.density.dim + 2), 128)
    noise = search.density.cast(
        matched_normals(draws, family.noise, seed_of(search.seed, "candidates"))
    )
    x = family.start()
    loss, _ = family.loss(x, noise, *search.evaluate(family.reparameterise(x, noise)))
    return -float(loss) if math.isfinite(float(loss)) else -math.inf


# -- the Gaussian of the log density's curvature at a point ---------------------------------------


def laplace(search: Search, z: Tensor, log_prob: float, gradient: Tensor) -> Laplace:
    """The Laplace approximation at a point `[D]` with this log density and gradient.

    Where the Hessian is not finite, or its diagonal is zero, the covariance there is the identity.
    """
    precision = -hessian(search.density, z)
    search.count(2 * search.density.dim)
    if not bool(torch.isfinite(precision).all()):
        return Laplace(round_at(z), log_prob, math.inf)
    # In units of the conditional sds the eigenvalues can be compared with each other.
    size = precision.diagonal().abs()
    unit = torch.where(size > 1e-300, size, torch.ones_like(size)).rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, None] * precision * unit)
    curved = bool(values[0] > _CURVED) and bool((precision.diagonal() > 0).all())
    slope = vectors.T @ (unit * gradient)
    covariance = unit[:, None] * (vectors / values.abs().clamp_min(1e-6)) @ vectors.T * unit
    scale_tril, failed = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
    if int(failed):
        scale_tril, curved = unit.diag(), False
    left = 0.5 * float((slope.square() / values).sum()) if curved else math.inf
    flat = int((values <= _CURVED).sum())
    return Laplace(Gaussian(z, scale_tril), log_prob, left, flat)


def hessian(density: Density, z: Tensor) -> Tensor:
    """Hessian of the log density at `[D]`, `[D, D]`: D gradients of gradients in one batch.

    Falls back to central differences of gradients where an operation cannot be differentiated twice, or
    its second derivative is not finite (`logaddexp` far from a tie), and notes it.
    """
    points = z.detach().expand(density.dim, -1).clone()
    why = "they are not finite"
    try:
        rows = second_derivatives(density, points)
    except RuntimeError as error:
        rows, why = torch.full_like(points, torch.nan), in_words(error)
    if not bool(rows.isfinite().all()):
        density.give_up(f"A Hessian is by differences of gradients, not second derivatives: {why}")
        step = 1e-4 * (1.0 + z.abs())
        shifts = step.diag()
        _, forward = density.log_prob_and_grad(z + shifts)
        _, backward = density.log_prob_and_grad(z - shifts)
        rows = (forward - backward) / (2.0 * step[:, None])
    return ((rows + rows.T) / 2).detach()


# -- what a fit leaves out ------------------------------------------------------------------------


def missed_mass(modes: Sequence[Mode], draws: Tensor) -> float | None:
    """The share of the mass in modes that draws leave out; None where fewer than two are known.

    Each draw is shared out among the modes by their Laplace densities, and what each gets in total is
    held against its share of the evidence.

    Args:
        modes: Those that are known.
        draws: Of q, unconstrained, `[S, D]`.
    """
    if len(modes) < 2:
        return None
    evidence = torch.tensor([mode.log_evidence for mode in modes], dtype=torch.float64)
    shares = evidence.softmax(0)
    z = draws.double().cpu()
    densities = torch.stack([_log_density(mode.gaussian, z) for mode in modes], -1)
    visited = (densities + shares.log()).nan_to_num(nan=-math.inf).softmax(-1).nanmean(0)
    return float(shares[visited < _FAINT * shares].sum())


def with_modes(status: Status, modes: Sequence[Mode], guide: Guide) -> Status:
    """A fit's status with the modes that the searches before it have found.

    Args:
        status: How the fit ended.
        modes: None where there were no searches.
        guide: The trained guide.
    """
    if not modes:
        return status
    density = guide.density
    missed = None
    if not guide.point and len(modes) > 1:
        with torch.no_grad(), RandomStream(_SEED), isolated(density.dtype, density.device):
            missed = missed_mass(modes, density.block.pack(guide.draw(_DRAWS).z))
    return dataclasses.replace(status, modes=len(modes), missed=missed)


def modes_words(modes: Sequence[Mode]) -> str:
    """What is to be said of several modes, best first."""
    lead = modes[0].log_evidence - modes[1].log_evidence
    if lead < _CLOSE_CALL:
        return (
            f"Searches from several points ended in {len(modes)} modes, and Laplace's log evidence of "
            f"the best is only {lead:.1f} nats above the next: this guide covers one of them"
        )
    return (
        f"Searches from several points ended in {len(modes)} modes; this is the best, by "
        f"{lead:.1f} nats of Laplace's log evidence"
    )


def _log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    """Log density at `[S, D]`, up to what all Gaussians have in common: `[S]`."""
    loc, tril = gaussian.loc.double().cpu(), gaussian.scale_tril.double().cpu()
    unit = torch.linalg.solve_triangular(tril, (z - loc).T, upper=False)
    return -0.5 * unit.square().sum(0) - tril.diagonal().log().sum()

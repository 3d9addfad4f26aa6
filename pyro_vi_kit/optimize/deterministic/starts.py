"""Where to begin: modes found from several points, and the Gaussian to measure in.

The searches run side by side, so that on a small model six of them take the time of one. What they
find is ranked by Laplace's estimate of the evidence. Where no search ends in a mode (a funnel has none)
the way that they took is searched for the Gaussian with the highest ELBO (Zhang et al. 2022,
Pathfinder, with exact Hessians).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import generator_of, seed_of
from pyro_vi_kit.optimize.deterministic.draws import matched_normals, standard_normals
from pyro_vi_kit.optimize.deterministic.laplace import Laplace, laplace
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import Peak
from pyro_vi_kit.optimize.deterministic.parametrisation import Dense, Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search

_STARTS = 6
_MORE = 32
# On data of more numbers than this, six points take longer than one.
_LARGE = 200_000
# The evidence of a mode this many nats below the highest density is not worth a Hessian.
_DEPTH = 30.0
_WAYPOINTS = 8
# Nats; skewness costs a few. A funnel's mode, deep in its neck, misses by hundreds.
_SHORTFALL = 5.0


@dataclass(frozen=True)
class Found:
    """What the searches for a mode came to.

    Attributes:
        best: The Gaussian to go on from.
        trusted: Whether it sits at a mode, and the ELBO there bears that out.
        peaks: The modes that were found, best first.
    """

    best: Gaussian
    trusted: bool
    peaks: tuple[Peak, ...] = ()

    @property
    def modes(self) -> tuple[float, ...]:
        """Laplace's log evidence of each mode, nats, best first."""
        return tuple(peak.log_evidence for peak in self.peaks)

    @property
    def gaussians(self) -> tuple[Gaussian, ...]:
        """Laplace's approximation at each of them."""
        return tuple(peak.gaussian for peak in self.peaks)


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

    def negative(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = search.evaluate(z, jacobian=jacobian)
        return -log_p, -gradient

    def minimise(points: Tensor) -> list[Minimum]:
        found = search.minimise(
            negative,
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
    more = standard_normals(_MORE, search.density.dim, generator)
    found = minimise(search.density.cast(more))
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


def find_frame(search: Search, starts: Tensor) -> Found:
    """A Gaussian to measure in: Laplace's at the best mode, or the best on the way to none.

    Args:
        search: The fit.
        starts: Where to begin, `[M, D]`.

    Raises:
        ModelError: If the log density is finite nowhere.
    """
    found = sorted(find_modes(search, starts), key=lambda m: m.value)
    if search.stopped:
        return Found(round_at(found[0].x), False)
    modes = expansions(search, found)
    peaks = tuple(Peak(m.gaussian, m.log_evidence) for m in modes)
    if search.stopped:
        return Found(modes[0].gaussian if modes else round_at(found[0].x), bool(modes))
    # Where the posterior is near its Laplace approximation, ELBO and evidence are near each other.
    if modes and _elbo(search, modes[0].gaussian) > peaks[0].log_evidence - _SHORTFALL:
        return Found(modes[0].gaussian, True, peaks)
    return Found(_best_on_the_way(search, found, modes), False, peaks)


def expansions(search: Search, found: list[Minimum]) -> list[Laplace]:
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
        at = settled(search, laplace(search, end.x, -end.value, -end.gradient))
        if at.trusted and not any(_near(m, at.log_prob, at.gaussian.loc) for m in modes):
            modes.append(at)
    modes.sort(key=lambda m: -m.log_evidence)
    return modes


def settled(search: Search, at: Laplace) -> Laplace:
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
    return abs(mode.log_prob - log_prob) < 0.1 and _distance(mode.gaussian, z) < 0.5


def _distance(gaussian: Gaussian, z: Tensor) -> float:
    shift = (z - gaussian.loc)[:, None]
    return float(torch.linalg.solve_triangular(gaussian.scale_tril, shift, upper=False).norm())


def _best_on_the_way(search: Search, found: list[Minimum], modes: list[Laplace]) -> Gaussian:
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
    shape = Dense(gaussian)
    draws = min(max(32, 2 * search.density.dim + 2), 128)
    noise = search.density.cast(
        matched_normals(draws, shape.noise, seed_of(search.seed, "candidates"))
    )
    x = shape.start()
    loss, _ = shape.loss(x, noise, *search.evaluate(shape.place(x, noise)))
    return -float(loss) if math.isfinite(float(loss)) else -math.inf

"""Gaussian guides by fixed-draw L-BFGS (sample-average approximation).

With its noise held fixed the ELBO is an ordinary function, and L-BFGS needs tens of evaluations where
stochastic gradients need thousands (Giordano, Ingram & Broderick 2024; Burroni, Domke & Sheldon
2023). The search runs in coordinates in which the posterior is roughly round. Each optimum is put to
fresh draws: their gradient there says how much the fixed ones misled, in nats; when that is too much,
the fresh draws, twice as many, are the next to be held fixed. Where that would take too many of them,
natural gradients on ever new draws do the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Reason, Status
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.families import Family, GaussianFamily, PointMass
from pyro_vi_kit.guides.gaussian.low_rank import LowRankNormal
from pyro_vi_kit.guides.gaussian.structured import BlockNormal
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import (
    Found,
    find_frame,
    find_modes,
    modes_words,
    starting_points,
    with_modes,
)
from pyro_vi_kit.optimize.deterministic.natural_gradient import BATCH, natural_steps, shortfall
from pyro_vi_kit.optimize.deterministic.parametrisation import (
    Blocked,
    Dense,
    Diagonal,
    Gaussian,
    GaussianParametrisation,
    LowRank,
)
from pyro_vi_kit.optimize.deterministic.search import Search, matched_normals
from pyro_vi_kit.optimize.result import Outcome

NAME = "lbfgs"
_MAX_DRAWS = 8192
# Above, new draws for each step cost less than more fixed ones: logistic regression in 500 dimensions.
_FEW_DIMS = 50
_MAX_STEPS = 4096
# Of the ELBO on one set of draws; a funnel takes fifty. The next set goes on from where it stopped.
_MAX_EVALUATIONS = 200
_CHECK = 2048
# What is asked for is out of reach in hundreds of dimensions: nats per dimension.
_PER_DIM = 1e-4
# Of more dimensions a dense Gaussian costs more than a better start is worth.
_DENSE_DIM = 200
# What a fit that only has to be a good start may miss, in nats, and may take.
_ROUGH = 0.3
_ROUGH_DRAWS = 1024
# A low-rank fit that takes more is stopped.
_LOW_RANK_DRAWS = 4096
# The Hessian takes D points of D numbers, and draws have to outnumber dimensions.
MAX_DIM = 1000


@dataclass(frozen=True)
class Quality:
    """How good a Gaussian is, measured on draws that it was not fitted to.

    Attributes:
        elbo: Nats.
        se: Its standard error; moment-matched draws have less than independent ones.
        gap: Nats by which the ELBO falls short of the family's best, as these draws see it: what a
            Newton step on them promises. Their own noise adds to it, so it errs upwards.
    """

    elbo: float
    se: float
    gap: float


@dataclass
class _Stage:
    """A Gaussian under way: the family's parameters, and what is known of them."""

    shape: GaussianParametrisation
    x: Tensor
    draws: int
    found: Minimum
    quality: Quality


def applies_to(guide: object) -> bool:
    """Whether a guide is one Gaussian, or a point, over all latents of a model without parameters.

    A Gaussian of more than 1,000 dimensions is left to stochastic steps.
    """
    if not isinstance(guide, Guide) or guide.density.params or len(guide.blocks) > 1:
        return False
    family = guide.family_of(guide.blocks[0])
    if isinstance(family, PointMass):
        return True
    return family.gaussian is not None and guide.density.dim <= MAX_DIM


def fit(guide: Guide, search: Search, start: Tensor | Gaussian | None = None) -> Outcome:
    """Fit a Gaussian or point guide to the ELBO, in place.

    Args:
        guide: One for which `applies_to` holds.
        search: Model, seed of the fixed draws, tolerance and budget.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian to go on from.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    family = guide.family_of(guide.blocks[0])
    if isinstance(family, PointMass):
        return _fit_point(family, search, start.loc if isinstance(start, Gaussian) else start)
    frame = find_frame(search, start)
    best, stage = _fit_gaussian(search, family, frame)
    _hand_over(family, best, stage)
    return search.outcome(NAME, with_modes(_status(search, stage, frame), frame.modes, guide))


def prefit(search: Search, start: Tensor | Gaussian | None) -> Found:
    """A good Gaussian for a flow or a multi-sample fit to start from, and the modes that were met.

    Args:
        search: Model, seed and budget.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian to go on from.

    Raises:
        KeyboardInterrupt: If the user interrupts: of the fit that it is for, nothing is done yet.
    """
    found = find_frame(search, start)
    best = found.best
    if not search.stopped:
        shape = Dense(best) if search.density.dim <= _DENSE_DIM else Diagonal(best)
        stage = _grow(search, shape, 0.1)
        best = stage.shape.gaussian(stage.x)
    search.require_whole()
    return Found(best, found.trusted, found.modes)


def best_gaussian(search: Search, found: Found, *, diagonal: bool = False) -> Gaussian:
    """The Gaussian of the highest ELBO, as part of a fit of something else.

    Args:
        search: That fit.
        found: What its searches for modes came to.
        diagonal: Whether latents are to be independent in it.
    """
    if search.stopped:
        return found.best
    shape = Diagonal(found.best) if diagonal else Dense(found.best)
    return _rough(search, shape, search.tolerance)


def _rough(search: Search, shape: GaussianParametrisation, tolerance: float) -> Gaussian:
    """A rough fit, whose losses are not those of the guide that was asked for."""
    known = len(search.losses)
    stage = _grow(search, shape, tolerance, polish=False)
    del search.losses[known:]
    return stage.shape.gaussian(stage.x) if math.isfinite(stage.quality.elbo) else shape.frame


def _fit_gaussian(search: Search, family: Family, found: Found) -> tuple[Gaussian, _Stage | None]:
    """The Gaussian to measure in, and the family's best; None where there was no time for it."""
    frame = found.best
    # Units taken off the way to no mode may be far too small, and so would be the gap seen in them.
    lost = family.gaussian in ("diagonal", "blocks") and not found.trusted
    wanted = (lost or family.gaussian == "low_rank") and search.density.dim <= _DENSE_DIM
    if wanted and not search.stopped:
        # Any covariance: the best of low rank is near its own, and that one is easier.
        frame = _rough(search, Dense(frame), max(search.tolerance, _ROUGH))
    if search.stopped:
        return frame, None
    return frame, _grow(search, _shape(family, frame), search.tolerance)


def _shape(family: Family, frame: Gaussian) -> GaussianParametrisation:
    if family.gaussian == "dense":
        return Dense(frame)
    if isinstance(family, LowRankNormal):
        return LowRank(frame, family.factor.shape[1])
    if isinstance(family, BlockNormal):
        return Blocked(frame, family.layout)
    return Diagonal(frame)


def _hand_over(family: Family, frame: Gaussian, stage: _Stage | None) -> None:
    """Give the family what was found; the frame's nearest member where nothing was."""
    if isinstance(family, LowRankNormal) and stage is not None:
        shape: LowRank = stage.shape  # type: ignore[assignment]
        family.become(*shape.parts(stage.x))
    elif isinstance(family, GaussianFamily):
        gaussian = frame if stage is None else stage.shape.gaussian(stage.x)
        family.start_from(gaussian.loc, gaussian.scale_tril)


def _fit_point(family: PointMass, search: Search, start: Tensor | None) -> Outcome:
    starts = starting_points(search) if start is None else start.unsqueeze(0)
    found = find_modes(search, starts, jacobian=False, tolerance=1e-9)
    mode = min(found, key=lambda m: (not m.converged, m.value))
    with torch.no_grad():
        family.loc.copy_(mode.x)
    search.losses.append(mode.value)
    if search.stopped:
        status = search.stopped_status()
    elif mode.converged:
        status = Status(True, "converged", "The mode of the constrained density was found.")
    else:
        status = Status(
            False,
            "not converged",
            f"The mode search gave up ({mode.message}): the density may have no mode (a hierarchical "
            "sd at 0 does this). Use guide='mean_field'.",
        )
    return search.outcome(NAME, status)


def _grow(
    search: Search, shape: GaussianParametrisation, tolerance: float, *, polish: bool = True
) -> _Stage:
    """Optimise on few draws, ask fresh ones, and go on with those until they agree."""
    tolerance = _reachable(search, tolerance)
    max_draws = _LOW_RANK_DRAWS if isinstance(shape, LowRank) else _MAX_DRAWS
    max_draws = max_draws if polish else _ROUGH_DRAWS
    many_dims = isinstance(shape, Dense) and search.density.dim > _FEW_DIMS
    draws = 2 ** math.ceil(math.log2(max(64, 4 * shape.noise)))
    x = shape.start()
    while True:
        x, found = _optimise(search, shape, x, _noise(search, shape, draws), tolerance)
        shape, x = shape.recentre(x)
        quality = _quality(search, shape, x, _noise(search, shape, 2 * draws))
        stage = _Stage(shape, x, draws, found, quality)
        if search.stopped or quality.gap <= tolerance or not math.isfinite(quality.elbo):
            return stage
        if many_dims or 2 * draws > max_draws:
            finish = polish and isinstance(shape, Dense)
            return _polished(search, stage, tolerance) if finish else stage
        draws *= 2


def _reachable(search: Search, tolerance: float) -> float:
    """What can be asked for in so many dimensions, nats."""
    return max(tolerance, _PER_DIM * search.density.dim)


def _polished(search: Search, stage: _Stage, tolerance: float) -> _Stage:
    """Natural gradients until what they may have missed is below the tolerance."""
    gaussian = stage.shape.gaussian(stage.x)
    # The fixed draws count as steps taken: an average over them is what there is.
    steps = first = max(1, stage.draws // BATCH)
    while True:
        gaussian = natural_steps(search, gaussian, steps=steps, first=first)
        first += steps
        shape = Dense(gaussian)
        x = shape.start()
        if search.stopped:
            return _Stage(shape, x, stage.draws, stage.found, stage.quality)
        gap, se = shortfall(search, gaussian, _CHECK)
        quality = _quality(search, shape, x, _noise(search, shape, _CHECK))
        quality = Quality(quality.elbo, quality.se, max(gap, 0.0) + 2.0 * se)
        stage = _Stage(shape, x, _CHECK // 2, stage.found, quality)
        if quality.gap <= tolerance or first >= _MAX_STEPS:
            return stage
        steps = min(first, _MAX_STEPS - first)


def _noise(search: Search, shape: GaussianParametrisation, draws: int) -> Tensor:
    """The fixed normals for this many draws, `[draws, noise]`."""
    noise = matched_normals(draws, shape.noise, seed_of(search.seed, "fixed draws", draws))
    return search.density.cast(noise)


def _optimise(
    search: Search, shape: GaussianParametrisation, x: Tensor, noise: Tensor, tolerance: float
) -> tuple[Tensor, Minimum]:
    """Minimise the negative ELBO on this noise `[S, noise]`."""

    def negative_elbo(points: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = search.evaluate(shape.reparameterise(points[0], noise))
        value, slope = shape.loss(points[0], noise, log_p, gradient)
        return value.unsqueeze(0), slope.unsqueeze(0)

    for log_factor in (0.0, -1.0, -2.0, -4.0):
        # Far from the mode the model may overflow: draws closer to it do less.
        (found,) = search.minimise(
            negative_elbo,
            [shape.shrunk(x, log_factor)],
            tolerance=0.1 * tolerance,
            curvature=shape.curvature,
            max_evaluations=_MAX_EVALUATIONS,
            record=True,
        )
        if math.isfinite(found.value) or search.stopped:
            break
    return found.x, found


def _quality(search: Search, shape: GaussianParametrisation, x: Tensor, noise: Tensor) -> Quality:
    """ELBO and its shortfall on fresh draws."""
    log_p, gradient = search.evaluate(shape.reparameterise(x, noise))
    loss, slope = shape.loss(x, noise, log_p, gradient)
    gap = 0.5 * float((slope.square() / shape.curvature).sum())
    pulled = shape.vjp(x, gradient)
    # Matched draws average linear and quadratic functions without error; what is left is noise.
    linear, quadratic = pulled.mean(0), pulled.T @ noise / len(noise)
    explained = noise @ linear + 0.5 * ((noise @ quadratic) * noise).sum(-1)
    rest = log_p - explained
    # A draw and its mirror image are not independent; their means are.
    half = len(noise) // 2
    pairs = (rest[:half] + rest[half:]) / 2
    return Quality(-float(loss), float(pairs.std()) / math.sqrt(half), gap)


def _status(search: Search, stage: _Stage | None, frame: Found) -> Status:
    if search.stopped or stage is None:
        return search.stopped_status()
    quality, found = stage.quality, stage.found
    if not math.isfinite(quality.elbo + quality.gap):
        return Status(
            False,
            "diverged",
            "The ELBO or its slope is not finite on fresh draws: the guide reaches where the model's "
            "density is zero or overflows. Look at vi.check(model), or give init={site: value}.",
        )
    said = (
        f"ELBO {quality.elbo:.3f} nats (s.e. {quality.se:.3f}) on {2 * stage.draws} fresh draws, "
        f"within {max(quality.gap, 0.001):.3f} of the guide's best"
    )
    tolerance = _reachable(search, search.tolerance)
    reason: Reason = "not converged"
    if quality.gap <= tolerance:
        reason, advice = "converged", f"{said}."
    elif not found.converged:
        advice = (
            f"L-BFGS stopped ({found.message}); {said}. The posterior may have no end in some "
            "direction: look at vi.check(model) for improper priors, or try method='stochastic'."
        )
    else:
        advice = (
            f"{said}, tolerance {tolerance:g}: this posterior needs more draws than were spent. "
            "Give a larger tol=, or try guide='affine_coupling'."
        )
    several = f" {modes_words(frame.modes)}." if len(frame.modes) > 1 else ""
    return Status(reason == "converged", reason, advice + several, quality.gap)

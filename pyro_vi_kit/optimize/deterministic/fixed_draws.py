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
from torch import Tensor, nn

from pyro_vi_kit.core.contracts import Reason, Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.families import DenseNormal, DiagonalNormal, GaussianFamily, PointMass
from pyro_vi_kit.guides.gaussian.low_rank import LowRankNormal
from pyro_vi_kit.guides.gaussian.structured import BlockNormal
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.blocks import Blocked
from pyro_vi_kit.optimize.deterministic.draws import matched_normals
from pyro_vi_kit.optimize.deterministic.low_rank import LowRankShape
from pyro_vi_kit.optimize.deterministic.minimise import Minimum
from pyro_vi_kit.optimize.deterministic.modes import with_peaks
from pyro_vi_kit.optimize.deterministic.natural_gradient import BATCH, climb, shortfall
from pyro_vi_kit.optimize.deterministic.parametrisation import Dense, Diagonal, Gaussian, Shape
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.deterministic.starts import Found, find_frame, find_modes, starting_points
from pyro_vi_kit.optimize.result import Budget, Outcome, cut_short

NAME = "lbfgs"
_MAX_DRAWS = 8192
# Above, new draws for each step cost less than more fixed ones: logistic regression in 500 dimensions.
_FEW_DIMS = 50
_MAX_STEPS = 4096
# Of the ELBO on one set of draws; a funnel takes fifty. The next set goes on from where it stopped.
_MAX_EVALUATIONS = 200
_CHECK = 2048
# A mode this many nats behind holds a hundredth of the mass.
_CLOSE_CALL = 4.6
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

    shape: Shape
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
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, PointMass):
        return True
    gaussian = isinstance(family, DiagonalNormal | DenseNormal | LowRankNormal | BlockNormal)
    return gaussian and guide.density.dim <= MAX_DIM


def fit(
    guide: Guide,
    *,
    seed: int,
    tolerance: float,
    budget: Budget,
    progress: Progress,
    start: Tensor | Gaussian | None = None,
) -> Outcome:
    """Fit a Gaussian or point guide to the ELBO, in place.

    Args:
        guide: One for which `applies_to` holds.
        seed: Of the fixed draws.
        tolerance: Nats by which the ELBO may fall short of the family's best.
        budget: What may be spent.
        progress: Told each evaluation.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian to go on from.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    search = Search(guide.density, seed, budget, progress)
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, PointMass):
        return _fit_point(family, search, start.loc if isinstance(start, Gaussian) else start)
    frame = _frame(search, start)
    best, stage = _fit_gaussian(search, family, frame, tolerance)
    _hand_over(family, best, stage)
    status = with_peaks(_status(search, stage, tolerance, frame), frame.peaks, guide)
    return Outcome(
        NAME,
        status,
        search.losses,
        search.evaluations,
        engine=search.engine,
        error=search.error,
    )


def prefit(
    density: Density,
    seed: int,
    budget: Budget,
    start: Tensor | Gaussian | None,
    *,
    power: float = 1.0,
) -> Found:
    """A good Gaussian for a flow or a multi-sample fit to start from, and the modes that were met.

    Args:
        density: The model.
        seed: Of the fixed draws.
        budget: What may be spent.
        start: Unconstrained starting point `[D]`, the only one then, or a Gaussian to go on from.
        power: What the density is raised to, in (0, 1].

    Raises:
        KeyboardInterrupt: If the user interrupts: of the fit that it is for, nothing is done yet.
    """
    search = Search(density, seed, budget, Progress("start", enabled=False), power=power)
    found = _frame(search, start)
    best = found.best
    if not search.stopped:
        stage = _grow(search, Dense(best) if density.dim <= _DENSE_DIM else Diagonal(best), 0.1)
        best = stage.shape.gaussian(stage.x)
    search.require_whole()
    return Found(best, found.trusted, found.peaks)


def best_gaussian(
    search: Search, found: Found, tolerance: float, *, diagonal: bool = False
) -> Gaussian:
    """The Gaussian of the highest ELBO, as part of a fit of something else.

    Args:
        search: That fit.
        found: What its searches for modes came to.
        tolerance: Nats by which its ELBO may fall short.
        diagonal: Whether latents are to be independent in it.
    """
    if search.stopped:
        return found.best
    known = len(search.losses)
    shape = Diagonal(found.best) if diagonal else Dense(found.best)
    stage = _grow(search, shape, tolerance, polish=False)
    # They are not the losses of the guide that was asked for.
    del search.losses[known:]
    return stage.shape.gaussian(stage.x) if math.isfinite(stage.quality.elbo) else found.best


def _frame(search: Search, start: Tensor | Gaussian | None) -> Found:
    if isinstance(start, Gaussian):
        return Found(start, True)
    return find_frame(search, starting_points(search) if start is None else start.unsqueeze(0))


def _fit_gaussian(
    search: Search, family: nn.Module, found: Found, tolerance: float
) -> tuple[Gaussian, _Stage | None]:
    """The Gaussian to measure in, and the family's best; None where there was no time for it."""
    frame = found.best
    # Units taken off the way to no mode may be far too small, and so would be the gap seen in them.
    lost = isinstance(family, DiagonalNormal | BlockNormal) and not found.trusted
    if (lost or isinstance(family, LowRankNormal)) and not search.stopped:
        frame = _rough(search, frame, tolerance)
    if search.stopped:
        return frame, None
    return frame, _grow(search, _shape(family, frame), tolerance)


def _rough(search: Search, frame: Gaussian, tolerance: float) -> Gaussian:
    """A rough fit of any covariance: the best of low rank is near its own, and that one is easier."""
    if search.density.dim > _DENSE_DIM:
        return frame
    known = len(search.losses)
    stage = _grow(search, Dense(frame), max(tolerance, _ROUGH), polish=False)
    # They are not the losses of the guide that was asked for.
    del search.losses[known:]
    return stage.shape.gaussian(stage.x) if math.isfinite(stage.quality.elbo) else frame


def _shape(family: nn.Module, frame: Gaussian) -> Shape:
    if isinstance(family, DenseNormal):
        return Dense(frame)
    if isinstance(family, LowRankNormal):
        return LowRankShape(frame, family.factor.shape[1])
    if isinstance(family, BlockNormal):
        return Blocked(frame, family.layout)
    return Diagonal(frame)


def _hand_over(family: nn.Module, frame: Gaussian, stage: _Stage | None) -> None:
    """Give the family what was found; the frame's nearest member where nothing was."""
    if isinstance(family, LowRankNormal) and stage is not None:
        shape: LowRankShape = stage.shape  # type: ignore[assignment]
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
        status = stopped_status(search)
    elif mode.converged:
        status = Status(True, "converged", "The mode of the constrained density was found.")
    else:
        status = Status(
            False,
            "not converged",
            f"The mode search gave up ({mode.message}): the density may have no mode (a hierarchical "
            "sd at 0 does this). Use guide='mean_field'.",
        )
    return Outcome(
        NAME,
        status,
        search.losses,
        search.evaluations,
        engine=search.engine,
        error=search.error,
    )


def _grow(search: Search, shape: Shape, tolerance: float, *, polish: bool = True) -> _Stage:
    """Optimise on few draws, ask fresh ones, and go on with those until they agree."""
    tolerance = _reachable(search, tolerance)
    max_draws = _LOW_RANK_DRAWS if isinstance(shape, LowRankShape) else _MAX_DRAWS
    max_draws = max_draws if polish else _ROUGH_DRAWS
    many_dims = isinstance(shape, Dense) and search.density.dim > _FEW_DIMS
    draws = 2 ** math.ceil(math.log2(max(64, 4 * shape.noise)))
    x = shape.start()
    while True:
        x, found = _optimise(search, shape, x, _noise(search, shape, draws), tolerance)
        shape, x = shape.reframed(x)
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
        gaussian = climb(search, gaussian, steps=steps, first=first)
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


def _noise(search: Search, shape: Shape, draws: int) -> Tensor:
    """The fixed normals for this many draws, `[draws, noise]`."""
    noise = matched_normals(draws, shape.noise, seed_of(search.seed, "fixed draws", draws))
    return search.density.cast(noise)


def _optimise(
    search: Search, shape: Shape, x: Tensor, noise: Tensor, tolerance: float
) -> tuple[Tensor, Minimum]:
    """Minimise the negative ELBO on this noise `[S, noise]`."""

    def negative_elbo(points: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = search.evaluate(shape.place(points[0], noise))
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


def _quality(search: Search, shape: Shape, x: Tensor, noise: Tensor) -> Quality:
    """ELBO and its shortfall on fresh draws."""
    log_p, gradient = search.evaluate(shape.place(x, noise))
    loss, slope = shape.loss(x, noise, log_p, gradient)
    gap = 0.5 * float((slope.square() / shape.curvature).sum())
    pulled = shape.pull(x, gradient)
    # Matched draws average linear and quadratic functions without error; what is left is noise.
    linear, quadratic = pulled.mean(0), pulled.T @ noise / len(noise)
    explained = noise @ linear + 0.5 * ((noise @ quadratic) * noise).sum(-1)
    rest = log_p - explained
    # A draw and its mirror image are not independent; their means are.
    half = len(noise) // 2
    pairs = (rest[:half] + rest[half:]) / 2
    return Quality(-float(loss), float(pairs.std()) / math.sqrt(half), gap)


def _status(search: Search, stage: _Stage | None, tolerance: float, frame: Found) -> Status:
    if search.stopped or stage is None:
        return stopped_status(search)
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
    several = f" {modes_words(frame.modes)}." if len(frame.modes) > 1 else ""
    tolerance = _reachable(search, tolerance)

    def status(reason: Reason, advice: str) -> Status:
        return Status(reason == "converged", reason, advice + several, quality.gap)

    if quality.gap > tolerance and not found.converged:
        return status(
            "not converged",
            f"L-BFGS stopped ({found.message}); {said}. The posterior may have no end in some "
            "direction: look at vi.check(model) for improper priors, or try method='stochastic'.",
        )
    if quality.gap > tolerance:
        return status(
            "not converged",
            f"{said}, tolerance {tolerance:g}: this posterior needs more draws than were spent. "
            "Give a larger tol=, or try guide='affine_coupling'.",
        )
    return status("converged", f"{said}.")


def modes_words(modes: tuple[float, ...]) -> str:
    """What is to be said of several modes, given Laplace's log evidence of each, best first."""
    lead = modes[0] - modes[1]
    if lead < _CLOSE_CALL:
        return (
            f"Searches from several points ended in {len(modes)} modes, and Laplace's log evidence of "
            f"the best is only {lead:.1f} nats above the next: this guide covers one of them"
        )
    return (
        f"Searches from several points ended in {len(modes)} modes; this is the best, by "
        f"{lead:.1f} nats of Laplace's log evidence"
    )


def stopped_status(search: Search) -> Status:
    """How a fit ended that was cut short by its budget, by the user, or by what was raised."""
    kept = "the best point so far was kept."
    if search.error is not None:
        return cut_short(search.error, f"; {kept}")
    return Status(False, "budget", f"The budget ran out; {kept}")

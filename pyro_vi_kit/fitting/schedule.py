"""How long steps go on, and with what rate: what a `Schedule` or a course of epochs is filled with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.fitting.request import Request, Training
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.optimize.deterministic import fixed_draws, forward_kl_refinement
from pyro_vi_kit.optimize.engines import EagerEngine, PyroEngine, StreamedBatches
from pyro_vi_kit.optimize.result import Budget, Outcome
from pyro_vi_kit.optimize.stochastic import by_epochs as epochs
from pyro_vi_kit.optimize.stochastic import stochastic
from pyro_vi_kit.optimize.stochastic.stochastic import Schedule

PyroGuide = Callable[..., Any]

# Iterates are then a tenth of a posterior sd from their mean, and its average is not at rest.
_LARGE_RATE = 0.02
# Between modes that have parted mass hardly goes back: at the full rate a flow that had four of them
# fell into one, at this share of it all four stayed.
_ANNEALED = 0.2
# Its windows, at such a rate, before that may fall.
_PATIENCE = 20


def adaptive(
    training: Training, engine: EagerEngine | PyroEngine, whitened: bool
) -> tuple[Outcome, float]:
    """Steps whose rate falls, and which stop, by themselves.

    Args:
        training: What is trained, and how.
        engine: What executes steps.
        whitened: Whether parameters are measured in posterior sds.

    Returns:
        How it went, and the bound at its end in nats.
    """
    request, guide = training.request, training.guide
    annealed = bool(request.objective.warmup) and not fixed_draws.applies_to(guide)
    schedule = _schedule(request, guide, engine, whitened, annealed)
    refine = None
    if annealed and engine.batches is None and forward_kl_refinement.applies_to(guide):
        search = training.search(tolerance=schedule.tolerance)
        refine = functools.partial(forward_kl_refinement.improve, guide, search)
    label = f"{guide.name} ({request.objective.name})"
    with Progress(label, schedule.max_steps, request.progress) as progress:
        return stochastic.fit(
            engine,
            schedule,
            budget=training.budget,
            progress=progress,
            checkpoint=training.checkpoint,
            behind_warmup=refine,
        )


def _schedule(
    request: Request,
    guide: Guide,
    engine: EagerEngine | PyroEngine,
    whitened: bool,
    annealed: bool,
) -> Schedule:
    """What steps of this guide go by."""
    batches, params = engine.batches, bool(guide.density.params)
    gaussian, learns = fixed_draws.applies_to(guide), params or _encoded(guide)
    # The error of an average falls with its length alone; of minibatches' noise there is much.
    least = 100 if batches is None or learns else 500
    # Over whole epochs of reshuffled rows the noise of minibatches cancels.
    epoch = 1 if batches is None else batches.epoch
    window = epoch * -(-least // epoch)
    rate = _first_rate(guide, whitened) * (_ANNEALED if annealed else 1.0)
    patience = 2 if gaussian else 4
    return Schedule(
        rate=rate,
        falls=2 if rate > _LARGE_RATE else 1,
        window=window,
        epoch=epoch,
        patience=_PATIENCE if annealed else patience,
        max_steps=request.steps or stochastic.MAX_STEPS,
        replicates=_replicates(engine, guide, window),
        tolerance=_tolerance(request, guide),
        relative=_relative(request) if learns else 0.0,
        noisy=batches is not None,
        warmup=request.objective.warmup,
        # What is flat at first gets sharper, and steps noisier.
        warm=1.0 / _ANNEALED if annealed else 1.0,
        tight=not (params or guide.point) and batches is None,
    )


def adaptive_svi(
    request: Request, guide: str, engine: PyroEngine, budget: Budget
) -> tuple[Outcome, float]:
    """The same for a Pyro guide callable of the user's, of which nothing is known.

    Args:
        request: How it is trained.
        guide: What it is called.
        engine: What executes steps.
        budget: What may be spent.
    """
    warmup = request.objective.warmup
    schedule = Schedule(
        rate=0.02 * (_ANNEALED if warmup else 1.0),
        patience=_PATIENCE if warmup else 4,
        max_steps=request.steps or stochastic.MAX_STEPS,
        replicates=_of_pyro(engine),
        tolerance=request.tolerance,
        relative=_relative(request),
        warmup=warmup,
        warm=1.0 / _ANNEALED if warmup else 1.0,
    )
    label = f"{guide} ({request.objective.name})"
    with Progress(label, schedule.max_steps, request.progress) as progress:
        return stochastic.fit(engine, schedule, budget=budget, progress=progress)


def by_epochs(
    training: Training, engine: EagerEngine | PyroEngine, whitened: bool
) -> tuple[Outcome, float]:
    """Steps by epochs, as ``epochs=`` lays them out; see `adaptive`."""
    request = training.request
    if request.epochs is None or not isinstance(engine, EagerEngine):
        raise AssertionError("epochs= goes with the engines of this package alone")
    rate = _first_rate(engine.guide, whitened)
    course = epochs.laid_out(engine, request.epochs, rate=rate, max_steps=request.steps)
    label = f"{training.guide.name} ({request.objective.name})"
    with Progress(label, course.limit, request.progress) as progress:
        return epochs.fit(
            engine,
            course,
            budget=training.budget,
            progress=progress,
            checkpoint=training.checkpoint,
        )


def _encoded(guide: Guide) -> bool:
    """Whether the guide has an encoder."""
    return any(b.plate is not None and guide.table(b) is None for b in guide.blocks)


def _replicates(engine: EagerEngine | PyroEngine, guide: Guide, window: int) -> int:
    """Draws of an evaluation of the bound, which may cost half of the steps before it."""
    batches, encoded = engine.batches, _encoded(guide)
    if isinstance(batches, StreamedBatches) and not encoded:
        # An evaluation reads all data, for all replicates at once: 32 draws of the guide.
        return max(8, 32 // engine.particles)
    if isinstance(engine, PyroEngine):
        return _of_pyro(engine)
    if encoded:
        return 16
    if batches is None:
        return 256
    # Forwards and back, a step costs three times as much as an evaluation.
    return min(1024, max(16, int(1.5 * window * engine.particles * batches.share)))


def _of_pyro(engine: PyroEngine) -> int:
    """The same where Pyro's own loss is slow to evaluate, one particle after another."""
    return max(16, 64 // engine.particles)


def _relative(request: Request) -> float:
    """Of the bound's size: thousands have noise of their own, and more to gain than anyone waits for."""
    return 0.0 if request.own_tolerance else 1e-3


def _tolerance(request: Request, guide: Guide) -> float:
    """Nats that may be left to gain; unless the user said so, more of them in more dimensions.

    The last hundredths of a nat take a flow ten times as long as all others; no moment moves by them.
    """
    if request.own_tolerance:
        return request.tolerance
    return max(request.tolerance, 1e-3 * guide.density.dim)


def _first_rate(guide: Guide, whitened: bool) -> float:
    """The learning rate to begin with; it falls by itself, and never rises."""
    if not whitened:
        # Not measured in posterior sds; where a guide starts, they are rather large.
        return 0.005 if _encoded(guide) else 0.02
    if any(guide.table(block) is not None for block in guide.blocks):
        # All rows of a table start alike, some sds from where they belong, and move once an epoch.
        return 0.1
    return 0.01

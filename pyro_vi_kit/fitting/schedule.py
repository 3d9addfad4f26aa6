"""How long steps go on, and with what rate: what a `Schedule` or a course of epochs is filled with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.fitting.request import Request
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.optimize.deterministic import fixed_draws, forward_kl_refinement
from pyro_vi_kit.optimize.engines import BatchSource, EagerEngine, PyroEngine, StreamedBatches
from pyro_vi_kit.optimize.result import Outcome
from pyro_vi_kit.optimize.stochastic import by_epochs, stochastic
from pyro_vi_kit.optimize.stochastic.course import laid_out

PyroGuide = Callable[..., Any]

# Iterates are then a tenth of a posterior sd from their mean, and its average is not at rest.
_LARGE_RATE = 0.02
# Between modes that have parted mass hardly goes back: at the full rate a flow that had four of them
# fell into one, at this share of it all four stayed.
_ANNEALED = 0.2
# Its stretches, at such a rate, before that may fall.
_PATIENCE = 20


def by_themselves(
    request: Request,
    name: str,
    engine: EagerEngine | PyroEngine,
    whitened: bool,
    checkpoint: Checkpoint | None = None,
) -> tuple[Outcome, float]:
    """Steps whose rate falls, and which stop, by themselves.

    Args:
        request: The fit.
        name: What the guide is called.
        engine: What executes steps.
        whitened: Whether parameters are measured in posterior sds.
        checkpoint: Where to keep the state of the fit, and to go on from.

    Returns:
        How it went, and the bound at its end in nats.
    """
    batches = engine.batches
    # Over whole epochs of reshuffled rows the noise of minibatches cancels.
    epoch = 1 if batches is None else batches.epoch
    guide = engine.guide
    gaussian = isinstance(guide, Guide) and fixed_draws.applies_to(guide)
    encoded = isinstance(guide, Guide) and _encoded(guide)
    learns = not isinstance(guide, Guide) or encoded or bool(guide.density.params)
    # The error of an average falls with its length alone; of minibatches' noise there is much.
    least = 100 if batches is None or learns else 500
    stretch = epoch * -(-least // epoch)
    annealed = bool(request.objective.warmup) and not gaussian
    rate = _first_rate(guide, whitened) * (_ANNEALED if annealed else 1.0)
    schedule = stochastic.Schedule(
        rate=rate,
        falls=2 if rate > _LARGE_RATE else 1,
        stretch=stretch,
        epoch=epoch,
        patience=_PATIENCE if annealed else 2 if gaussian else 4,
        max_steps=request.steps or stochastic.MAX_STEPS,
        replicates=_looks(engine, encoded, stretch),
        tolerance=_tolerance(request, guide),
        # A bound in the thousands has noise of its own, and more to gain than anyone waits for.
        relative=1e-3 if learns and not request.own_tolerance else 0.0,
        noisy=batches is not None,
        warmup=request.objective.warmup,
        # What is flat at first gets sharper, and steps noisier.
        warm=1.0 / _ANNEALED if annealed else 1.0,
        tight=isinstance(guide, Guide)
        and not guide.density.params
        and not guide.point
        and batches is None,
    )
    if isinstance(batches, StreamedBatches) and not encoded:
        # A look reads all data, for all replicates at once: 32 draws of the guide.
        replicates = max(8, 32 // engine.particles)
        schedule = dataclasses.replace(schedule, replicates=replicates)
    label = f"{name} ({request.objective.name})"
    with Progress(label, schedule.max_steps, request.progress) as progress:
        return stochastic.fit(
            engine,
            schedule,
            budget=request.budget,
            progress=progress,
            checkpoint=checkpoint,
            behind_warmup=_rounds(request, guide, schedule)
            if annealed and batches is None
            else None,
        )


def by_course(
    request: Request,
    name: str,
    engine: EagerEngine | PyroEngine,
    whitened: bool,
    checkpoint: Checkpoint | None,
) -> tuple[Outcome, float]:
    """Steps by epochs, as ``epochs=`` lays them out; see `by_themselves`."""
    if request.epochs is None or not isinstance(engine, EagerEngine):
        raise AssertionError("epochs= goes with the engines of this package alone")
    rate = _first_rate(engine.guide, whitened)
    course = laid_out(engine, request.epochs, rate=rate, max_steps=request.steps)
    label = f"{name} ({request.objective.name})"
    with Progress(label, course.limit, request.progress) as progress:
        return by_epochs.fit(
            engine, course, budget=request.budget, progress=progress, checkpoint=checkpoint
        )


def _rounds(
    request: Request, guide: Guide | PyroGuide, schedule: stochastic.Schedule
) -> Callable[[], int] | None:
    """What an annealed fit does when its target has its own temperature; None for most guides."""
    if not isinstance(guide, Guide) or not forward_kl_refinement.applies_to(guide):
        return None

    def improve() -> int:
        return forward_kl_refinement.improve(
            guide,
            seed=request.seed,
            tolerance=schedule.tolerance,
            budget=request.budget,
        )

    return improve


def _encoded(guide: Guide) -> bool:
    """Whether the guide has an encoder."""
    return any(b.plate is not None and guide.table(b) is None for b in guide.blocks)


def _looks(engine: EagerEngine | PyroEngine, encoded: bool, stretch: int) -> int:
    """Draws of a look at the bound."""
    if isinstance(engine, PyroEngine):
        # Pyro's own loss is slow to evaluate, one particle after another.
        return max(16, 64 // engine.particles)
    return 16 if encoded else _replicates(engine.batches, stretch * engine.particles)


def _replicates(batches: BatchSource | None, draws: int) -> int:
    """Draws of a look at the bound, which may cost half of the steps before it.

    Args:
        batches: What these steps see.
        draws: Their number, times their particles.
    """
    if batches is None:
        return 256
    # Forwards and back, a step costs three times as much as a look.
    return min(1024, max(16, int(1.5 * draws * batches.share)))


def _tolerance(request: Request, guide: Guide | PyroGuide) -> float:
    """Nats that may be left to gain; unless the user said so, more of them in more dimensions.

    The last hundredths of a nat take a flow ten times as long as all others; no moment moves by them.
    """
    if request.own_tolerance or not isinstance(guide, Guide):
        return request.tolerance
    return max(request.tolerance, 1e-3 * guide.density.dim)


def _first_rate(guide: Guide | PyroGuide, whitened: bool) -> float:
    """The learning rate to begin with; it falls by itself, and never rises."""
    if not isinstance(guide, Guide) or not whitened:
        # Not measured in posterior sds; where a guide starts, they are rather large.
        return 0.005 if isinstance(guide, Guide) and _encoded(guide) else 0.02
    if any(guide.table(block) is not None for block in guide.blocks):
        # All rows of a table start alike, some sds from where they belong, and move once an epoch.
        return 0.1
    return 0.01

"""Training a guide: which method and engine, from where, and with what settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit import streaming
from pyro_vi_kit.approximation import Approximation, GuideApproximation, TraceApproximation
from pyro_vi_kit.density import Density
from pyro_vi_kit.engines import (
    Batches,
    BatchSource,
    CapturedEngine,
    EagerEngine,
    PyroEngine,
    StreamedBatches,
)
from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.methods import fixed_draws, stochastic
from pyro_vi_kit.methods.result import Outcome
from pyro_vi_kit.methods.shapes import Gaussian
from pyro_vi_kit.objectives.estimators import valid as dreg_is_valid
from pyro_vi_kit.posterior import is_small
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.request import Request
from pyro_vi_kit.runtime import default_dtype

PyroGuide = Callable[..., Any]


class Trained(NamedTuple):
    """What training gives.

    Attributes:
        approximation: The trained guide.
        outcome: How it went.
        engine: What executed the steps: ``captured``, ``compiled``, ``eager`` or ``pyro``.
        bound: The objective at the end, nats; None where it is the ELBO.
        note: Why steps were not captured, where they should have been.
    """

    approximation: Approximation
    outcome: Outcome
    engine: str
    bound: float | None
    note: str = ""


def name_of(guide: Guide | PyroGuide) -> str:
    """What a guide is called."""
    if isinstance(guide, Guide):
        return guide.name
    return getattr(guide, "__name__", type(guide).__name__)


def train(
    request: Request,
    name: str,
    trainee: Guide | PyroGuide,
    density: Density | None,
    state: dict[str, Any] | None,
) -> Trained:
    """Train by the method that fits."""
    if not isinstance(trainee, Guide) or density is None:
        return _train_pyro_guide(request, trainee, density, state)
    _require_compatible(request, trainee)
    if _use_fixed_draws(request, trainee):
        with Progress(f"{name} (L-BFGS)", enabled=request.progress) as progress:
            outcome = fixed_draws.fit(
                trainee,
                seed=request.seed,
                tolerance=request.tolerance,
                deadline=request.deadline,
                progress=progress,
                start=_gaussian_of(trainee) if request.resumed else _start(request, density),
            )
        return Trained(
            GuideApproximation(name, trainee, density.params), outcome, outcome.engine, None
        )
    streaming.require_compatible(request, trainee)
    batches = _batches(request, trainee)
    try:
        whitened = request.resumed or _initialise(request, trainee, density, batches)
        request = _with_particles(request, density)
        engine = _engine(request, trainee, density, batches)
        outcome, bound = _run_stochastic(request, name, engine, whitened)
    finally:
        if isinstance(batches, StreamedBatches):
            batches.close()
    approximation = GuideApproximation(name, trainee, engine.params)
    note = engine.note if isinstance(engine, CapturedEngine) and engine.name == "eager" else ""
    bound = bound if request.objective.multi_sample else None
    return Trained(approximation, outcome, engine.name, bound, note)


def _engine(
    request: Request, guide: Guide, density: Density, batches: BatchSource | None
) -> EagerEngine | PyroEngine:
    """What executes the steps."""
    options: dict[str, Any] = {
        "seed": request.seed,
        "batches": batches,
        "optimizer": request.optimizer,
    }
    estimator = estimator_of(request, guide)
    if request.engine == "pyro":
        return PyroEngine(request.model, guide, request.objective, density=density, **options)
    options["estimator"] = estimator
    if request.engine == "eager":
        return EagerEngine(guide, request.objective, **options)
    compiled = request.engine == "compiled"
    return CapturedEngine(guide, request.objective, compiled=compiled, **options)


def estimator_of(request: Request, guide: Guide | PyroGuide) -> str:
    """The gradient estimator that ``estimator=`` stands for."""
    literal = request.engine == "pyro" or not isinstance(guide, Guide)
    possible = not literal and dreg_is_valid(guide, request.objective)  # type: ignore[arg-type]
    if request.estimator == "dreg" and not possible:
        raise OptionError(
            "estimator='dreg' needs a guide of this package with spread, an objective of the Rényi "
            "family (elbo, iwae, renyi) and another engine than 'pyro': use estimator='pathwise'"
        )
    if request.estimator == "auto":
        return "dreg" if possible else "pathwise"
    return request.estimator


def _with_particles(request: Request, density: Density) -> Request:
    """As many particles as cost next to nothing, where the objective was named and K is only noise."""
    if not request.named_objective or request.objective.multi_sample:
        return request
    if request.engine == "pyro":
        particles = 4  # one after the other
    elif density.params:
        particles = 1
    elif density.streamed is not None:
        # The noise of a batch in the means cancels over an epoch. In the spreads it is multiplied by a
        # draw, and does not: particles average it away.
        particles = 4
    else:
        particles = 64 if is_small(density) and density.dim <= fixed_draws.MAX_DIM else 16
    objective = dataclasses.replace(request.objective, particles=particles)  # type: ignore[type-var]
    return dataclasses.replace(request, objective=objective)


def _train_pyro_guide(
    request: Request, guide: PyroGuide, density: Density | None, state: dict[str, Any] | None
) -> Trained:
    if request.method == "lbfgs":
        raise OptionError(
            "method='lbfgs' runs the Gaussian guides of this package; use 'stochastic'"
        )
    if request.batch_size is not None:
        raise OptionError(
            "batch_size= needs guide='amortized'; with a Pyro guide of your own, give the plates of "
            "model and guide a subsample_size"
        )
    engine = PyroEngine(
        request.model,
        guide,
        request.objective,
        seed=request.seed,
        density=density,
        optimizer=request.optimizer,
        state=state,
    )
    estimator_of(request, guide)
    outcome, bound = _run_stochastic(request, name_of(guide), engine, whitened=False)
    dtype = default_dtype() if density is None else density.dtype
    approximation = TraceApproximation(request.model, guide, engine.state, dtype, density)
    bound = bound if request.objective.multi_sample else None
    return Trained(approximation, outcome, engine.name, bound)


def _run_stochastic(
    request: Request, name: str, engine: EagerEngine | PyroEngine, whitened: bool
) -> tuple[Outcome, float]:
    literal = isinstance(engine, PyroEngine)
    batches = engine.batches
    epoch = 1 if batches is None else batches.per_epoch
    streamed = isinstance(batches, StreamedBatches)
    guide = engine.guide
    gaussian = isinstance(guide, Guide) and fixed_draws.applies_to(guide)
    local = isinstance(guide, Guide) and any(block.plate for block in guide.blocks)
    learns = not isinstance(guide, Guide) or local or bool(guide.density.params)
    schedule = stochastic.Schedule(
        rate=_first_rate(guide, whitened),
        # Over whole epochs the noise of batches cancels, and with it that of the averages.
        stretch=epoch * math.ceil(100 / epoch),
        patience=2 if gaussian else 4,
        max_steps=request.steps or stochastic.MAX_STEPS,
        # Pyro's own loss is slow to evaluate, one particle after another.
        replicates=16 if literal or local else 256,
        tolerance=_tolerance(request, guide),
        # A bound in the thousands has noise of its own, and more to gain than anyone waits for.
        relative=1e-3 if learns and not request.own_tolerance else 0.0,
        tight=isinstance(guide, Guide)
        and not guide.density.params
        and not guide.point
        and not streamed,
    )
    if streamed and not local:
        # A look reads all data, for all replicates at once: 32 draws of the guide.
        replicates = max(8, 32 // engine.particles)
        schedule = dataclasses.replace(schedule, replicates=replicates)
    label = f"{name} ({request.objective.name})"
    with Progress(label, schedule.max_steps, request.progress) as progress:
        return stochastic.fit(engine, schedule, deadline=request.deadline, progress=progress)


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
        networks = isinstance(guide, Guide) and any(block.plate for block in guide.blocks)
        return 0.005 if networks else 0.02
    return 0.01


def _require_compatible(request: Request, guide: Guide) -> None:
    if guide.point and request.objective.multi_sample:
        raise OptionError(
            f"guide 'delta' is a point and has no multi-sample bound: objective "
            f"{request.objective.name!r} needs a guide with spread; use objective='elbo'"
        )
    if request.method == "lbfgs" and not _fixed_draws_possible(request, guide):
        raise OptionError(
            "method='lbfgs' needs guide 'delta', 'mean_field', 'low_rank' or 'full_rank', a model "
            f"without learned parameters and of at most {fixed_draws.MAX_DIM:,} dimensions, objective "
            "'elbo', and none of engine='pyro', optimizer=, estimator=, steps= and batch_size=; use "
            "method='stochastic'"
        )


def _fixed_draws_possible(request: Request, guide: Guide) -> bool:
    return (
        fixed_draws.applies_to(guide)
        and not request.objective.multi_sample
        and request.engine != "pyro"
        and request.optimizer is None
        and request.estimator == "auto"
        and request.steps is None
        and request.batch_size is None
    )


def _use_fixed_draws(request: Request, guide: Guide) -> bool:
    return request.method in ("auto", "lbfgs") and _fixed_draws_possible(request, guide)


def _start(request: Request, density: Density) -> Tensor | None:
    """The unconstrained point that ``init=`` names, `[D]`."""
    if isinstance(request.init, Mapping):
        return density.unconstrain(request.init)
    if request.init == "origin":
        return torch.zeros(density.dim, dtype=density.dtype)
    return None


def _gaussian_of(guide: Guide) -> Gaussian:
    """The Gaussian, or the point, that a single-block guide is now."""
    with torch.no_grad():
        found = guide.families[guide.blocks[0].name]()
        scale_tril = getattr(found, "scale_tril", None)
        return Gaussian(found.mean, found.stddev.diag() if scale_tril is None else scale_tril)


def _initialise(
    request: Request, guide: Guide, density: Density, batches: BatchSource | None
) -> bool:
    """Start a single Gaussian-based block from the best Gaussian, or where ``init=`` says.

    Returns:
        Whether it was the best Gaussian, in whose sds parameters are measured from now on.
    """
    start = _start(request, density)
    family = guide.families[guide.blocks[0].name]
    if len(guide.blocks) > 1 or not isinstance(family, GaussianFamily):
        if start is not None and isinstance(request.init, Mapping):
            raise OptionError("init={site: value} needs a guide with one block for all latents")
        return False
    if request.init == "origin" or density.params or density.dim > fixed_draws.MAX_DIM:
        if start is not None:
            family.centre_on(start)
        return False
    if isinstance(batches, StreamedBatches):
        gaussian = streaming.start(request, batches, density, start)
    else:
        gaussian = fixed_draws.prefit(density, request.seed, request.deadline, start)
    family.start_from(gaussian.loc, gaussian.scale_tril)
    return True


def _batches(request: Request, guide: Guide) -> BatchSource | None:
    if request.batch_size is None:
        return None
    if guide.density.streamed is not None:
        return StreamedBatches(guide.density, request.batch_size, request.seed)
    plates = [block.plate for block in guide.blocks if block.plate is not None]
    if not plates:
        raise OptionError(
            "batch_size= needs a guide that is local to a data plate: use guide='amortized', or leave "
            "batch_size= out and fit the full data"
        )
    return Batches(plates[0], request.batch_size)

"""Training a guide: which method and engine, from where, and with what settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit import minibatches, streaming
from pyro_vi_kit.approximation import Approximation, GuideApproximation, TraceApproximation
from pyro_vi_kit.checkpoint import Checkpoint
from pyro_vi_kit.density import Density
from pyro_vi_kit.density.runner import placed
from pyro_vi_kit.device import device_of
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
from pyro_vi_kit.methods import by_epochs, fixed_draws, stochastic
from pyro_vi_kit.methods.course import laid_out
from pyro_vi_kit.methods.result import Outcome
from pyro_vi_kit.methods.shapes import Gaussian
from pyro_vi_kit.objectives.estimators import valid as dreg_is_valid
from pyro_vi_kit.posterior import is_small
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.request import Request
from pyro_vi_kit.runtime import default_dtype

PyroGuide = Callable[..., Any]

# Iterates are then a tenth of a posterior sd from their mean, and its average is not at rest.
_LARGE_RATE = 0.02


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
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train by the method that fits."""
    if not isinstance(trainee, Guide) or density is None:
        _refuse_for_pyro_guide(request, checkpoint)
        return _train_pyro_guide(request, trainee, density, state)
    _require_compatible(request, trainee)
    if _use_fixed_draws(request, trainee):
        _refuse_fixed_draws(checkpoint)
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
    batches = _batches(request, trainee, density)
    try:
        whitened = _whitened(request, trainee, density, batches, checkpoint)
        request = _with_particles(request, trainee, density)
        engine = _engine(request, trainee, density, batches, steady=checkpoint is not None)
        run = _run_stochastic if request.epochs is None else _run_epochs
        outcome, bound = run(request, name, engine, whitened, checkpoint)
    finally:
        if isinstance(batches, StreamedBatches):
            batches.close()
    approximation = GuideApproximation(name, trainee, engine.params)
    note = engine.note if isinstance(engine, CapturedEngine) and engine.name == "eager" else ""
    bound = bound if request.objective.multi_sample else None
    return Trained(approximation, outcome, engine.name, bound, note)


def _engine(
    request: Request,
    guide: Guide,
    density: Density,
    batches: BatchSource | None,
    *,
    steady: bool = False,
) -> EagerEngine | PyroEngine:
    """What executes the steps; where ``steady``, nothing on the clock may change how."""
    options: dict[str, Any] = {
        "seed": request.seed,
        "batches": batches,
        "optimizer": request.optimizer,
    }
    estimator = estimator_of(request, guide)
    if request.engine == "pyro":
        if steady:
            raise OptionError(
                "checkpoint= keeps the steps of this package's engines: leave out engine='pyro', or "
                "save the posterior and go on with resume="
            )
        return PyroEngine(request.model, guide, request.objective, density=density, **options)
    options["estimator"] = estimator
    if request.epochs is not None:
        _require_castable(request, density)
        options |= {"clip": request.epochs.clip, "precision": request.epochs.autocast}
    if request.engine == "eager":
        return EagerEngine(guide, request.objective, **options)
    compiled = request.engine == "compiled"
    return CapturedEngine(guide, request.objective, compiled=compiled, steady=steady, **options)


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


def _with_particles(request: Request, guide: Guide, density: Density) -> Request:
    """As many particles as cost next to nothing, where the objective was named and K is only noise."""
    if not request.named_objective or request.objective.multi_sample:
        return request
    if request.engine == "pyro":
        particles = 4  # one after the other
    elif density.params:
        particles = 1
    elif request.batch_size is not None:
        # The noise of a batch in the means cancels over an epoch. In the spreads it is multiplied by a
        # draw, and does not: particles average it away.
        particles = 16 if any(block.plate for block in guide.blocks) else 4
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
            "batch_size= needs a guide of this package; with a Pyro guide of your own, give the plates "
            "of model and guide a subsample_size"
        )
    where = request.device or device_of((request.model.args, dict(request.model.kwargs)))
    model = placed(request.model, where)
    engine = PyroEngine(
        model,
        guide,
        request.objective,
        seed=request.seed,
        density=density,
        optimizer=request.optimizer,
        state=state,
        device=where,
    )
    estimator_of(request, guide)
    outcome, bound = _run_stochastic(request, name_of(guide), engine, whitened=False)
    dtype = default_dtype() if density is None else density.dtype
    approximation = TraceApproximation(model, guide, engine.state, dtype, density, engine.device)
    bound = bound if request.objective.multi_sample else None
    return Trained(approximation, outcome, engine.name, bound)


def _whitened(
    request: Request,
    guide: Guide,
    density: Density,
    batches: BatchSource | None,
    checkpoint: Checkpoint | None,
) -> bool:
    """Find a start unless there is one; whether parameters are measured in posterior sds."""
    if checkpoint is None:
        return request.resumed or _initialise(request, guide, density, batches)
    if checkpoint.state is None:
        found = request.resumed or _initialise(request, guide, density, batches)
        checkpoint.facts["whitened"] = found
    return checkpoint.facts["whitened"]


def _refuse_fixed_draws(checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        raise OptionError(
            "checkpoint= is for stochastic steps, and this fit is one of L-BFGS on fixed draws, which "
            "takes seconds: leave checkpoint= out, or ask for steps by method='stochastic', "
            "batch_size= or epochs="
        )


def _refuse_for_pyro_guide(request: Request, checkpoint: Checkpoint | None) -> None:
    if request.epochs is not None or checkpoint is not None:
        option = "epochs=" if request.epochs is not None else "checkpoint="
        raise OptionError(
            f"{option} needs a guide of this package; a Pyro guide callable is trained by "
            "pyro.infer.SVI with steps= or budget=, and goes on with resume="
        )


def _require_castable(request: Request, density: Density) -> None:
    if request.epochs is not None and request.epochs.autocast and density.dtype != torch.float32:
        raise OptionError(
            "Epochs(precision='bfloat16') casts float32 and leaves float64 as it is: give "
            "dtype=torch.float32 too"
        )


def _run_epochs(
    request: Request,
    name: str,
    engine: EagerEngine | PyroEngine,
    whitened: bool,
    checkpoint: Checkpoint | None,
) -> tuple[Outcome, float]:
    if request.epochs is None or not isinstance(engine, EagerEngine):
        raise AssertionError("epochs= goes with the engines of this package alone")
    rate = _first_rate(engine.guide, whitened)
    course = laid_out(engine, request.epochs, rate=rate, max_steps=request.steps)
    label = f"{name} ({request.objective.name})"
    with Progress(label, course.limit, request.progress) as progress:
        return by_epochs.fit(
            engine, course, deadline=request.deadline, progress=progress, checkpoint=checkpoint
        )


def _run_stochastic(
    request: Request,
    name: str,
    engine: EagerEngine | PyroEngine,
    whitened: bool,
    checkpoint: Checkpoint | None = None,
) -> tuple[Outcome, float]:
    literal = isinstance(engine, PyroEngine)
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
    rate = _first_rate(guide, whitened)
    schedule = stochastic.Schedule(
        rate=rate,
        falls=2 if rate > _LARGE_RATE else 1,
        stretch=stretch,
        epoch=epoch,
        patience=2 if gaussian else 4,
        max_steps=request.steps or stochastic.MAX_STEPS,
        # Pyro's own loss is slow to evaluate, one particle after another.
        replicates=16 if literal or encoded else _replicates(batches, stretch * engine.particles),
        tolerance=_tolerance(request, guide),
        # A bound in the thousands has noise of its own, and more to gain than anyone waits for.
        relative=1e-3 if learns and not request.own_tolerance else 0.0,
        noisy=batches is not None,
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
            deadline=request.deadline,
            progress=progress,
            checkpoint=checkpoint,
        )


def _encoded(guide: Guide) -> bool:
    """Whether the guide has an encoder."""
    return any(b.plate is not None and guide.table(b) is None for b in guide.blocks)


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
        and request.epochs is None
    )


def _use_fixed_draws(request: Request, guide: Guide) -> bool:
    return request.method in ("auto", "lbfgs") and _fixed_draws_possible(request, guide)


def _start(request: Request, density: Density) -> Tensor | None:
    """The unconstrained point that ``init=`` names, `[D]`."""
    if isinstance(request.init, Mapping):
        return density.unconstrain(request.init)
    if request.init == "origin":
        return torch.zeros(density.dim, dtype=density.dtype, device=density.device)
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
    if isinstance(batches, Batches) and request.init == "auto":
        seed, deadline = request.seed, request.deadline
        return minibatches.start_on_rows(guide, batches.plates, seed, deadline, start)
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


def _batches(request: Request, guide: Guide, density: Density) -> BatchSource | None:
    """What steps see of the data; all of them when None."""
    if density.streamed is not None:
        streaming.require_compatible(request, guide)
        return StreamedBatches(density, request.batch_size, request.seed)  # type: ignore[arg-type]
    sizes = {}
    if request.batch_size is not None:
        sizes = minibatches.sizes_of(request.batch_size, density, guide)
    minibatches.require_local(guide, sizes, request.objective.multi_sample)
    return Batches(sizes, device=density.device) if sizes else None

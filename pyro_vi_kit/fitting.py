"""`fit`: from a model and a guide's name to a posterior."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit import guides
from pyro_vi_kit.approximation import Approximation, GuideApproximation, TraceApproximation
from pyro_vi_kit.density import Density
from pyro_vi_kit.engines import Batches, CapturedEngine, EagerEngine, OptimizerFactory, PyroEngine
from pyro_vi_kit.errors import ModelError, OptionError
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.methods import fixed_draws, stochastic
from pyro_vi_kit.methods.result import Outcome
from pyro_vi_kit.model import Model
from pyro_vi_kit.posterior import Posterior, is_small
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.record import Record
from pyro_vi_kit.request import Request, checked
from pyro_vi_kit.runtime import RandomStream, default_dtype, one_thread
from pyro_vi_kit.types import Objective

PyroGuide = Callable[..., Any]


@torch.enable_grad()  # the caller may have gradients off
def fit(
    model: Model,
    guide: str | GuideSpec | Guide | PyroGuide = "full_rank",
    objective: str | Objective = "elbo",
    *,
    method: str = "auto",
    engine: str = "auto",
    tol: float = 0.01,
    budget: float | None = None,
    init: str | Mapping[str, Any] = "auto",
    optimizer: OptimizerFactory | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Posterior:
    """Fit a guide to a model's posterior. No learning rate or number of steps has to be given.

    Args:
        model: The model and its data.
        guide: A name (see `vi.guides.names()`), a configured instance such as
            ``vi.guides.AffineCoupling(layers=4)``, or any Pyro guide callable. A guide object of your
            own is trained in place, as in stock Pyro.
        objective: ``"elbo"``, ``"iwae"``, ``"renyi"``, or an instance such as
            ``vi.objectives.Renyi(alpha=0.5, particles=16)``.
        method: ``"lbfgs"`` (Gaussian guides, ELBO), ``"stochastic"``, or ``"auto"``.
        engine: ``"captured"`` records a step on the vectorised density and replays it, compiled once
            a fit turns out to be long; ``"compiled"`` waits for the compiler (10 to 30 seconds) first;
            ``"eager"`` runs the model at each step; ``"pyro"`` is a literal `pyro.infer.SVI`.
            ``"auto"`` captures wherever the model and guide allow it.
        tol: Nats: an improvement or a disagreement below it counts as none.
        budget: Seconds after which to stop with what there is.
        init: ``"auto"``: near the mode, and flows and multi-sample fits from the best Gaussian;
            ``"origin"``: the origin of unconstrained space; or a dict of site values.
        optimizer: Makes a torch optimiser from parameters, in the place of Adam with an automatic
            rate: ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        batch_size: Rows of the data plate in each step (guide ``"amortized"``).
        seed: The same seed gives the same numbers on the same machine.
        dtype: Precision; float64 by default, torch's default dtype for ``"amortized"``.
        progress: Show progress on stderr; None shows it on a terminal only.

    Raises:
        ModelError: If the model or its data cannot be used.
        OptionError: If a name or an option is wrong, or a combination cannot work.
    """
    started = time.monotonic()
    request = checked(
        model, objective, method, engine, tol, budget, init, optimizer, batch_size, seed, progress
    )
    if isinstance(guide, str | GuideSpec) or not callable(guide):
        guide = guides.specify(guide)
    name, trainee, density = _trainee(request, guide, dtype)
    with one_thread(density is not None and is_small(density)):
        approximation, outcome, engine_name, bound = _train(request, name, trainee, density)
    record = Record(
        objective=request.objective,
        method=outcome.method,
        engine=engine_name,
        status=outcome.status,
        losses=np.asarray(outcome.losses),
        evaluations=outcome.evaluations,
        seconds=time.monotonic() - started,
        seed=request.seed,
        bound=bound,
        skipped=outcome.skipped,
    )
    spec = guide if isinstance(guide, GuideSpec) else None
    return Posterior(model, approximation, record, density, spec)


def _trainee(
    request: Request, guide: GuideSpec | Guide | PyroGuide, dtype: torch.dtype | None
) -> tuple[str, Guide | PyroGuide, Density | None]:
    """The guide's name, the guide itself, untrained, and the model's Density where it has one."""
    if dtype not in (None, torch.float32, torch.float64):
        raise OptionError(f"dtype= must be torch.float32 or torch.float64, got {dtype!r}")
    if isinstance(guide, Guide):
        return guide.name, guide, guide.density
    if not isinstance(guide, GuideSpec):
        return getattr(guide, "__name__", type(guide).__name__), guide, _density_or_none(request)
    if dtype is None:
        dtype = default_dtype() if guide.name == "amortized" else torch.float64
    density = Density(request.model, dtype=dtype)
    with RandomStream(request.seed):
        return guide.name, guide.build(density), density


def _density_or_none(request: Request) -> Density | None:
    """For a Pyro guide of the user's: what the model is called on, where a Density can say it."""
    if request.engine not in ("auto", "pyro"):
        raise OptionError(
            f"engine={request.engine!r} runs the guides of this package; a Pyro guide callable needs "
            "engine='pyro' (or 'auto')"
        )
    try:
        return Density(request.model, dtype=default_dtype())
    except ModelError:
        # Discrete latents, structure that changes: Pyro runs what a Density refuses.
        return None


def _train(
    request: Request, name: str, trainee: Guide | PyroGuide, density: Density | None
) -> tuple[Approximation, Outcome, str, float | None]:
    """Train by the method that fits; the approximation, how it went, the engine and the bound."""
    if not isinstance(trainee, Guide) or density is None:
        return _train_pyro_guide(request, trainee, density)
    _require_compatible(request, trainee)
    if _use_fixed_draws(request, trainee):
        with Progress(f"{name} (L-BFGS)", enabled=request.progress) as progress:
            outcome = fixed_draws.fit(
                trainee,
                seed=request.seed,
                tolerance=request.tolerance,
                deadline=request.deadline,
                progress=progress,
                start=_start(request, density),
            )
        return GuideApproximation(name, trainee, density.params), outcome, "eager", None
    _initialise(request, trainee, density)
    batches = _batches(request, trainee)
    request = _with_particles(request, density)
    engine = _engine(request, trainee, density, batches)
    outcome, bound = _run_stochastic(request, name, engine)
    approximation = GuideApproximation(name, trainee, engine.params)
    return approximation, outcome, engine.name, bound if request.objective.multi_sample else None


def _engine(
    request: Request, guide: Guide, density: Density, batches: Batches | None
) -> EagerEngine | PyroEngine:
    """What executes the steps."""
    options: dict[str, Any] = {
        "seed": request.seed,
        "batches": batches,
        "optimizer": request.optimizer,
    }
    if request.engine == "pyro":
        return PyroEngine(request.model, guide, request.objective, density=density, **options)
    if request.engine == "eager":
        return EagerEngine(guide, request.objective, **options)
    compiled = request.engine == "compiled"
    return CapturedEngine(guide, request.objective, compiled=compiled, **options)


def _with_particles(request: Request, density: Density) -> Request:
    """As many particles as cost next to nothing, where the objective was named and K is only noise."""
    if not request.named_objective or request.objective.multi_sample:
        return request
    if request.engine == "pyro":
        particles = 4  # one after the other
    elif density.params:
        particles = 1
    else:
        particles = 64 if is_small(density) and density.dim <= fixed_draws.MAX_DIM else 16
    objective = dataclasses.replace(request.objective, particles=particles)  # type: ignore[type-var]
    return dataclasses.replace(request, objective=objective)


def _train_pyro_guide(
    request: Request, guide: PyroGuide, density: Density | None
) -> tuple[Approximation, Outcome, str, float | None]:
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
    )
    outcome, bound = _run_stochastic(request, getattr(guide, "__name__", "guide"), engine)
    dtype = default_dtype() if density is None else density.dtype
    approximation = TraceApproximation(request.model, guide, engine.state, dtype, density)
    return approximation, outcome, engine.name, bound if request.objective.multi_sample else None


def _run_stochastic(
    request: Request, name: str, engine: EagerEngine | PyroEngine
) -> tuple[Outcome, float]:
    literal = isinstance(engine, PyroEngine)
    batches = engine.batches
    epoch = 0 if batches is None else batches.plate.size // batches.size
    guide = engine.guide
    gaussian = isinstance(guide, Guide) and fixed_draws.applies_to(guide)
    schedule = stochastic.Schedule(
        # A user's guide is not measured in posterior sds; where it starts, they are rather large.
        rate=0.005 if isinstance(guide, Guide) else 0.02,
        stretch=max(100, epoch),
        patience=2 if gaussian else 4,
        # Pyro's own loss is slow to evaluate, one particle after another.
        replicates=16 if literal or batches is not None else 64,
        tolerance=request.tolerance,
    )
    label = f"{name} ({request.objective.name})"
    with Progress(label, schedule.max_steps, request.progress) as progress:
        return stochastic.fit(engine, schedule, deadline=request.deadline, progress=progress)


def _require_compatible(request: Request, guide: Guide) -> None:
    if guide.point and request.objective.multi_sample:
        raise OptionError(
            f"guide 'delta' is a point and has no multi-sample bound: objective "
            f"{request.objective.name!r} needs a guide with spread; use objective='elbo'"
        )
    if request.method == "lbfgs" and not _fixed_draws_possible(request, guide):
        raise OptionError(
            "method='lbfgs' needs guide 'delta', 'mean_field' or 'full_rank', a model without learned "
            f"parameters and of at most {fixed_draws.MAX_DIM:,} dimensions, objective 'elbo', and "
            "neither engine='pyro' nor optimizer= nor batch_size=; use method='stochastic'"
        )


def _fixed_draws_possible(request: Request, guide: Guide) -> bool:
    return (
        fixed_draws.applies_to(guide)
        and not request.objective.multi_sample
        and request.engine != "pyro"
        and request.optimizer is None
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


def _initialise(request: Request, guide: Guide, density: Density) -> None:
    """Start a single Gaussian-based block from the best Gaussian, or where ``init=`` says."""
    start = _start(request, density)
    family = guide.families[guide.blocks[0].name]
    if len(guide.blocks) > 1 or not isinstance(family, GaussianFamily):
        if start is not None and isinstance(request.init, Mapping):
            raise OptionError("init={site: value} needs a guide with one block for all latents")
        return
    if request.init == "origin" or density.params or density.dim > fixed_draws.MAX_DIM:
        if start is not None:
            family.centre_on(start)
        return
    gaussian = fixed_draws.prefit(density, request.seed, request.deadline, start)
    family.start_from(gaussian.loc, gaussian.scale_tril)


def _batches(request: Request, guide: Guide) -> Batches | None:
    if request.batch_size is None:
        return None
    plates = [block.plate for block in guide.blocks if block.plate is not None]
    if not plates:
        raise OptionError(
            "batch_size= needs a guide that is local to a data plate: use guide='amortized', or leave "
            "batch_size= out and fit the full data"
        )
    return Batches(plates[0], request.batch_size)

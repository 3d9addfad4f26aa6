"""Training a guide: which method and engine, from where, and with what settings."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.device import device_of
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import default_dtype
from pyro_vi_kit.fitting import initialise, minibatches, schedule, streaming
from pyro_vi_kit.fitting.request import Request
from pyro_vi_kit.fitting.schedule import PyroGuide
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.user_guides import GuideSites
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.runner import placed
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable
from pyro_vi_kit.objectives import Elbo, ForwardKl, Objective, Renyi, estimators
from pyro_vi_kit.optimize.deterministic import cavi, fixed_draws, mixtures, moments
from pyro_vi_kit.optimize.deterministic.modes import Peak, with_peaks
from pyro_vi_kit.optimize.deterministic.searches import is_searched, search_for
from pyro_vi_kit.optimize.engines import (
    Batches,
    BatchSource,
    CapturedEngine,
    EagerEngine,
    PyroEngine,
    StreamedBatches,
)
from pyro_vi_kit.optimize.result import Outcome
from pyro_vi_kit.posterior import is_small
from pyro_vi_kit.posterior.approximation import (
    Approximation,
    GuideApproximation,
    TrainedGuide,
    approximation_of,
    marginal_of,
)

_SCORE_PARTICLES = 16
# The most, and numbers of data that they may meet in a step.
_ANNEALED_PARTICLES, _ANNEALED_NUMBERS = 1024, 2**20
# Nats that two estimates of the moments may lie apart: a hundredth of an sd in each direction.
_MOMENTS_TOLERANCE = 1e-4


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
    if request.method == cavi.NAME:
        _require_sweeps(request, density, checkpoint)
        return _fit_by_sweeps(request, name, trainee, density)
    require_possible(request, trainee)
    if _use_search(request, trainee):
        _refuse_fixed_draws(checkpoint)
        with Progress(f"{name} (L-BFGS)", enabled=request.progress) as progress:
            outcome = _fit_by_search(request, trainee, density, progress)
        return Trained(
            GuideApproximation(name, trainee, density.params), outcome, outcome.engine, None
        )
    given_up = ""
    if _use_moments(request, trainee, checkpoint):
        matched = _match_moments(request, name, trainee, density)
        if isinstance(matched, Trained):
            return matched
        given_up = f"Moments were tried first and given up for stochastic steps: {matched}"
    batches = _batches(request, trainee, density)
    try:
        start = initialise.begin(request, trainee, density, batches, checkpoint)
        request = _with_particles(request, trainee, density)
        engine = _engine(request, trainee, density, batches, steady=checkpoint is not None)
        run = schedule.by_themselves if request.epochs is None else schedule.by_course
        outcome, found = run(request, name, engine, start.whitened, checkpoint)
        bound: float | None = None if request.objective.is_elbo else found
    finally:
        if isinstance(batches, StreamedBatches):
            batches.close()
    status = _with_kept(with_peaks(outcome.status, start.peaks, trainee), trainee)
    outcome = dataclasses.replace(outcome, status=status.noting(given_up))
    approximation = GuideApproximation(name, trainee, engine.params)
    note = engine.note if isinstance(engine, CapturedEngine) and engine.name == "eager" else ""
    if isinstance(engine, EagerEngine):
        bound = engine.reported(bound)
    return Trained(approximation, outcome, engine.name, bound, note)


def _fit_by_search(request: Request, guide: Guide, density: Density, progress: Progress) -> Outcome:
    """The deterministic search that fits a guide: no steps on noisy gradients."""
    given: dict[str, Any] = {
        "seed": request.seed,
        "tolerance": request.tolerance,
        "budget": request.budget,
        "progress": progress,
    }
    start: Any = initialise.starting_point(request, density)
    if mixtures.applies_to(guide):
        below = None if request.below is None else initialise.gaussian_of(request.below)
        given |= {"found": request.found, "below": below}
        start = initialise.components_of(guide) if request.resumed else start
    elif request.resumed:
        start = initialise.gaussian_of(guide)
    search = search_for(guide)
    if search is None:
        raise OptionError(
            f"guide {guide.name!r} has no search that fits it: use method='stochastic'"
        )
    return search(guide, start=start, **given)


def _fit_by_sweeps(request: Request, name: str, guide: Guide, density: Density) -> Trained:
    """Train by coordinate ascent with the model's own updates."""
    point = None if request.resumed else initialise.starting_point(request, density)
    with Progress(f"{name} (sweeps)", enabled=request.progress) as progress:
        outcome = cavi.fit(
            guide,
            request.model.updates,
            seed=request.seed,
            tolerance=request.tolerance,
            budget=request.budget,
            progress=progress,
            start=point,
        )
    approximation = GuideApproximation(name, guide, density.params)
    return Trained(approximation, outcome, outcome.engine, None)


def _match_moments(request: Request, name: str, guide: Guide, density: Density) -> Trained | str:
    """Train by weighted moments; why they do not settle, where the method was ours to choose."""
    seed, budget = request.seed, request.budget
    peaks: tuple[Peak, ...] = ()
    if request.resumed:
        start = initialise.gaussian_of(guide)
    else:
        point = initialise.starting_point(request, density)
        found = fixed_draws.prefit(density, seed, budget, point)
        start, peaks = found.best, found.peaks
    tolerance = request.tolerance if request.own_tolerance else _MOMENTS_TOLERANCE
    with Progress(f"{name} (moments)", enabled=request.progress) as progress:
        outcome, bound = moments.fit(
            guide, start, seed=seed, tolerance=tolerance, budget=budget, progress=progress
        )
    if request.method == "auto" and outcome.status.reason == "not converged":
        return outcome.status.advice
    outcome = dataclasses.replace(outcome, status=with_peaks(outcome.status, peaks, guide))
    return Trained(GuideApproximation(name, guide, density.params), outcome, outcome.engine, bound)


def _with_kept(status: Status, guide: Guide) -> Status:
    """Say which latents are normal although the families were to follow the supports."""
    kept = [name for family in guide.families.values() for name in getattr(family, "kept", ())]
    if not kept:
        return status
    names = ", ".join(map(repr, kept))
    words = f"No family fits the support of {names}: normal in unconstrained space."
    return dataclasses.replace(status, advice=f"{status.advice} {words}")


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
    if literal:
        if request.estimator not in ("auto", "pathwise"):
            raise OptionError(
                f"estimator={request.estimator!r} is of the guides and engines of this package; "
                "pyro.infer.SVI has its own: leave estimator= out, or leave out engine='pyro'"
            )
        return "pathwise"
    automatic = request.estimator == "auto"
    name = estimators.chosen(guide, request.objective) if automatic else request.estimator  # type: ignore[arg-type]
    reason = estimators.obstacle(guide, request.objective, name)  # type: ignore[arg-type]
    if reason is not None:
        raise OptionError(f"estimator={name!r} cannot work here: {reason}")
    return name


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
    if request.objective.warmup and request.batch_size is None and not density.params:
        # How mass is shared among modes is settled by the few draws between them.
        numbers = density.dim + sum(t.numel() for t in density.data)
        particles = max(particles, min(_ANNEALED_PARTICLES, _ANNEALED_NUMBERS // numbers))
    scored = any(getattr(family, "scored", False) for family in guide.families.values())
    estimator = estimator_of(request, guide)
    if estimator == "stratified":
        # As many draws in all.
        strata = max(family.strata for family in guide.families.values())  # type: ignore[operator]
        particles = max(1, particles // strata // 2 * 2)
    if scored or estimator == "score":
        # Each draw is compared with the others, and the noise is many times that of other estimators.
        particles = max(particles, _SCORE_PARTICLES)
    objective = dataclasses.replace(request.objective, particles=particles)  # type: ignore[type-var]
    return dataclasses.replace(request, objective=objective)


def _train_pyro_guide(
    request: Request, guide: PyroGuide, density: Density | None, state: dict[str, Any] | None
) -> Trained:
    if request.method in ("cavi", "lbfgs", "moments"):
        raise OptionError(
            f"method={request.method!r} runs the Gaussian guides of this package; use 'stochastic'"
        )
    if request.batch_size is not None:
        raise OptionError(
            "batch_size= needs a guide of this package; with a Pyro guide of your own, give the plates "
            "of model and guide a subsample_size"
        )
    where = request.device or device_of((request.model.args, dict(request.model.kwargs)))
    model = placed(request.model, where)
    if request.named_objective and not request.objective.multi_sample:
        # Pyro takes one after another, and steps on one draw each come as far in a tenth of the time.
        objective = dataclasses.replace(request.objective, particles=1)  # type: ignore[type-var]
        request = dataclasses.replace(request, objective=objective)
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
    sites = engine.sites or GuideSites()
    # Before training: what cannot be reported is refused before it has cost anything.
    marginal = marginal_of(model, sites, density, engine.device)
    outcome, found = schedule.by_themselves(request, name_of(guide), engine, whitened=False)
    dtype = default_dtype() if density is None else density.dtype
    params = {
        name: value.clone().requires_grad_(
            density is not None and density.params[name].requires_grad
        )
        for name, value in engine.params.items()
    }
    trained = TrainedGuide(model, guide, sites, engine.state, params, dtype, density, engine.device)
    bound = None if request.objective.is_elbo else found
    return Trained(approximation_of(trained, marginal), outcome, engine.name, bound)


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


def require_possible(request: Request, guide: Guide) -> None:
    """Refuse a guide that cannot be trained as was asked.

    Raises:
        OptionError: With the remedy.
    """
    _require_compatible(request, guide)
    estimator_of(request, guide)


def _require_compatible(request: Request, guide: Guide) -> None:
    if guide.point and not _is_plain_elbo(request.objective):
        raise OptionError(
            f"guide 'delta' is a point and has no multi-sample bound: objective "
            f"{request.objective.name!r} needs a guide with spread; use objective='elbo'"
        )
    request.objective.require(guide)
    if request.objective.warmup:
        _require_room(request)
    if is_searched(guide) and not _use_search(request, guide):
        raise OptionError(
            f"guide {guide.name!r} is found by a search of the log density and not by steps on a bound: "
            "it takes a model without learned parameters and of at most "
            f"{fixed_draws.MAX_DIM:,} dimensions, objective 'elbo', and none of method='stochastic', "
            "engine='pyro', optimizer=, estimator=, steps=, epochs= and batch_size=; use "
            "guide='full_rank' with these"
        )
    if request.method == "lbfgs" and not _search_possible(request, guide):
        raise OptionError(
            "method='lbfgs' needs guide 'delta', 'mean_field', 'low_rank', 'structured', 'full_rank', "
            "'mixture', 'laplace' or 'pathfinder', a model without learned parameters and of at most "
            f"{fixed_draws.MAX_DIM:,} dimensions, objective 'elbo', and none of engine='pyro', "
            "optimizer=, estimator=, steps= and batch_size=; use method='stochastic'"
        )


def _require_sweeps(request: Request, density: Density, checkpoint: Checkpoint | None) -> None:
    """Refuse coordinate ascent where the model has no updates, or something else was asked for too."""
    updates = request.model.updates
    latents = [site.name for site in density.latents]
    missing = [name for name in latents if name not in updates]
    if missing:
        raise OptionError(
            f"method='cavi' needs an update for each latent, and model {request.model.name!r} has "
            f"none for {', '.join(map(repr, missing))}: give vi.Model(..., "
            f"updates={{{missing[0]!r}: update}}), or leave method= out"
        )
    unknown = [name for name in updates if name not in latents]
    if unknown:
        raise OptionError(
            f"updates= name {unknown[0]!r}, which is no continuous latent of model "
            f"{request.model.name!r}; it has {', '.join(map(repr, latents))}"
        )
    plain = _is_plain_elbo(request.objective) and _without_steps(request) and checkpoint is None
    if not plain or density.params or density.discrete or density.streamed is not None:
        raise OptionError(
            "method='cavi' sweeps over all data, with objective 'elbo', a model without learned "
            "parameters and discrete latents, and none of engine='pyro', optimizer=, estimator=, "
            "steps=, epochs=, checkpoint= and batch_size=: leave method= out"
        )


def _is_plain_elbo(objective: Objective) -> bool:
    """Whether it is the ELBO from the first step on, by no estimator of its own."""
    return (
        isinstance(objective, Elbo | Renyi)
        and type(objective).name in ("elbo", "renyi")
        and objective.is_elbo
    )


def _without_steps(request: Request) -> bool:
    """Whether nothing is asked for that only stochastic steps have."""
    return (
        request.engine != "pyro"
        and request.optimizer is None
        and request.estimator == "auto"
        and request.steps is None
        and request.batch_size is None
        and request.epochs is None
    )


def _require_room(request: Request) -> None:
    """Refuse what would end, or count, a warm-up otherwise than in steps of this package's Adam."""
    name, warmup = request.objective.name, request.objective.warmup
    if request.engine == "pyro":
        request.objective.stock_loss()
    if request.optimizer is not None:
        raise OptionError(
            f"objective {name!r} counts the steps of this package's Adam: leave optimizer= out, or use "
            "objective='elbo'"
        )
    if request.epochs is not None:
        raise OptionError(
            f"objective {name!r} has a schedule in steps, and epochs= another: leave epochs= out, or "
            "use objective='elbo'"
        )
    if request.steps is not None and request.steps <= warmup:
        raise OptionError(
            f"objective {name!r} is the ELBO after {warmup:,} steps, and steps={request.steps:,} ends "
            f"before: give more steps=, or vi.objectives.Annealed(steps={max(request.steps // 2, 1)})"
        )


def _search_possible(request: Request, guide: Guide) -> bool:
    return (
        search_for(guide) is not None
        and _is_plain_elbo(request.objective)
        and _without_steps(request)
    )


def _use_moments(request: Request, guide: Guide, checkpoint: Checkpoint | None) -> bool:
    """Whether to match the posterior's moments.

    Raises:
        OptionError: If that was asked for and cannot be done.
    """
    possible = (
        isinstance(request.objective, ForwardKl)
        and moments.applies_to(guide)
        and _without_steps(request)
        and checkpoint is None
    )
    if request.method == "moments" and not possible:
        raise OptionError(
            "method='moments' needs objective 'forward_kl', guide 'mean_field' or 'full_rank', data in "
            f"memory, a model without learned parameters and of at most {moments.MAX_DIM} dimensions, "
            "and none of engine='pyro', optimizer=, estimator=, steps=, epochs=, checkpoint= and "
            "batch_size=; use method='stochastic'"
        )
    return possible and request.method in ("auto", "moments")


def _use_search(request: Request, guide: Guide) -> bool:
    return request.method in ("auto", "lbfgs") and _search_possible(request, guide)


def _batches(request: Request, guide: Guide, density: Density) -> BatchSource | None:
    """What steps see of the data; all of them when None."""
    if density.streamed is not None:
        streaming.require_compatible(request, guide)
        return StreamedBatches(density, request.batch_size, request.seed)  # type: ignore[arg-type]
    sizes = {}
    if request.batch_size is not None:
        sizes = minibatches.sizes_of(request.batch_size, density, guide)
        require_subsamplable(density, sizes)
        if density.sliced and request.engine == "pyro":
            raise OptionError(
                "engine='pyro' tells the model which rows to take, and this one does not ask (plate "
                f"{next(iter(density.sliced))!r}): leave engine= out, or index in the model, "
                "obs=y[i] in `with pyro.plate(name, len(y)) as i`"
            )
    minibatches.require_local(guide, sizes, request.objective.multi_sample)
    return Batches(sizes, device=density.device) if sizes else None

"""How a guide is trained: the methods, what stands in the way of each, and the first that nothing does.

What a method says of its obstacles is what `fit` refuses with, and what a suite leaves out.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.device import device_of
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import default_dtype
from pyro_vi_kit.fitting import initialise, minibatches, schedule
from pyro_vi_kit.fitting.request import Request, Training
from pyro_vi_kit.fitting.schedule import PyroGuide
from pyro_vi_kit.guides import REGISTRY, Guide
from pyro_vi_kit.guides.gaussian.laplace import ModeNormal
from pyro_vi_kit.guides.gaussian.pathfinder import PathMixture
from pyro_vi_kit.guides.mixtures.gaussian_mixture import GaussianMixture
from pyro_vi_kit.guides.user_guides import GuideSites
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.runner import placed
from pyro_vi_kit.objectives import Objective, estimators
from pyro_vi_kit.optimize.deterministic import (
    cavi,
    fixed_draws,
    laplace_fit,
    mixtures,
    moments,
    pathfinder,
)
from pyro_vi_kit.optimize.deterministic.modes import with_modes
from pyro_vi_kit.optimize.engines import (
    BatchSource,
    CapturedEngine,
    EagerEngine,
    PyroEngine,
    StreamedBatches,
)
from pyro_vi_kit.optimize.result import Budget, Outcome
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
    bound: float | None = None
    note: str = ""


def train(training: Training) -> Trained:
    """Train by the first method that nothing stands in the way of, and that does not give up.

    Raises:
        OptionError: If there is none; says what stands in the way.
    """
    request, given_up = training.request, []
    for method in _possible(request, training.guide):
        trained = method.run(training)
        if isinstance(trained, Trained):
            outcome = trained.outcome
            status = outcome.status.noting(*given_up)
            return trained._replace(outcome=dataclasses.replace(outcome, status=status))
        given_up.append(f"method={method.name!r} was tried first and given up: {trained}")
    raise AssertionError("the last method does not give up")


def obstacle(request: Request, guide: Guide) -> str | None:
    """What stands in the way of training a guide as was asked, with the remedy; None where nothing."""
    return _refusal(lambda: next(_possible(request, guide)))


def _possible(request: Request, guide: Guide) -> Iterator[Method]:
    """The methods that nothing stands in the way of, the preferred one first; the reason if none."""
    found, reason = False, None
    for method in _asked(request, guide):
        reason = method.obstacle(request, guide)
        if reason is None:
            found = True
            yield method
    if not found:
        raise OptionError(reason)


def _asked(request: Request, guide: Guide) -> list[Method]:
    if request.method != "auto":
        return [METHODS[request.method]]
    return [METHODS[name] for name in guide.methods if METHODS[name].automatic]


class Method(ABC):
    """A way to train a guide.

    Attributes:
        name: What ``method=`` calls it.
        automatic: Whether it is taken without being asked for.
    """

    name: ClassVar[str]
    automatic: ClassVar[bool] = True

    @abstractmethod
    def obstacle(self, request: Request, guide: Guide) -> str | None:
        """What stands in its way, with the remedy; None where nothing does."""

    @abstractmethod
    def run(self, training: Training) -> Trained | str:
        """Train the guide in place; the reason where it gives up, for another one to be tried."""


class FixedDraws(Method):
    """L-BFGS: on fixed draws of Gaussians and mixtures, and the searches of Laplace and Pathfinder."""

    name = "lbfgs"

    def obstacle(self, request: Request, guide: Guide) -> str | None:
        """See `Method.obstacle`."""
        possible = request.objective.is_plain_elbo and request.without_steps
        if possible and "lbfgs" in guide.methods and _search_for(guide) is not None:
            return None
        return _bound_obstacle(request, guide) or _search_obstacle(guide) or self._needs()

    def _needs(self) -> str:
        able = [repr(name) for name, spec in REGISTRY.items() if self.name in spec.methods]
        return (
            f"method='lbfgs' needs guide {', '.join(able[:-1])} or {able[-1]}, a model without learned "
            f"parameters and of at most {fixed_draws.MAX_DIM:,} dimensions, objective 'elbo', and none "
            "of engine='pyro', optimizer=, estimator=, steps=, epochs= and batch_size=; use "
            "method='stochastic'"
        )

    def run(self, training: Training) -> Trained:
        """See `Method.run`."""
        request, guide = training.request, training.guide
        if request.checkpoint is not None:
            raise OptionError(
                "checkpoint= is for stochastic steps, and this fit is one of L-BFGS on fixed draws, "
                "which takes seconds: leave checkpoint= out, or ask for steps by method='stochastic', "
                "batch_size= or epochs="
            )
        fit: Any = _search_for(guide)
        given: dict[str, Any] = {}
        if fit is mixtures.fit:
            start = initialise.components_of(guide) if request.resumed else training.point
            below = training.warm_start
            best = None if below is None else initialise.gaussian_of(below)
            given = {"found": training.found, "best": best}
        else:
            start = initialise.gaussian_of(guide) if request.resumed else training.point
        with Progress(f"{guide.name} (L-BFGS)", enabled=request.progress) as progress:
            outcome = fit(guide, training.search(progress), start, **given)
        return _trained(training, outcome)


class Moments(Method):
    """The posterior's own mean and covariance, by importance sampling."""

    name = moments.NAME

    def obstacle(self, request: Request, guide: Guide) -> str | None:
        """See `Method.obstacle`."""
        plain = request.without_steps and request.checkpoint is None
        if request.objective.matches_moments and moments.applies_to(guide) and plain:
            return None
        return _bound_obstacle(request, guide) or (
            "method='moments' needs objective 'forward_kl', guide 'mean_field' or 'full_rank', data in "
            f"memory, a model without learned parameters and of at most {moments.MAX_DIM} dimensions, "
            "and none of engine='pyro', optimizer=, estimator=, steps=, epochs=, checkpoint= and "
            "batch_size=; use method='stochastic'"
        )

    def run(self, training: Training) -> Trained | str:
        """See `Method.run`; gives up where estimates do not settle and it was not asked for."""
        request, guide, modes = training.request, training.guide, ()
        if request.resumed:
            start = initialise.gaussian_of(guide)
        else:
            found = fixed_draws.prefit(training.search(), training.point)
            start, modes = found.best, found.modes
        tolerance = request.tolerance if request.own_tolerance else _MOMENTS_TOLERANCE
        with Progress(f"{guide.name} (moments)", enabled=request.progress) as progress:
            outcome, bound = moments.fit(guide, training.search(progress, tolerance), start)
        if request.method == "auto" and outcome.status.reason == "not converged":
            return outcome.status.advice
        status = with_modes(outcome.status, modes, guide)
        return _trained(training, dataclasses.replace(outcome, status=status), bound)


class Sweeps(Method):
    """Coordinate ascent with the model's own updates."""

    name = cavi.NAME
    automatic = False

    def obstacle(self, request: Request, guide: Guide) -> str | None:
        """See `Method.obstacle`."""
        updates, name, density = request.model.updates, request.model.name, guide.density
        latents = [site.name for site in density.latents]
        missing = [site for site in latents if site not in updates]
        if missing:
            return (
                f"method='cavi' needs an update for each latent, and model {name!r} has "
                f"none for {', '.join(map(repr, missing))}: give vi.Model(..., "
                f"updates={{{missing[0]!r}: update}}), or leave method= out"
            )
        unknown = [site for site in updates if site not in latents]
        if unknown:
            return (
                f"updates= name {unknown[0]!r}, which is no continuous latent of model "
                f"{name!r}; it has {', '.join(map(repr, latents))}"
            )
        plain = request.objective.is_plain_elbo and request.without_steps
        fixed = not (density.params or density.discrete or density.streamed is not None)
        if plain and fixed and request.checkpoint is None:
            return None
        return (
            "method='cavi' sweeps over all data, with objective 'elbo', a model without learned "
            "parameters and discrete latents, and none of engine='pyro', optimizer=, estimator=, "
            "steps=, epochs=, checkpoint= and batch_size=: leave method= out"
        )

    def run(self, training: Training) -> Trained:
        """See `Method.run`."""
        request, guide = training.request, training.guide
        point = None if request.resumed else training.point
        with Progress(f"{guide.name} (sweeps)", enabled=request.progress) as progress:
            search = training.search(progress)
            return _trained(training, cavi.fit(guide, search, request.model.updates, point))


class Steps(Method):
    """Stochastic steps, whose rate falls by itself or by epochs."""

    name = "stochastic"

    def obstacle(self, request: Request, guide: Guide) -> str | None:
        """See `Method.obstacle`."""
        return (
            _bound_obstacle(request, guide)
            or (None if self.name in guide.methods else _search_obstacle(guide))
            or _refusal(lambda: estimator_of(request, guide))
            or self._engine_obstacle(request, guide)
        )

    def _engine_obstacle(self, request: Request, guide: Guide) -> str | None:
        if request.checkpoint is not None and request.engine == "pyro":
            return (
                "checkpoint= keeps the steps of this package's engines: leave out engine='pyro', or "
                "save the posterior and go on with resume="
            )
        cast = request.epochs is not None and request.epochs.autocast
        if cast and guide.density.dtype != torch.float32:
            return (
                "Epochs(precision='bfloat16') casts float32 and leaves float64 as it is: give "
                "dtype=torch.float32 too"
            )
        return None

    def run(self, training: Training) -> Trained:
        """See `Method.run`."""
        request, guide = training.request, training.guide
        batches = minibatches.batches_for(request, guide)
        try:
            start = initialise.begin(training, batches)
            engine = _engine(training, batches)
            steps = schedule.adaptive if request.epochs is None else schedule.by_epochs
            outcome, found = steps(training, engine, start.whitened)
        finally:
            if isinstance(batches, StreamedBatches):
                batches.close()
        status = _with_kept(with_modes(outcome.status, start.modes, guide), guide)
        bound = None if request.objective.is_elbo else found
        note = engine.note if isinstance(engine, CapturedEngine) and engine.name == "eager" else ""
        if isinstance(engine, EagerEngine):
            bound = engine.reported(bound)
        approximation = GuideApproximation(guide.name, guide, engine.params)
        outcome = dataclasses.replace(outcome, status=status)
        return Trained(approximation, outcome, engine.name, bound, note)


METHODS: dict[str, Method] = {
    method.name: method for method in (FixedDraws(), Moments(), Steps(), Sweeps())
}


def _trained(training: Training, outcome: Outcome, bound: float | None = None) -> Trained:
    guide = training.guide
    approximation = GuideApproximation(guide.name, guide, guide.density.params)
    return Trained(approximation, outcome, outcome.engine, bound)


def _search_for(guide: Guide) -> Callable[..., Outcome] | None:
    """What fits this guide without stochastic steps; None where nothing does."""
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, GaussianMixture):
        return mixtures.fit if mixtures.applies_to(guide) else None
    if isinstance(family, ModeNormal | PathMixture):
        fit = laplace_fit.fit if isinstance(family, ModeNormal) else pathfinder.fit
        fits = not guide.density.params and guide.density.dim <= fixed_draws.MAX_DIM
        return fit if fits else None
    return fixed_draws.fit if fixed_draws.applies_to(guide) else None


# -- obstacles that methods share -----------------------------------------------------------------


def _refusal(check: Callable[[], object]) -> str | None:
    """What a check refuses, in its words; None where it lets pass."""
    try:
        check()
    except OptionError as error:
        return str(error)
    return None


def _bound_obstacle(request: Request, guide: Guide) -> str | None:
    """What stands between this guide and the objective, by whatever method."""
    objective = request.objective
    if guide.point and not objective.is_plain_elbo:
        return (
            f"guide {guide.name!r} is a point and has no multi-sample bound: objective "
            f"{objective.name!r} needs a guide with spread; use objective='elbo'"
        )
    return _refusal(lambda: objective.require(guide)) or _warmup_obstacle(request)


def _search_obstacle(guide: Guide) -> str | None:
    """What a guide says that no steps on a bound can fit; None of others."""
    if guide.methods != (FixedDraws.name,):
        return None
    return (
        f"guide {guide.name!r} is found by a search of the log density and not by steps on a bound: "
        "it takes a model without learned parameters and of at most "
        f"{fixed_draws.MAX_DIM:,} dimensions, objective 'elbo', and none of method='stochastic', "
        "engine='pyro', optimizer=, estimator=, steps=, epochs= and batch_size=; use "
        "guide='full_rank' with these"
    )


def _warmup_obstacle(request: Request) -> str | None:
    """What would end, or count, a warm-up otherwise than in steps of this package's Adam."""
    objective, warmup = request.objective, request.objective.warmup
    if not warmup:
        return None
    other = "or use objective='elbo'"
    if request.engine == "pyro" and (reason := _refusal(objective.stock_loss)):
        return reason
    if request.optimizer is not None:
        return (
            f"objective {objective.name!r} counts the steps of this package's Adam: leave optimizer= "
            f"out, {other}"
        )
    if request.epochs is not None:
        return (
            f"objective {objective.name!r} has a schedule in steps, and epochs= another: leave epochs= "
            f"out, {other}"
        )
    if request.steps is not None and request.steps <= warmup:
        return (
            f"objective {objective.name!r} is the ELBO after {warmup:,} steps, and "
            f"steps={request.steps:,} ends before: give more steps=, or "
            f"vi.objectives.Annealed(steps={max(request.steps // 2, 1)})"
        )
    return None


# -- steps ----------------------------------------------------------------------------------------


def estimator_of(request: Request, guide: Guide | PyroGuide) -> str:
    """The gradient estimator that ``estimator=`` stands for.

    Raises:
        OptionError: If it is not defined here.
    """
    if request.engine == "pyro" or not isinstance(guide, Guide):
        if request.estimator not in ("auto", "pathwise"):
            raise OptionError(
                f"estimator={request.estimator!r} is of the guides and engines of this package; "
                "pyro.infer.SVI has its own: leave estimator= out, or leave out engine='pyro'"
            )
        return "pathwise"
    automatic = request.estimator == "auto"
    name = estimators.chosen(guide, request.objective) if automatic else request.estimator
    reason = estimators.obstacle(guide, request.objective, name)
    if reason is not None:
        raise OptionError(f"estimator={name!r} cannot work here: {reason}")
    return name


def _engine(training: Training, batches: BatchSource | None) -> EagerEngine | PyroEngine:
    """What executes the steps."""
    request, guide = training.request, training.guide
    objective = _with_particles(request, guide)
    options: dict[str, Any] = {
        "seed": request.seed,
        "batches": batches,
        "optimizer": request.optimizer,
    }
    if request.engine == "pyro":
        return PyroEngine(request.model, guide, objective, density=guide.density, **options)
    options["estimator"] = estimator_of(request, guide)
    if request.epochs is not None:
        options |= {"clip": request.epochs.clip, "precision": request.epochs.autocast}
    if request.engine == "eager":
        return EagerEngine(guide, objective, **options)
    compiled, steady = request.engine == "compiled", training.checkpoint is not None
    return CapturedEngine(guide, objective, compiled=compiled, steady=steady, **options)


def _with_particles(request: Request, guide: Guide) -> Objective:
    """As many particles as cost next to nothing, where the objective was named and K is only noise."""
    objective = request.objective
    if not request.named_objective or objective.multi_sample:
        return objective
    particles = _affordable(request, guide)
    estimator = estimator_of(request, guide)
    if estimator == "stratified":
        # As many draws in all.
        strata = max(family.strata for family in guide.families.values())  # type: ignore[operator]
        particles = max(1, particles // strata // 2 * 2)
    if guide.scored or estimator == "score":
        # Each draw is compared with the others, and the noise is many times that of other estimators.
        particles = max(particles, _SCORE_PARTICLES)
    return dataclasses.replace(objective, particles=particles)  # type: ignore[type-var]


def _affordable(request: Request, guide: Guide) -> int:
    """Particles that cost next to nothing."""
    density = guide.density
    if request.engine == "pyro":
        particles = 4  # one after the other
    elif density.params:
        return 1
    elif request.batch_size is not None:
        # The noise of a batch in the means cancels over an epoch. In the spreads it is multiplied by a
        # draw, and does not: particles average it away.
        return 16 if any(block.plate for block in guide.blocks) else 4
    else:
        particles = 64 if is_small(density) and density.dim <= fixed_draws.MAX_DIM else 16
    if request.objective.warmup and request.batch_size is None and not density.params:
        # How mass is shared among modes is settled by the few draws between them.
        numbers = density.dim + sum(t.numel() for t in density.data)
        particles = max(particles, min(_ANNEALED_PARTICLES, _ANNEALED_NUMBERS // numbers))
    return particles


def _with_kept(status: Status, guide: Guide) -> Status:
    """Say which latents are normal although the families were to follow the supports."""
    kept = [name for block in guide.blocks for name in guide.family_of(block).kept]
    if not kept:
        return status
    names = ", ".join(map(repr, kept))
    words = f"No family fits the support of {names}: normal in unconstrained space."
    return dataclasses.replace(status, advice=f"{status.advice} {words}")


# -- Pyro guides of the user's --------------------------------------------------------------------


def train_pyro_guide(
    request: Request,
    guide: PyroGuide,
    density: Density | None,
    state: dict[str, Any] | None,
    budget: Budget,
) -> Trained:
    """Train a Pyro guide callable by a literal `pyro.infer.SVI`.

    Args:
        request: How.
        guide: Trained in place.
        density: The model's, where it has one.
        state: The parameter store to start from.
        budget: What may be spent.

    Raises:
        OptionError: If something is asked for that SVI does not do.
    """
    _require_plain_svi(request)
    where = request.device or device_of((request.model.args, dict(request.model.kwargs)))
    model, objective = placed(request.model, where), request.objective
    if request.named_objective and not objective.multi_sample:
        # Pyro takes one after another, and steps on one draw each come as far in a tenth of the time.
        objective = dataclasses.replace(objective, particles=1)  # type: ignore[type-var]
    engine = PyroEngine(
        model,
        guide,
        objective,
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
    outcome, found = schedule.adaptive_svi(request, name_of(guide), engine, budget)
    dtype = default_dtype() if density is None else density.dtype
    params = {
        name: value.clone().requires_grad_(
            density is not None and density.params[name].requires_grad
        )
        for name, value in engine.params.items()
    }
    trained = TrainedGuide(model, guide, sites, engine.state, params, dtype, density, engine.device)
    bound = None if objective.is_elbo else found
    return Trained(approximation_of(trained, marginal), outcome, engine.name, bound)


def name_of(guide: PyroGuide) -> str:
    """What a Pyro guide is called."""
    return getattr(guide, "__name__", type(guide).__name__)


def _require_plain_svi(request: Request) -> None:
    option = "epochs=" if request.epochs is not None else "checkpoint="
    if request.epochs is not None or request.checkpoint is not None:
        raise OptionError(
            f"{option} needs a guide of this package; a Pyro guide callable is trained by "
            "pyro.infer.SVI with steps= or budget=, and goes on with resume="
        )
    if request.method not in ("auto", Steps.name):
        raise OptionError(
            f"method={request.method!r} runs the Gaussian guides of this package; use 'stochastic'"
        )
    if request.batch_size is not None:
        raise OptionError(
            "batch_size= needs a guide of this package; with a Pyro guide of your own, give the plates "
            "of model and guide a subsample_size"
        )

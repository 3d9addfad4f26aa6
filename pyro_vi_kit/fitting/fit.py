"""`fit`: from a model and a guide's name to a posterior."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vi_kit import guides
from pyro_vi_kit.capture.turns import ending_here
from pyro_vi_kit.core import checkpoint as checkpoints
from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import ModelError, OptionError, ShapeError, ViError, first_line
from pyro_vi_kit.core.options import SEED, checks, optional, path, positive
from pyro_vi_kit.core.runtime import RandomStream, a_dtype, default_dtype, one_thread
from pyro_vi_kit.core.stopping import failing_in_words, fit_error, terminable
from pyro_vi_kit.fitting import auto, initialise, minibatches, plan, resuming
from pyro_vi_kit.fitting.plan import PyroGuide
from pyro_vi_kit.fitting.request import Options, Request, Training, checked, located, site_values
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.model import fingerprint
from pyro_vi_kit.model.groups import require_names
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.initial import InitFunction
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.objectives import Objective
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.modes import Found
from pyro_vi_kit.optimize.engines import OptimizerFactory
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic.epochs import Epochs
from pyro_vi_kit.posterior import Posterior, is_small
from pyro_vi_kit.posterior.record import Record


@checks(
    model=a_model,
    budget=optional(positive),
    seed=optional(SEED),
    checkpoint=optional(path),
    dtype=optional(a_dtype),
)
@terminable
@failing_in_words
@ending_here()  # compilers
@torch.enable_grad()  # the caller may have gradients off
def fit(
    model: Model,
    guide: str | GuideSpec | Guide | PyroGuide | None = None,
    objective: str | Objective | None = None,
    *,
    method: str = "auto",
    engine: str = "auto",
    estimator: str = "auto",
    tol: float | None = None,
    budget: float | None = None,
    steps: int | None = None,
    init: str | Mapping[str, Any] | InitFunction = "auto",
    optimizer: OptimizerFactory | None = None,
    batch_size: int | Mapping[str, int] | None = None,
    device: Device | None = None,
    epochs: int | Epochs | None = None,
    resume: Posterior | str | Path | None = None,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Posterior:
    """Fit a guide to a model's posterior. No learning rate or number of steps has to be given.

    Args:
        model: The model and its data.
        guide: A name (see `vi.guides.names()`), a configured instance such as
            ``vi.guides.AffineCoupling(layers=4)``, or any Pyro guide callable. A guide object of your
            own is trained in place, as in stock Pyro. By default ``"full_rank"``, and ``"mean_field"``
            for more than 1,000 dimensions. ``"auto"`` begins with these and goes on to flows and
            mixtures only while the verdict asks for it; ``posterior.ladder`` says what was tried.
        objective: ``"elbo"`` (the default), another name of `vi.objectives.names()`, such as ``"iwae"``
            or ``"forward_kl"``, or an instance such as ``vi.objectives.Renyi(alpha=0.5, particles=16)``.
        method: ``"lbfgs"`` (Gaussian guides and mixtures, ELBO), ``"moments"`` (Gaussian guides,
            forward KL), ``"cavi"`` (`mean_field` by the model's own updates), ``"stochastic"``, or
            ``"auto"``.
        engine: ``"captured"`` records a step on the vectorised density and replays it, compiled once
            a fit turns out to be long; ``"compiled"`` waits for the compiler (10 to 30 seconds) first;
            ``"eager"`` runs the model at each step; ``"pyro"`` is a literal `pyro.infer.SVI`.
            ``"auto"`` captures wherever the model and guide allow it.
        estimator: Of the gradient in stochastic steps: ``"pathwise"``; ``"dreg"``, doubly
            reparameterised (for the ELBO: stick-the-landing), which has no variance where the guide is
            exact; ``"score"``, the score function with the other draws as its baseline, for guides
            whose draws have no derivative; or ``"stratified"``, for mixtures: draws of every component,
            with the weights as exact factors. ``"auto"`` takes ``"dreg"`` wherever it is defined.
        tol: Nats that the bound may fall short by. By default 0.01, and for stochastic steps 0.001 a
            dimension if that is more; where parameters are learned or latents lie in a data plate,
            0.1 % of the bound if that is more.
        budget: Seconds after which to stop with what there is. It is the one thing that the clock
            decides: a fit that it has cut short has other numbers the next time. By default there is
            none; ``guide="auto"`` stops by counted work then, worth about two minutes.
        steps: The most stochastic steps; asks for them where L-BFGS could be taken.
        init: ``"auto"``: near the mode, and flows and multi-sample fits from the best Gaussian;
            ``"origin"``: the origin of unconstrained space; a dict of site values; or a function of the
            site as Pyro's, ``pyro.infer.autoguide.init_to_value(values=...)``, of which ``"median"``,
            ``"mean"``, ``"sample"``, ``"feasible"`` and ``"uniform"`` name the plain ones. With values
            or a function the model is first run there too, for models that raise elsewhere.
        optimizer: Makes a torch optimiser from parameters, in the place of Adam with an automatic
            rate: ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        batch_size: Rows of the data plate in each step, or ``{plate: rows}``. The model has to index
            its data with the plate's indices, or use `pyro.subsample`. Latents inside the plate get
            numbers of their own, row by row, or an encoder (guide ``"amortized"``). Streamed data
            always come in batches: by default of about 200,000 numbers, or what the loader says.
        device: Where to compute: ``"cuda"``, ``"cuda:1"``, ``"cpu"``. Data, guide and copies of the
            model's weights are put there. By default where the model's data are, or the CPU.
        epochs: Train by so many passes over the data, in the place of steps that stop by themselves; a
            `vi.Epochs` also says the rate and its schedule, what to validate on and when to stop early.
        resume: An earlier fit of the same model, or the path of a saved one, to go on from: its
            parameters, and its guide, objective, engine and minibatches where none are given. Losses,
            evaluations and seconds are those of both.
        checkpoint: A file that keeps the state of the fit, written every half minute, at the end of
            every epoch and on Ctrl-C. Where it exists, the same call goes on from it, with the numbers
            of a fit that was never stopped; where that has ended, it gives what it ended with. For
            stochastic steps. No compiler takes over then, unless ``engine="compiled"``.
        seed: The same seed gives the same numbers on the same machine, unless ``budget=`` cut it short.
        dtype: Precision; float64 by default, torch's default dtype for ``"amortized"``.
        progress: Show progress on stderr; None shows it on a terminal only.

    Raises:
        ModelError: If the model or its data cannot be used.
        OptionError: If a name or an option is wrong, or a combination cannot work.
        FitError: If the model raises in the middle of the fit; its ``posterior`` is what there is.
    """
    started = time.monotonic()
    guides.require_choice(guide)
    options = Options(
        objective=objective,
        method=method,
        engine=engine,
        estimator=estimator,
        tol=tol,
        budget=budget,
        steps=steps,
        init=init,
        optimizer=optimizer,
        batch_size=batch_size,
        device=device,
        epochs=epochs,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )
    if isinstance(guide, str) and guide == guides.AUTO:
        auto.require_none(resume=resume, checkpoint=checkpoint)
        return _fit_auto(checked(model, **options), dtype, started)
    earlier = None
    if resume is not None:
        earlier = resuming.earlier_fit(resume, model, guide, device)
        guide = resuming.same_guide(earlier, guide)
        options = resuming.completed(options, earlier)
    saved = None if checkpoint is None else checkpoints.read(checkpoint)
    if saved is not None and options.get("seed") is None:
        options["seed"] = saved.identity.get("seed")
    request = checked(model, resumed=earlier is not None, **options)
    if model.stream is not None:
        minibatches.require_streamable(request, guide)
    allowed = Budget.of_seconds(request.budget)
    if earlier is None:
        job = _prepared(request, guide, dtype, allowed)
    else:
        job = _going_on(request, guide, earlier, dtype)
    return _carried_out(request, job, allowed, earlier, saved, started)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is to be trained.

    Attributes:
        chosen: What ``guide=`` stands for.
        guide: The guide itself.
        density: The model's, where it has one.
        init: Values by site, ``"auto"`` or ``"origin"``.
        found: What searches for modes came to, where they are done.
        state: The parameter store that a Pyro guide goes on from.
        given_up: What was tried before and given up, one line each.
    """

    chosen: GuideSpec | Guide | PyroGuide
    guide: Guide | PyroGuide
    density: Density | None
    init: str | Mapping[str, Any] = "auto"
    found: Found | None = None
    state: dict[str, Any] | None = None
    given_up: tuple[str, ...] = ()

    def trained(
        self, request: Request, budget: Budget, checkpoint: Checkpoint | None = None
    ) -> plan.Trained:
        """Train it."""
        if not isinstance(self.guide, Guide):
            return plan.train_pyro_guide(request, self.guide, self.density, self.state, budget)
        return plan.train(Training(request, self.guide, budget, self.init, checkpoint, self.found))


def _prepared(request: Request, guide: object, dtype: torch.dtype | None, budget: Budget) -> _Job:
    """What ``guide=`` stands for, untrained, on the model."""
    if isinstance(guide, Guide):
        if request.device not in (None, guide.density.device):
            raise OptionError(
                f"device={str(request.device)!r}, and this guide was built on "
                f"{str(guide.density.device)!r}: build it there, vi.guides.make(..., device=...), or "
                "give its name"
            )
        return _Job(guide, guide, guide.density, located(request, guide.density))
    if guide is not None and not isinstance(guide, str | GuideSpec | type) and callable(guide):
        return _of_own_guide(request, guide)
    spec = guides.specify("full_rank" if guide is None else guide)  # type: ignore[arg-type]
    if dtype is None:
        dtype = default_dtype() if spec.encodes else torch.float64
    density = _density(request, dtype, spec)
    init, found = located(request, density), None
    if guide is None and density.dim > fixed_draws.MAX_DIM:
        spec = guides.specify("mean_field")
    if spec.covers_modes:
        with one_thread(is_small(density)):
            spec, found = initialise.choose_components(request, spec, density, init, budget)
    with RandomStream(request.seed, "initial weights"):
        if request.batch_size is None:
            built = spec.build(density)
        else:
            built = minibatches.guide_for(spec, density, request.batch_size)
    return _Job(spec, built, density, init, found)


def _density(request: Request, dtype: torch.dtype, spec: GuideSpec | None = None) -> Density:
    """The model's Density, with the discrete sites that a guide holds itself."""
    return Density(
        request.model,
        dtype=dtype,
        device=request.device,
        drawn=None if spec is None else spec.drawn(),
        init=site_values(request),
    )


def _of_own_guide(request: Request, guide: PyroGuide) -> _Job:
    """A Pyro guide of the user's; what the model is called on, where a Density can say it."""
    if request.engine not in ("auto", "pyro"):
        raise OptionError(
            f"engine={request.engine!r} runs the guides of this package; a Pyro guide callable needs "
            "engine='pyro' (or 'auto')"
        )
    if request.init != "auto":
        raise OptionError(
            "init= starts the guides of this package; give a Pyro guide of your own its init_loc_fn="
        )
    try:
        return _Job(guide, guide, _density(request, default_dtype()))
    except ShapeError:
        raise
    except ModelError as error:
        # Discrete latents, structure that changes: Pyro runs what a Density refuses.
        why = f"No batched density; Pyro runs the model, a draw at a time: {first_line(error)}"
        return _Job(guide, guide, None, given_up=(why,))


def _going_on(request: Request, guide: Any, earlier: Posterior, dtype: torch.dtype | None) -> _Job:
    """An earlier fit's guide with its parameters."""
    trained, density = resuming.trained_again(earlier, request.model, dtype, request.device)
    state = None if isinstance(trained, Guide) else resuming.state_of(earlier)
    return _Job(guide, trained, density, state=state)


def _carried_out(
    request: Request,
    job: _Job,
    budget: Budget,
    earlier: Posterior | None,
    saved: checkpoints.Saved | None,
    started: float,
) -> Posterior:
    """Train, and tell how it went."""
    model, density, kept = request.model, job.density, None
    if density is not None:
        require_names(density)
    model_print = fingerprint.of_data(model) if density is None else fingerprint.of(density)
    if earlier is not None:
        resuming.require_same_model(earlier, model_print)
    if request.checkpoint is not None:
        told = resuming.identity_of(request, job.init, job.chosen, job.guide, model_print, earlier)
        if saved is not None:
            resuming.require_same_fit(request.checkpoint, saved.identity, told)
        kept = Checkpoint(request.checkpoint, told, saved)
    with one_thread(density is not None and is_small(density)):
        trained = job.trained(request, budget, kept)
    before = 0.0 if kept is None else kept.seconds
    record = _record(request, job.guide, trained, time.monotonic() - started + before)
    status = record.status.noting(*job.given_up)
    if status.reason == "budget":
        status = _clocked(status, request)
    record = dataclasses.replace(record, fingerprint=model_print, status=status)
    if earlier is not None:
        record = resuming.told_as_one(earlier.record, record)
    spec = job.chosen if isinstance(job.chosen, GuideSpec) else None
    posterior = Posterior(model, trained.approximation, record, density, spec)
    on = "" if kept is None else f" The same call goes on from {request.checkpoint}."
    return _or_its_error(posterior, trained, on)


def _fit_auto(request: Request, dtype: torch.dtype | None, started: float) -> Posterior:
    """``guide="auto"``."""
    auto.require_possible(request)
    density = _density(request, dtype or torch.float64)
    require_names(density)
    init = located(request, density)
    model_print = fingerprint.of(density)
    fit_one = functools.partial(_fit_candidate, request, density, init)
    posterior = auto.search(request, density, init, fit_one)
    posterior.record = dataclasses.replace(
        posterior.record,
        seconds=time.monotonic() - started,
        fingerprint=model_print,
        status=_clocked(posterior.record.status, request),
    )
    return posterior


def _fit_candidate(
    request: Request,
    density: Density,
    init: str | Mapping[str, Any],
    candidate: auto.Candidate,
) -> Posterior:
    """One of the guides that ``guide="auto"`` tries."""
    started = time.monotonic()
    if density.params:
        # They are trained in place, and the fits before keep theirs.
        density = _density(request, density.dtype)
    with one_thread(is_small(density)):
        spec, found = initialise.choose_components(
            request, candidate.spec, density, init, candidate.budget, candidate.found
        )
        with RandomStream(request.seed, "initial weights"):
            guide = spec.build(density)
        training = Training(
            request, guide, candidate.budget, init, None, found, candidate.warm_start
        )
        trained = plan.train(training)
    record = _record(request, guide, trained, time.monotonic() - started)
    posterior = Posterior(request.model, trained.approximation, record, density, spec)
    return _or_its_error(posterior, trained)


def _record(
    request: Request, guide: Guide | PyroGuide, trained: plan.Trained, seconds: float
) -> Record:
    """How it was fitted."""
    outcome = trained.outcome
    stepped = outcome.method == plan.Steps.name
    return Record(
        objective=request.objective,
        method=outcome.method,
        engine=trained.engine,
        note=trained.note,
        status=outcome.status,
        losses=np.asarray(outcome.losses),
        evaluations=outcome.evaluations,
        seconds=seconds,
        seed=request.seed,
        bound=trained.bound,
        skipped=outcome.skipped,
        estimator=plan.estimator_of(request, guide) if stepped else None,
        batch_size=request.batch_size,
        history={name: np.asarray(column) for name, column in outcome.history.items()},
    )


def _clocked(status: Status, request: Request) -> Status:
    """The status of a fit whose numbers a clock has decided, where the user gave it so many seconds."""
    if request.budget is None:
        return status
    return status.noting(
        f"budget={request.budget:g} s was held against the clock: the same seed may stop elsewhere."
    )


def _or_its_error(posterior: Posterior, trained: plan.Trained, more: str = "") -> Posterior:
    """The posterior, unless something was raised while it was fitted."""
    error = trained.outcome.error
    if isinstance(error, ViError):
        raise error
    if isinstance(error, Exception):
        raise fit_error(error, posterior, more) from error
    return posterior

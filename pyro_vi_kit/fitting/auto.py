"""``guide="auto"``: from a Gaussian up to flows and mixtures, while the verdict asks for it.

A rung is a fit of one guide with its verdict. The first is a Gaussian, which takes a second and is often
enough. Where searches from several points found several modes, mixtures are next, and flows else: no
flow over one Gaussian covers two modes that lie apart. A flow starts from the Gaussian or the flow below
it. The climb
ends at a good verdict, at the top, or where the time left is too short for one more rung; the
posterior is the one of the best verdict, and of the highest ELBO among equals, which are all bounds on
the same evidence.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pyro_vi_kit.core.errors import FitError, OptionError, ViError
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.core.stopping import fit_error
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.fitting.initialise import starting_point
from pyro_vi_kit.fitting.request import Request
from pyro_vi_kit.guides import (
    AffineCoupling,
    FullRank,
    Guide,
    GuideSpec,
    LowRank,
    MeanField,
    Mixture,
)
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic import fixed_draws, mixtures
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.posterior.diagnostics.verdict import GOOD_KHAT
from pyro_vi_kit.posterior.record import Rung

# Seconds.
BUDGET = 120.0
# Of the time left, for a rung with others above it.
_SHARE = 0.8
# Of the time left: what an evaluation takes that begins just before a deadline.
_RESERVE = 0.03
# Gradient steps, of as many particles, below which a flow, and a mixture, is hardly worth beginning.
_LEAST_STEPS, _LEAST_OF_MIXTURE = 300, 100
_PARTICLES = 64
_MAX_COMPONENTS = 8
# A full covariance for each component becomes dear; flows hold a dense one.
_MANY_DIMS = 200
_LARGER_FLOW = AffineCoupling(layers=16, hidden=(64,))
_ORDER = {"reject": 0, "resample": 1, "good": 2}

Fit = Callable[[Request, GuideSpec, Density], Posterior]
"""Trains one guide: from a request, the guide and the model."""


@dataclass
class _Climb:
    """A climb under way.

    Attributes:
        request: The fit, with a deadline.
        density: The model.
        fit: Trains one guide.
        rungs: What was tried or left out so far, with its posterior where there is one.
        interrupted: Whether the user has ended it.
        verdict_seconds: What the slowest verdict took.
    """

    request: Request
    density: Density
    fit: Fit
    rungs: list[tuple[Rung, Posterior | None]] = field(default_factory=list)
    interrupted: bool = False
    verdict_seconds: float = 0.0

    @property
    def tried(self) -> list[tuple[Rung, Posterior]]:
        """The rungs with a posterior."""
        return [(rung, posterior) for rung, posterior in self.rungs if posterior is not None]

    @property
    def best(self) -> tuple[Rung, Posterior]:
        """The rung of the best verdict, and of the highest ELBO among equals."""
        return max(self.tried, key=lambda each: _rank(each[0]))

    @property
    def left(self) -> float:
        """Seconds for the next rung's training, its verdict set aside; infinite without a deadline."""
        if self.request.deadline is None:
            return math.inf
        left = self.request.deadline - time.monotonic()
        return (1.0 - _RESERVE) * left - 2.0 * self.verdict_seconds


def require_none(**options: object) -> None:
    """Refuse options that are of one guide alone, where they are given.

    Raises:
        OptionError: If one is not None.
    """
    for option, value in options.items():
        if value is not None:
            rows = ", or guide='amortized' for latents in the data plate"
            raise OptionError(
                "guide='auto' tries several guides, each trained as suits it, and does not go with "
                f"{option}=: leave it out, or name the guide, e.g. guide='full_rank'"
                + (rows if option == "batch_size" else "")
            )


def require_possible(request: Request) -> None:
    """Refuse a request that says how one guide is to be trained.

    Raises:
        OptionError: If one is given, or the data are streamed.
    """
    if request.model.stream is not None:
        raise OptionError(
            "guide='auto' weighs the draws of every guide on all data, and these are streamed: name the "
            "guide, e.g. guide='full_rank', or guide='amortized' for latents in the data plate"
        )
    require_none(
        objective=None if request.objective.name == "elbo" else request.objective.name,
        method=None if request.method == "auto" else request.method,
        engine=request.engine if request.engine in ("pyro", "compiled") else None,
        steps=request.steps,
        optimizer=request.optimizer,
        batch_size=request.batch_size,
        epochs=request.epochs,
    )


def climb(request: Request, density: Density, fit: Fit) -> Posterior:
    """The posterior of the best rung that the time allows.

    Args:
        request: The fit, with a deadline.
        density: The model.
        fit: Trains one guide.

    Raises:
        KeyboardInterrupt: If the user interrupts before there is anything.
    """
    under_way = _Climb(request, density, fit)
    try:
        _ascend(under_way)
    except KeyboardInterrupt:
        if not under_way.tried:
            raise
        under_way.interrupted = True
    except FitError as error:
        error.posterior = _told(under_way) if under_way.tried else error.posterior
        raise
    except Exception as error:
        if isinstance(error, ViError) or not under_way.tried:
            raise
        raise fit_error(error, _told(under_way)) from error
    return _told(under_way)


def _ascend(climb: _Climb) -> None:
    """Rung after rung until it is enough."""
    dim = climb.density.dim
    _try(climb, FullRank() if dim <= fixed_draws.MAX_DIM else MeanField(), share=0.5)
    modes = climb.tried[0][1].status.modes or 1
    if modes > 1 and not climb.interrupted:
        # Looked for once, from more points, for every rung to start from or to be held against.
        given = climb.request
        found = mixtures.find(
            climb.density, given.seed, given.deadline, starting_point(given, climb.density)
        )
        climb.request = dataclasses.replace(given, found=found)
    above = _above(dim, modes)
    pace = 0.0
    for i, spec in enumerate(above):
        if climb.interrupted or _enough(climb):
            return
        pace = pace or _seconds_per_step(climb)
        least = _LEAST_OF_MIXTURE if isinstance(spec, Mixture) else _LEAST_STEPS
        needed, left = least * _pace_of(spec, climb, pace), climb.left
        if needed > left:
            reason = f"not tried: needs about {needed:.0f} s, and {max(left, 0.0):.0f} s were left"
            climb.rungs.append((Rung(_words(spec), None, None, "", 0.0, reason), None))
            continue
        _try(climb, spec, share=_SHARE if i + 1 < len(above) else 1.0)


def _above(dim: int, modes: int) -> list[GuideSpec]:
    """What comes above the Gaussian, richer and dearer from step to step."""
    if dim > fixed_draws.MAX_DIM:
        return [LowRank()]
    covariance = "full" if dim <= _MANY_DIMS else "diagonal"
    mixture = Mixture(covariance=covariance)
    if modes > 1:
        larger: GuideSpec = Mixture(components=_MAX_COMPONENTS, covariance=covariance)
        return [mixture, larger, *([AffineCoupling()] if dim > 1 else [])]
    # With one dimension there is nothing to couple. The mixture is far cheaper than the larger flow.
    return [AffineCoupling(), mixture, _LARGER_FLOW] if dim > 1 else [mixture]


def _enough(climb: _Climb) -> bool:
    """Whether richer guides are not asked for."""
    rung, _ = climb.best
    if rung.verdict == "resample" and len(climb.tried) > 1:
        # Resampling is safe, and one richer guide did no better.
        return rung.khat is not None and rung.khat <= GOOD_KHAT
    return rung.verdict == "good"


def _try(climb: _Climb, spec: GuideSpec, *, share: float) -> None:
    """One rung, in this share of the time that is left."""
    started, left = time.monotonic(), climb.left
    deadline = None if math.isinf(left) else started + share * left
    request = dataclasses.replace(climb.request, deadline=deadline, below=_below(climb, spec))
    posterior = climb.fit(request, spec, climb.density)
    ended = posterior.status.reason
    climb.interrupted = ended == "interrupted"
    judged = time.monotonic()
    verdict = posterior.verdict
    now = time.monotonic()
    climb.verdict_seconds = max(climb.verdict_seconds, now - judged)
    level = "" if verdict is None else verdict.level
    known = spec if posterior.spec is None else posterior.spec
    rung = Rung(_words(known), posterior.elbo, posterior.khat, level, now - started, ended)
    climb.rungs.append((rung, posterior))


def _below(climb: _Climb, spec: GuideSpec) -> Guide | None:
    """The guide to start from: a smaller flow, or the Gaussian. Mixtures look for modes beside it."""
    wanted: tuple[type, ...] = (FullRank, MeanField)
    if isinstance(spec, AffineCoupling):
        wanted = (AffineCoupling, *wanted)
    for kind in wanted:
        for _, posterior in reversed(climb.tried):
            finite = posterior.elbo is not None and math.isfinite(posterior.elbo)
            if isinstance(posterior.spec, kind) and finite:
                return posterior.approximation.guide  # type: ignore[attr-defined]
    return None


def _seconds_per_step(climb: _Climb) -> float:
    """What a gradient at the draws of one step takes, run by Python: replayed it takes less."""
    guide: Guide = climb.tried[0][1].approximation.guide  # type: ignore[attr-defined]
    gradients = Gradients(climb.density, patience=None)
    with (
        RandomStream(climb.request.seed, "timing"),
        isolated(climb.density.dtype, climb.density.device),
        torch.no_grad(),
    ):
        z = guide.draw(_PARTICLES).flat[guide.blocks[0].name]
    took = []
    for _ in range(2):
        started = time.perf_counter()
        try:
            gradients(z)
        except ERRORS as error:
            # Where it is not defined, it has taken about as long.
            if not is_undefined(error):
                raise
        took.append(time.perf_counter() - started)
    return min(took)


def _pace_of(spec: GuideSpec, climb: _Climb, pace: float) -> float:
    """Seconds of a step of this guide; a flow's as measured, where a smaller one was trained."""
    if not isinstance(spec, AffineCoupling):
        return pace
    for rung, posterior in reversed(climb.tried):
        if isinstance(posterior.spec, AffineCoupling):
            return max(pace, rung.seconds / max(1, len(posterior.losses)))
    return pace


def _told(climb: _Climb) -> Posterior:
    """The best posterior, with what was tried in its record."""
    chosen, posterior = climb.best
    ladder = tuple(dataclasses.replace(rung, chosen=rung is chosen) for rung, _ in climb.rungs)
    posterior.verdict  # noqa: B018 - it is of the fit, however the climb ended
    record = dataclasses.replace(
        posterior.record,
        ladder=ladder,
        evaluations=sum(each.evaluations for _, each in climb.tried),
    )
    if climb.interrupted:
        words = f"Interrupted while richer guides were tried; {chosen.guide} was the best so far."
        status = dataclasses.replace(
            posterior.status, converged=False, reason="interrupted", advice=words
        )
        record = dataclasses.replace(record, status=status)
    posterior.record = record
    return posterior


def _rank(rung: Rung) -> tuple[int, float]:
    elbo = -math.inf if rung.elbo is None or math.isnan(rung.elbo) else rung.elbo
    return _ORDER.get(rung.verdict, -1), elbo


def _words(spec: GuideSpec) -> str:
    """A guide's name, with the options that are not the default ones."""
    given = [
        f"{option.name}={getattr(spec, option.name)!r}"
        for option in dataclasses.fields(spec)  # type: ignore[arg-type]
        if getattr(spec, option.name) != option.default
    ]
    return f"{spec.name}({', '.join(given)})" if given else spec.name

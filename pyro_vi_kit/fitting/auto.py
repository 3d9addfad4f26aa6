"""``guide="auto"``: from a Gaussian up to flows and mixtures, while the verdict asks for it.

A candidate is a guide that is fitted and judged. The first is a Gaussian, which takes a second and is
often enough. Where searches from several points found several modes, mixtures are next, and flows else:
no flow over one Gaussian covers two modes that lie apart. A flow starts from the Gaussian or the smaller
flow. The search ends at a good verdict, at the richest guide, or where what is left of the budget is too
little for one more; the posterior is the one of the best verdict, and of the highest ELBO among equals,
which are all bounds on the same evidence.

Work is counted, not timed: the operations of one step and the numbers that they touch, at nominal
seconds for each, so that the same seed tries the same guides with the same steps. Only a budget that the
user gave in seconds is held against the clock.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_vi_kit.capture.recorder import MAX_NODES
from pyro_vi_kit.core.errors import FitError, OptionError, ViError
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.core.stopping import fit_error
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.core.work import Watcher
from pyro_vi_kit.fitting.request import Request, starting_point
from pyro_vi_kit.guides import FullRank, Guide, GuideSpec, MeanField
from pyro_vi_kit.guides.spec import coming_after
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo
from pyro_vi_kit.optimize.deterministic import fixed_draws, mixtures
from pyro_vi_kit.optimize.deterministic.modes import Found
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.engines import EagerEngine
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.posterior.diagnostics.verdict import GOOD_KHAT
from pyro_vi_kit.posterior.record import Rung

# Nominal seconds of counted work, where the user gave no budget.
WORK = 120.0
# An operation that is replayed, one that Python runs, and a number that one reads or writes, in nominal
# seconds: as measured on one core, where a step of full_rank at 64 draws takes 0.3 ms on the eight
# schools (153 operations, 90,000 numbers) and 107 ms on lotka_volterra (20,400 and 7,100,000).
_REPLAYED, _IN_PYTHON, _NUMBER = 1.5e-6, 5e-6, 5e-10
# Of what is left, for a rung with others above it.
_SHARE = 0.8
# Of the seconds left: what an evaluation takes that begins just before a deadline.
_RESERVE = 0.03
# Gradient steps, of as many particles, below which a flow, and a mixture, is hardly worth beginning.
_LEAST_STEPS, _LEAST_OF_MIXTURE = 300, 100
_PARTICLES = 64
_ORDER = {"reject": 0, "resample": 1, "good": 2}


@dataclass(frozen=True)
class Candidate:
    """A guide to try.

    Attributes:
        spec: It.
        budget: What its fit may spend.
        found: What searches for modes came to, where they are done.
        warm_start: A simpler guide of the same latents, trained, to start from.
    """

    spec: GuideSpec
    budget: Budget
    found: Found | None = None
    warm_start: Guide | None = None


Fit = Callable[[Candidate], Posterior]
"""Trains one candidate."""


@dataclass
class _Trials:
    """What was tried so far.

    Attributes:
        request: The fit.
        density: The model.
        init: Values by site, ``"auto"`` or ``"origin"``.
        fit: Trains one candidate.
        budget: The user's seconds, where there are any.
        found: What searches for modes came to, where they are done.
        rungs: What was tried or left out, with its posterior where there is one.
        interrupted: Whether the user has ended it.
        verdict_seconds: What the slowest verdict took.
        work: Nominal seconds of the fits so far.
    """

    request: Request
    density: Density
    init: str | Mapping[str, Any]
    fit: Fit
    budget: Budget
    found: Found | None = None
    rungs: list[tuple[Rung, Posterior | None]] = field(default_factory=list)
    interrupted: bool = False
    verdict_seconds: float = 0.0
    work: float = 0.0

    @property
    def tried(self) -> list[tuple[Rung, Posterior]]:
        """What has a posterior."""
        return [(rung, posterior) for rung, posterior in self.rungs if posterior is not None]

    @property
    def best(self) -> tuple[Rung, Posterior]:
        """What has the best verdict, and the highest ELBO among equals."""
        return max(self.tried, key=lambda each: _rank(each[0]))

    @property
    def left(self) -> float:
        """Seconds for the next candidate: nominal ones, or the user's, with its verdict set aside."""
        if self.budget.deadline is None:
            return WORK - self.work
        return (1.0 - _RESERVE) * self.budget.seconds_left - 2.0 * self.verdict_seconds


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


def search(
    request: Request, density: Density, init: str | Mapping[str, Any], fit: Fit
) -> Posterior:
    """The posterior of the best candidate that the budget allows.

    Args:
        request: The fit.
        density: The model.
        init: Values by site, ``"auto"`` or ``"origin"``.
        fit: Trains one candidate.

    Raises:
        KeyboardInterrupt: If the user interrupts before there is anything.
    """
    trials = _Trials(request, density, init, fit, Budget.of_seconds(request.budget))
    try:
        _try_all(trials)
    except KeyboardInterrupt:
        if not trials.tried:
            raise
        trials.interrupted = True
    except FitError as error:
        error.posterior = _chosen(trials) if trials.tried else error.posterior
        raise
    except Exception as error:
        if isinstance(error, ViError) or not trials.tried:
            raise
        raise fit_error(error, _chosen(trials)) from error
    return _chosen(trials)


def _try_all(trials: _Trials) -> None:
    """One candidate after the other until it is enough."""
    density = trials.density
    first = FullRank() if density.dim <= fixed_draws.MAX_DIM else MeanField()
    # Against the clock, a step of the first guide need not be counted.
    counts = trials.budget.deadline is None
    _try(trials, first, _work_per_step(trials, first) if counts else 0.0, share=0.5)
    modes = trials.tried[0][1].status.modes or 1
    if modes > 1 and not trials.interrupted:
        # Looked for once, from more points, for every candidate to start from or to be held against.
        search = Search(density, trials.request.seed, trials.budget)
        trials.found = mixtures.find(search, starting_point(trials.init, density))
    above = _above(first.name, density.dim, modes)
    for i, spec in enumerate(above):
        if trials.interrupted or _enough(trials):
            return
        try:
            per_step = _affordable(trials, spec)
        except OptionError as error:
            rung = Rung(_words(spec), None, None, "", 0.0, f"not tried: {error}")
            trials.rungs.append((rung, None))
            continue
        _try(trials, spec, per_step, share=_SHARE if i + 1 < len(above) else 1.0)


def _above(first: str, dim: int, modes: int) -> list[GuideSpec]:
    """What comes above the Gaussian, richer and dearer from step to step.

    The smallest of each guide before any larger one; but of several modes, all that can cover them.
    """
    ranked = [
        (modes > 1 and not cls.covers_modes, size, spec)
        for cls in coming_after(first)
        for size, spec in enumerate(cls.candidates(dim, modes))
    ]
    return [spec for *_, spec in sorted(ranked, key=lambda each: each[:2])]


def _affordable(trials: _Trials, spec: GuideSpec) -> float:
    """Nominal seconds of a gradient step, where there is enough left for the least number of them.

    Raises:
        OptionError: If the guide cannot be had for this model, or takes more than is left.
    """
    per_step = _work_per_step(trials, spec)
    least = _LEAST_OF_MIXTURE if spec.covers_modes else _LEAST_STEPS
    needed, left = least * per_step, max(trials.left, 0.0)
    if needed > left:
        raise OptionError(f"needs about {needed:.0f} s, and {left:.0f} s were left")
    return per_step


def _enough(trials: _Trials) -> bool:
    """Whether richer guides are not asked for."""
    rung, _ = trials.best
    if rung.verdict == "resample" and len(trials.tried) > 1:
        # Resampling is safe, and one richer guide did no better.
        return rung.khat is not None and rung.khat <= GOOD_KHAT
    return rung.verdict == "good"


def _try(trials: _Trials, spec: GuideSpec, per_step: float, *, share: float) -> None:
    """One candidate, in this share of what is left; ``per_step`` as `_work_per_step` counts it."""
    started, left, each = time.monotonic(), trials.left, per_step / _PARTICLES
    if trials.budget.deadline is None:
        budget = Budget(evaluations=max(1, int(share * left / each)))
    else:
        budget = Budget.of_seconds(share * left)
    posterior = trials.fit(Candidate(spec, budget, trials.found, _warm_start(trials, spec)))
    trials.work += each * budget.spent
    ended = posterior.status.reason
    trials.interrupted = ended == "interrupted"
    judged = time.monotonic()
    verdict = posterior.verdict
    now = time.monotonic()
    trials.verdict_seconds = max(trials.verdict_seconds, now - judged)
    level = "" if verdict is None else verdict.level
    known = spec if posterior.spec is None else posterior.spec
    rung = Rung(_words(known), posterior.elbo, posterior.khat, level, now - started, ended)
    trials.rungs.append((rung, posterior))


def _warm_start(trials: _Trials, spec: GuideSpec) -> Guide | None:
    """The guide to start from: a smaller flow, or the Gaussian. Mixtures look for modes beside it."""
    wanted: tuple[type, ...] = (FullRank, MeanField)
    if spec.extends:
        wanted = (type(spec), *wanted)
    for kind in wanted:
        for _, posterior in reversed(trials.tried):
            finite = posterior.elbo is not None and math.isfinite(posterior.elbo)
            if isinstance(posterior.spec, kind) and finite:
                return posterior.approximation.guide  # type: ignore[attr-defined]
    return None


class _Counting(Watcher):
    """Counts operations, and the numbers that they read and write; views are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            leaves = tree_leaves((args, kwargs, result))
            self.numbers += sum(each.numel() for each in leaves if isinstance(each, Tensor))
        return result

    @property
    def seconds(self) -> float:
        """Nominal ones."""
        each = _REPLAYED if self.operations <= MAX_NODES else _IN_PYTHON
        return self.operations * each + self.numbers * _NUMBER


def _work_per_step(trials: _Trials, spec: GuideSpec) -> float:
    """Nominal seconds of a gradient step of this guide, density included, at 64 draws."""
    density = trials.density
    with RandomStream(trials.request.seed, "initial weights"):
        guide = spec.build(density)
    engine = EagerEngine(guide, Elbo(_PARTICLES), seed=trials.request.seed)
    counted, where = _Counting(), isolated(density.dtype, density.device)
    with RandomStream(trials.request.seed, "counting"), where, counted:
        try:
            engine.gradient(None)
        except ERRORS as error:
            # Where it is not defined, it has done about as much.
            if not is_undefined(error):
                raise
    return counted.seconds


def _chosen(trials: _Trials) -> Posterior:
    """The best posterior, with what was tried in its record."""
    chosen, posterior = trials.best
    ladder = tuple(dataclasses.replace(rung, chosen=rung is chosen) for rung, _ in trials.rungs)
    posterior.verdict  # noqa: B018 - it is of the fit, however the search ended
    record = dataclasses.replace(
        posterior.record,
        ladder=ladder,
        evaluations=sum(each.evaluations for _, each in trials.tried),
    )
    if trials.interrupted:
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

"""Stochastic steps that need no learning rate: it falls whenever the bound stops improving.

Steps go in windows at one rate. Behind each, the average of its iterates (Polyak & Juditsky 1992) is
compared with the best average so far, on common noise. A rate has done its work when the second half
of the steps made with it gained no more than the tolerance, so that slow progress is given time in
proportion to what it has cost so far, and windows grow with it. Then the rate falls and the search
goes on from the best average.

What is left to gain follows from what the last fall of the rate has gained. The error of averaged
iterates shrinks in proportion to the rate (Dieuleveut, Durmus & Bach 2020), so when a factor of r has
gained g nats, all smaller rates together would gain g r / (1 - r) (in the spirit of Welandawe,
Andersen, Vehtari & Huggins 2022). The fit has converged when that is below the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.optimize.engines import Engine
from pyro_vi_kit.optimize.result import Budget, Outcome
from pyro_vi_kit.optimize.stochastic.runs import Runs, carry_out, keep, read, write

MAX_STEPS = 20_000

_DECAY = 0.3
_MAX_DECAYS = 5
_MAX_BAD_WINDOWS = 4
# Of fewer replicates a variance may be small by chance.
_FEW = 16


@dataclass(frozen=True)
class Schedule:
    """How long to go on, and with what rate.

    Attributes:
        rate: First learning rate; parameters are measured in posterior sds.
        window: Steps between two looks at the bound, at first; later a quarter of those made at the
            same rate.
        epoch: Steps of an epoch, of which windows are multiples.
        patience: Windows before a rate may fall. Networks go through long flat windows that lead
            somewhere; a Gaussian does not.
        max_steps: The most steps.
        replicates: Estimates of the bound in one look.
        tolerance: Nats that may be left to gain.
        relative: The same as a share of the bound's size; the larger of both counts.
        tight: Whether even log weights prove the optimum, as they do where the evidence is fixed.
        falls: How often the rate has to fall before a fit can have converged.
        noisy: Whether steps see some of the data, so that each rate leaves an error of its own.
        warmup: Steps before what is trained is the bound itself; no look is taken before their end.
        warm: What the rate is multiplied by at the first of these; it falls to 1 at their end.
    """

    rate: float = 0.005
    window: int = 100
    epoch: int = 1
    patience: int = 4
    max_steps: int = MAX_STEPS
    replicates: int = 64
    tolerance: float = 0.01
    relative: float = 0.0
    tight: bool = False
    noisy: bool = False
    warmup: int = 0
    warm: float = 1.0
    falls: int = 1


@dataclass
class _Best:
    """The best average so far and what the bound was there, on the common noise."""

    values: dict[str, Tensor] = field(default_factory=dict)
    bounds: Tensor = field(default_factory=lambda: torch.tensor([-math.inf]))

    @property
    def bound(self) -> float:
        """Nats."""
        return float(self.bounds.mean())

    @property
    def se(self) -> float:
        """Its standard error, nats."""
        if not bool(self.bounds.isfinite().all()):
            return math.inf
        return float(self.bounds.std()) / math.sqrt(len(self.bounds))


@dataclass
class _Search:
    """A fit under way.

    Attributes:
        decays: How often the rate has fallen; -1 before the first look.
        before: The best when this rate began.
        steps: Made with this rate, in windows that have ended.
        history: The best behind each of them, and how many steps that was.
        bad: Windows in a row that failed.
        extra: Gradient evaluations behind the warm-up that were no steps.
        status: How it ended.
    """

    schedule: Schedule
    runs: Runs
    best: _Best = field(default_factory=_Best)
    decays: int = -1
    before: Tensor = field(default_factory=lambda: torch.tensor([-math.inf]))
    steps: int = 0
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    bad: int = 0
    extra: int = 0
    status: Status | None = None

    @property
    def engine(self) -> Engine:
        """What executes steps."""
        return self.runs.engine

    @property
    def tolerance(self) -> float:
        """Nats."""
        size = abs(self.best.bound) if math.isfinite(self.best.bound) else 0.0
        return max(self.schedule.tolerance, self.schedule.relative * size)

    @property
    def ended(self) -> str:
        """What has run out: ``""``, ``budget`` or ``steps``."""
        if self.runs.late:
            return "budget"
        return "steps" if len(self.runs.losses) >= self.schedule.max_steps else ""

    @property
    def out_of_steps(self) -> bool:
        """Whether the steps have run out, and not the budget."""
        return self.ended == "steps"

    def state(self) -> dict[str, Any]:
        """Everything that what follows depends on, but for the losses."""
        return {
            "engine": self.engine.state(),  # type: ignore[attr-defined]
            "runs": self.runs.state(),
            "values": self.best.values,
            "bounds": self.best.bounds,
            "decays": self.decays,
            "before": self.before,
            "steps": self.steps,
            "history": list(self.history),
            "bad": self.bad,
            "extra": self.extra,
            "status": None if self.status is None else asdict(self.status),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.engine.restore(state["engine"])  # type: ignore[attr-defined]
        self.runs.restore(state["runs"], state["losses"])
        self.best = _Best(state["values"], state["bounds"])
        self.decays, self.before = state["decays"], state["before"]
        self.steps, self.history = state["steps"], [(at, bounds) for at, bounds in state["history"]]
        self.bad, self.extra = state["bad"], state.get("extra", 0)
        self.status = None if state["status"] is None else Status.of(state["status"])


def fit(
    engine: Engine,
    schedule: Schedule,
    *,
    budget: Budget,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    behind_warmup: Callable[[], int] | None = None,
) -> tuple[Outcome, float]:
    """Train the engine's parameters; leave the best average in them.

    Args:
        engine: What executes steps; one with `state` and `restore` where there is a checkpoint.
        schedule: How long to go on.
        budget: What may be spent.
        progress: Told each run of steps.
        checkpoint: Where to keep the state of the fit, and to go on from.
        behind_warmup: Called once when the warm-up is over: changes the engine's parameters in place,
            and returns the per-sample gradient evaluations that it took.

    Returns:
        How the fit went, and the bound at its end in nats.
    """
    search = _Search(schedule, Runs(engine, budget, progress))
    status, raised = carry_out(
        search,
        checkpoint,
        lambda: _run(search, checkpoint, behind_warmup),
        lambda: "; the best parameters so far were kept.",
    )
    if search.best.values:
        write(engine, search.best.values)
    keep(search, status, checkpoint)
    outcome = search.runs.outcome(status, raised)
    return replace(outcome, evaluations=outcome.evaluations + search.extra), search.best.bound


def _run(
    search: _Search, checkpoint: Checkpoint | None, behind_warmup: Callable[[], int] | None
) -> Status:
    """Levels of ever smaller rates, each of windows of steps."""
    schedule, runs = search.schedule, search.runs
    if search.decays < 0:
        _warm_up(search, checkpoint)
        if behind_warmup is not None:
            search.extra = behind_warmup()
        _evaluate(search)
        if schedule.tight and _spread(search) <= search.tolerance:
            return Status(
                True,
                "converged",
                f"It starts where the log weights are even to within {_spread(search):.2g} nats: "
                f"nothing is left to gain. {_bound_words(search)}",
            )
        _begin_level(search)
    while True:
        if runs.length == 0:
            runs.begin(_length(search))
        if checkpoint is not None:
            checkpoint.mark(search.state, runs.losses)
        if runs.advance(schedule.rate * _DECAY**search.decays):
            continue
        if _level_is_over(search):
            status = _end_level(search)
            if status is not None:
                return status
            _begin_level(search)


def _warm_up(search: _Search, checkpoint: Checkpoint | None) -> None:
    """Steps towards a bound that is not yet the one to be compared; their last iterate is the start."""
    runs = search.runs
    if not search.schedule.warmup:
        return
    if runs.length == 0:
        runs.begin(search.schedule.warmup)
    going = True
    while going:
        if checkpoint is not None:
            checkpoint.mark(search.state, runs.losses)
        left = 1.0 - runs.done / search.schedule.warmup
        going = runs.advance(search.schedule.rate * search.schedule.warm**left)
    runs.end()


def _begin_level(search: _Search) -> None:
    search.decays += 1
    search.before, search.steps = search.best.bounds, 0
    search.history = [(0, search.best.bounds)]


def _length(search: _Search) -> int:
    """Steps of the next window: whole epochs, over which the noise of minibatches cancels."""
    schedule = search.schedule
    length = max(schedule.window, search.steps // 4)
    length = -(-length // schedule.epoch) * schedule.epoch
    return min(length, schedule.max_steps - len(search.runs.losses))


def _level_is_over(search: _Search) -> bool:
    """Close a window; whether the second half of this rate's steps gained nothing that counts."""
    schedule, engine = search.schedule, search.engine
    skipped = search.runs.failed
    average, made = search.runs.end()
    search.steps += made
    last = read(engine)
    write(engine, average)
    finite = _evaluate(search)
    write(engine, last)
    failed = skipped or not finite
    search.bad = search.bad + 1 if failed else 0
    if failed or search.ended:
        return True
    search.history.append((search.steps, search.best.bounds))
    half = next(bounds for at, bounds in reversed(search.history) if at <= search.steps // 2)
    gain, se = _gain(search.best.bounds, half)
    enough = search.steps >= schedule.patience * schedule.window
    return enough and gain <= max(search.tolerance, 2.0 * se)


def _end_level(search: _Search) -> Status | None:
    """How the fit ends behind this rate; None where a smaller one is next, from the best average."""
    schedule, ended = search.schedule, search.ended
    if search.bad >= _MAX_BAD_WINDOWS or (ended and not search.best.values):
        return _diverged(search.engine)
    gain, se = _gain(search.best.bounds, search.before)
    if ended:
        return Status(False, "budget", _budget_advice(search, ended, gain, se))
    left = max(gain, 0.0) * _DECAY / (1.0 - _DECAY)
    if search.bad == 0 and search.decays >= schedule.falls and left <= max(search.tolerance, se):
        return Status(
            True,
            "converged",
            f"Smaller steps would gain about {left:.2g} nats (s.e. {se:.2g}), going by what the "
            f"last fall of the learning rate gained. {_bound_words(search)}",
        )
    write(search.engine, search.best.values)
    if search.decays < _MAX_DECAYS:
        return None
    if search.bad or not math.isfinite(left):
        return _diverged(search.engine)
    return Status(
        False,
        "not converged",
        f"Steps {_DECAY**-_MAX_DECAYS:.0f} times smaller than the first would still gain about "
        f"{left:.2g} nats (s.e. {se:.2g}): go on with resume=, or take a simpler guide. "
        f"{_bound_words(search)}",
    )


def _evaluate(search: _Search) -> bool:
    """Keep the parameters as the best if they are; whether their bound is a number at all."""
    bounds = search.engine.evaluate(search.schedule.replicates).cpu()
    gain = float((bounds - search.best.bounds).mean())
    if gain + _slack(search, bounds) > 0:
        search.best.bounds, search.best.values = bounds, read(search.engine)
    return bool(torch.isfinite(bounds.mean()))


def _slack(search: _Search, bounds: Tensor) -> float:
    """What a look may fall short by and still be kept, nats.

    A smaller rate is expected to be nearer the optimum, so what noise alone may have taken is no loss.
    """
    if not search.schedule.noisy or search.decays < 1:
        return 0.0
    return min(_gain(bounds, search.best.bounds)[1], search.tolerance)


def _gain(after: Tensor, before: Tensor) -> tuple[float, float]:
    """By how much one look is better than another, pair by pair, and the standard error: nats."""
    gains = after - before
    if not bool(gains.isfinite().all()):
        return math.inf, 0.0
    if len(gains) < 2:
        return float(gains.mean()), 0.0
    return float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))


def _spread(search: _Search) -> float:
    """Half the variance of the log weights: KL(q || p) to leading order, nats.

    A replicate averages over K of them, so its variance is K times smaller.
    """
    bounds = search.best.bounds
    if len(bounds) < _FEW or not bool(bounds.isfinite().all()):
        return math.inf
    return 0.5 * search.engine.particles * float(bounds.var())


def _diverged(engine: Engine) -> Status:
    return Status(
        False,
        "diverged",
        f"The bound or its gradient kept being NaN or infinite ({engine.skipped} steps skipped): look "
        "at vi.check(model), give init={site: value}, or try guide='mean_field'.",
    )


def _budget_advice(search: _Search, ended: str, gain: float, se: float) -> str:
    what, more = (
        ("budget", "a larger budget=") if ended == "budget" else ("number of steps", "more steps=")
    )
    moved = (
        f"({gain:+.3f} nats, s.e. {se:.3f}, at the last learning rate)"
        if math.isfinite(gain)
        else ""
    )
    return (
        f"The {what} ran out while the bound was still moving {moved}; the best parameters so far were "
        f"kept. Give {more}, or go on with resume=. {_bound_words(search)}"
    )


def _bound_words(search: _Search) -> str:
    words = f"Bound {search.best.bound:.3f} nats (s.e. {search.best.se:.2g})."
    skipped = search.engine.skipped
    if skipped:
        words += f" {skipped} steps with a NaN gradient were skipped."
    return words

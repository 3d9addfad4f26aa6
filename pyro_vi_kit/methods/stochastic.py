"""Stochastic steps that need no learning rate: it falls whenever the bound stops improving.

Steps go in stretches at one rate. Behind each, the average of its iterates (Polyak & Juditsky 1992) is
compared with the best average so far, on common noise. A rate has done its work when the second half
of the steps made with it gained no more than the tolerance, so that slow progress is given time in
proportion to what it has cost so far, and stretches grow with it. Then the rate falls and the search
goes on from the best average.

What is left to gain follows from what the last fall of the rate has gained. The error of averaged
iterates shrinks in proportion to the rate (Dieuleveut, Durmus & Bach 2020), so when a factor of r has
gained g nats, all smaller rates together would gain g r / (1 - r) (in the spirit of Welandawe,
Andersen, Vehtari & Huggins 2022). The fit has converged when that is below the tolerance.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vi_kit.engines import Engine
from pyro_vi_kit.methods.result import Outcome
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.types import Status

NAME = "stochastic"
MAX_STEPS = 20_000

_DECAY = 0.3
_MAX_DECAYS = 5
_MAX_BAD_STRETCHES = 4
_RUN_STEPS = 64
# Of fewer replicates a variance may be small by chance.
_FEW = 16


@dataclass(frozen=True)
class Schedule:
    """How long to go on, and with what rate.

    Attributes:
        rate: First learning rate; parameters are measured in posterior sds.
        stretch: Steps between two looks at the bound, at first; later a quarter of those made at the
            same rate.
        patience: Stretches before a rate may fall. Networks go through long flat stretches that lead
            somewhere; a Gaussian does not.
        max_steps: The most steps.
        replicates: Estimates of the bound in one look.
        tolerance: Nats that may be left to gain.
        relative: The same as a share of the bound's size; the larger of both counts.
        tight: Whether even log weights prove the optimum, as they do where the evidence is fixed.
    """

    rate: float = 0.005
    stretch: int = 100
    patience: int = 4
    max_steps: int = MAX_STEPS
    replicates: int = 64
    tolerance: float = 0.01
    relative: float = 0.0
    tight: bool = False


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
    """A fit under way."""

    engine: Engine
    schedule: Schedule
    deadline: float | None
    progress: Progress
    best: _Best = field(default_factory=_Best)
    losses: list[float] = field(default_factory=list)
    bad: int = 0
    run_steps: int = 1

    @property
    def tolerance(self) -> float:
        """Nats."""
        size = abs(self.best.bound) if math.isfinite(self.best.bound) else 0.0
        return max(self.schedule.tolerance, self.schedule.relative * size)

    @property
    def ended(self) -> str:
        """What has run out: ``""``, ``budget`` or ``steps``."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "budget"
        return "steps" if len(self.losses) >= self.schedule.max_steps else ""


def fit(
    engine: Engine, schedule: Schedule, *, deadline: float | None, progress: Progress
) -> tuple[Outcome, float]:
    """Train the engine's parameters; leave the best average in them.

    Args:
        engine: What executes steps.
        schedule: How long to go on.
        deadline: `time.monotonic` second at which to stop.
        progress: Told each run of steps.

    Returns:
        How the fit went, and the bound at its end in nats.
    """
    search = _Search(engine, schedule, deadline, progress)
    try:
        status = _run(search)
    except KeyboardInterrupt:
        status = Status(False, "interrupted", "Interrupted; the best parameters so far were kept.")
    if search.best.values:
        _write(engine, search.best.values)
    evaluations = len(search.losses) * engine.particles
    outcome = Outcome(NAME, status, search.losses, evaluations, engine.skipped)
    return outcome, search.best.bound


def _run(search: _Search) -> Status:
    """Levels of ever smaller rates."""
    schedule = search.schedule
    _look(search)
    if schedule.tight and _spread(search) <= search.tolerance:
        return Status(
            True,
            "converged",
            f"It starts where the log weights are even to within {_spread(search):.2g} nats: nothing "
            f"is left to gain. {_bound_words(search)}",
        )
    left = se = math.inf
    for decays in range(_MAX_DECAYS + 1):
        before = search.best.bounds
        _level(search, schedule.rate * _DECAY**decays)
        ended = search.ended
        if search.bad >= _MAX_BAD_STRETCHES or (ended and not search.best.values):
            return _diverged(search.engine)
        gain, se = _gain(search.best.bounds, before)
        if ended:
            return Status(False, "budget", _budget_advice(search, ended, gain, se))
        left = max(gain, 0.0) * _DECAY / (1.0 - _DECAY)
        if search.bad == 0 and decays > 0 and left <= max(search.tolerance, se):
            return Status(
                True,
                "converged",
                f"Smaller steps would gain about {left:.2g} nats (s.e. {se:.2g}), going by what the "
                f"last fall of the learning rate gained. {_bound_words(search)}",
            )
        _write(search.engine, search.best.values)
    if search.bad or not math.isfinite(left):
        return _diverged(search.engine)
    return Status(
        False,
        "not converged",
        f"Steps {_DECAY**-_MAX_DECAYS:.0f} times smaller than the first would still gain about "
        f"{left:.2g} nats (s.e. {se:.2g}): go on with resume=, or take a simpler guide. "
        f"{_bound_words(search)}",
    )


def _level(search: _Search, rate: float) -> None:
    """Stretches at one rate, until the second half of them gained nothing that counts."""
    schedule = search.schedule
    steps, history = 0, [(0, search.best.bounds)]
    while True:
        skipped = search.engine.skipped
        length = max(schedule.stretch, steps // 4)
        average, made = _stretch(search, min(length, schedule.max_steps - len(search.losses)), rate)
        steps += made
        last = _read(search.engine)
        _write(search.engine, average)
        finite = _look(search)
        _write(search.engine, last)
        failed = search.engine.skipped - skipped > made // 2 or not finite
        search.bad = search.bad + 1 if failed else 0
        if failed or search.ended:
            return
        history.append((steps, search.best.bounds))
        half = next(bounds for at, bounds in reversed(history) if at <= steps // 2)
        gain, se = _gain(search.best.bounds, half)
        enough = steps >= schedule.patience * schedule.stretch
        if enough and gain <= max(search.tolerance, 2.0 * se):
            return


def _stretch(search: _Search, length: int, rate: float) -> tuple[dict[str, Tensor], int]:
    """A stretch of steps: the average of its iterates, and how many steps were made.

    In short runs, so that a deadline is met and an interrupt loses little. Their lengths do not depend
    on time, which would show in the last bits of the average, until a deadline is near.
    """
    average: dict[str, Tensor] = {}
    done, pace = 0, 0.0
    while done < length:
        steps = min(search.run_steps, length - done)
        search.run_steps = min(2 * search.run_steps, _RUN_STEPS)
        if search.deadline is not None and pace > 0.0:
            steps = max(1, min(steps, int((search.deadline - time.monotonic()) / pace)))
        started = time.monotonic()
        run = search.engine.run(steps, rate)
        now = time.monotonic()
        done += steps
        search.losses.extend((-run.bounds).tolist())
        search.progress.step(float(run.bounds[-1]), steps)
        for name, value in run.average.items():
            if name not in average or not value.is_floating_point():
                average[name] = value
            else:
                average[name] += (value - average[name]) * (steps / done)
        if search.deadline is not None and now > search.deadline:
            break
        pace = (now - started) / steps
    return average, done


def _look(search: _Search) -> bool:
    """Keep the parameters as the best if they are; whether their bound is a number at all."""
    bounds = search.engine.evaluate(search.schedule.replicates)
    gain = float((bounds - search.best.bounds).mean())
    if gain > 0:
        search.best.bounds, search.best.values = bounds, _read(search.engine)
    return bool(torch.isfinite(bounds.mean()))


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


def _read(engine: Engine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.parameters().items()}


@torch.no_grad()
def _write(engine: Engine, values: dict[str, Tensor]) -> None:
    for name, parameter in engine.parameters().items():
        if name in values:
            parameter.copy_(values[name])


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

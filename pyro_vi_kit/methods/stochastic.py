"""Stochastic steps that need no learning rate: it decays whenever the bound stops improving.

Steps go in stretches. Behind each, the average of its iterates (Polyak & Juditsky 1992) is compared
with the best average so far on common noise. When a stretch no longer improves the bound beyond the
noise of that comparison, the rate falls; when it has fallen far enough, the fit has converged (in the
spirit of Welandawe et al. 2022).
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

_DECAY = 0.3
_DECAYS = 3
_MAX_BAD_STRETCHES = 4
_RUN_SECONDS = 0.2


@dataclass(frozen=True)
class Schedule:
    """How long to go on, and with what rate.

    Attributes:
        rate: First learning rate; parameters are measured in posterior sds.
        stretch: Steps between two looks at the bound.
        patience: Stretches without improvement after which the rate falls. Networks go through long
            flat stretches that lead somewhere; a Gaussian does not.
        max_steps: The most steps.
        replicates: Estimates of the bound in one look.
        tolerance: Nats per stretch below which an improvement is none; relative to the bound's size
            (0.01 %) where that is larger.
    """

    rate: float = 0.005
    stretch: int = 100
    patience: int = 4
    max_steps: int = 20_000
    replicates: int = 64
    tolerance: float = 0.01


@dataclass
class _Best:
    """The best averaged iterate and what the bound was there, on the common noise."""

    values: dict[str, Tensor] = field(default_factory=dict)
    bounds: Tensor = field(default_factory=lambda: torch.tensor([-math.inf]))


def fit(
    engine: Engine, schedule: Schedule, *, deadline: float | None, progress: Progress
) -> tuple[Outcome, float]:
    """Train the engine's parameters; leave the best average in them.

    Args:
        engine: What executes steps.
        schedule: How long to go on.
        deadline: `time.monotonic` second at which to stop.
        progress: Told each step.

    Returns:
        How the fit went, and the bound at its end in nats.
    """
    losses: list[float] = []
    best = _Best()
    try:
        status = _run(engine, schedule, best, losses, deadline, progress)
    except KeyboardInterrupt:
        status = Status(False, "interrupted", "Interrupted; the best parameters so far were kept.")
    if best.values:
        _write(engine, best.values)
    outcome = Outcome(NAME, status, losses, len(losses) * engine.particles, engine.skipped)
    return outcome, float(best.bounds.mean())


def _run(
    engine: Engine,
    schedule: Schedule,
    best: _Best,
    losses: list[float],
    deadline: float | None,
    progress: Progress,
) -> Status:
    rate, stalled, bad = schedule.rate, 0, 0
    _look(engine, schedule, best)
    while True:
        skipped = engine.skipped
        average = _stretch(engine, schedule, rate, losses, deadline, progress)
        last = _read(engine)
        _write(engine, average)
        gain, se = _look(engine, schedule, best)
        _write(engine, last)
        tolerance = max(schedule.tolerance, 1e-4 * abs(float(best.bounds.mean())))
        failed = engine.skipped - skipped > schedule.stretch // 2 or not math.isfinite(gain)
        bad = bad + 1 if failed else 0
        stalled = 0 if gain > max(tolerance, 2.0 * se) else stalled + 1
        if bad >= _MAX_BAD_STRETCHES:
            return _diverged(engine)
        out_of_time = deadline is not None and time.monotonic() > deadline
        if out_of_time or len(losses) >= schedule.max_steps:
            if not best.values:
                return _diverged(engine)
            what = "budget" if out_of_time else "largest number of steps"
            return Status(False, "budget", _budget_advice(what, gain, se))
        if failed or stalled >= schedule.patience:
            rate, stalled = rate * _DECAY, 0
            if not failed and rate < schedule.rate * _DECAY**_DECAYS:
                return Status(
                    True,
                    "converged",
                    f"The bound stopped improving: {gain:+.3f} nats (s.e. {se:.3f}) over the last "
                    f"{schedule.stretch} steps. {_skipped_words(engine)}".rstrip(),
                )
            _write(engine, best.values)


def _stretch(
    engine: Engine,
    schedule: Schedule,
    rate: float,
    losses: list[float],
    deadline: float | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """A stretch of steps; the average of its iterates.

    In runs of a fraction of a second, so that a deadline is met and an interrupt loses little.
    """
    average: dict[str, Tensor] = {}
    done, steps = 0, 1
    while done < schedule.stretch:
        steps = min(steps, schedule.stretch - done)
        started = time.monotonic()
        run = engine.run(steps, rate)
        done += steps
        losses.extend((-run.bounds).tolist())
        progress.step(float(run.bounds[-1]), steps)
        for name, value in run.average.items():
            if name not in average or not value.is_floating_point():
                average[name] = value
            else:
                average[name] += (value - average[name]) * (steps / done)
        now = time.monotonic()
        if deadline is not None and now > deadline:
            break
        pace = (now - started) / steps
        left = _RUN_SECONDS if deadline is None else min(_RUN_SECONDS, deadline - now)
        steps = max(1, min(2 * steps, int(left / max(pace, 1e-9))))
    return average


def _look(engine: Engine, schedule: Schedule, best: _Best) -> tuple[float, float]:
    """Compare the bound now with the best one, pair by pair: gain in nats and its standard error."""
    bounds = engine.evaluate(schedule.replicates)
    gains = bounds - best.bounds
    gain = float(gains.mean())
    se = float(gains.std()) / math.sqrt(len(gains)) if bool(gains.isfinite().all()) else math.inf
    if math.isnan(gain):
        return -math.inf, math.inf
    if gain > 0:
        best.bounds, best.values = bounds, _read(engine)
    return gain, se if math.isfinite(gain) else 0.0


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


def _budget_advice(what: str, gain: float, se: float) -> str:
    return (
        f"The {what} ran out while the bound was still moving ({gain:+.3f} nats, s.e. {se:.3f}, in the "
        "last stretch); the best parameters so far were kept. Give a larger budget=, or a simpler guide."
    )


def _skipped_words(engine: Engine) -> str:
    return f"{engine.skipped} steps with a NaN gradient were skipped." if engine.skipped else ""

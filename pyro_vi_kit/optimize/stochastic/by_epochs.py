"""Steps by epochs: a schedule for the rate, a bound on data held out, an early stop.

With validation data the parameters of the epoch with the best validation bound are kept, the last
iterate of that epoch (Prechelt 1998). Without them it is the average of the last epoch's iterates.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.optimize.engines import EagerEngine
from pyro_vi_kit.optimize.result import HISTORY, Budget, Outcome
from pyro_vi_kit.optimize.stochastic.epochs import Epochs
from pyro_vi_kit.optimize.stochastic.runs import Runs, carry_out, keep, read, write
from pyro_vi_kit.optimize.stochastic.validation import HeldOut, Validation, data_plate

# Steps of an epoch where each of them sees all data.
_FULL_DATA_STEPS = 100
_REPLICATES = 16
_NOTHING = HeldOut(-math.inf, math.nan)


@dataclass(frozen=True)
class Course:
    """What a fit by epochs is to do.

    Attributes:
        plan: Epochs, schedule, patience.
        rate: Learning rate at its highest.
        steps: Of an epoch.
        rows: Of the data, which bounds are told per row of; 1 where they have no plate.
        max_steps: The most steps; None for no limit but the epochs.
        validate: Gives the bound on data held out.
    """

    plan: Epochs
    rate: float
    steps: int
    rows: int = 1
    max_steps: int | None = None
    validate: Callable[[], HeldOut] | None = None

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.plan.epochs * self.steps

    @property
    def limit(self) -> int:
        """Steps after which to stop."""
        return self.total if self.max_steps is None else min(self.total, self.max_steps)


def laid_out(engine: EagerEngine, plan: Epochs, *, rate: float, max_steps: int | None) -> Course:
    """The course of this plan.

    Args:
        engine: What will execute the steps.
        plan: What was asked for.
        rate: Learning rate, where the plan has none.
        max_steps: The most steps; None for no limit but the epochs.

    Raises:
        OptionError: If the guide cannot say anything of the data to validate on.
    """
    batches, validate = engine.batches, None
    if plan.validation is not None:
        validation = Validation(engine.guide, engine.objective, plan.validation)
        validate = functools.partial(validation, engine.params)
    density = engine.guide.density
    plate = data_plate(density) if batches is None else density.structure.plates[batches.plates[0]]
    return Course(
        plan=plan,
        rate=rate if plan.rate is None else plan.rate,
        steps=_FULL_DATA_STEPS if batches is None else batches.epoch,
        rows=1 if plate is None else plate.size,
        max_steps=max_steps,
        validate=validate,
    )


@dataclass
class _Training:
    """A fit under way.

    Attributes:
        history: A row of numbers for each epoch, in the order of `HISTORY`.
        kept: Parameters that would be the result now; empty before the end of the first epoch.
        held: Their validation bound.
        best: The epoch they are from.
        seconds: Since the start of training when the last epoch ended.
        status: How it ended.
    """

    course: Course
    runs: Runs
    engine: EagerEngine
    history: list[list[float]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    held: HeldOut = _NOTHING
    best: int = 0
    seconds: float = 0.0
    status: Status | None = None
    began: float = field(default_factory=time.monotonic)

    def state(self) -> dict[str, Any]:
        """Everything that what follows depends on, but for the losses."""
        return {
            "engine": self.engine.state(),
            "runs": self.runs.state(),
            "history": list(self.history),
            "kept": self.kept,
            "held": tuple(self.held),
            "best": self.best,
            "seconds": self.elapsed,
            "status": None if self.status is None else asdict(self.status),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.engine.restore(state["engine"])
        self.runs.restore(state["runs"], state["losses"])
        self.history, self.kept = list(state["history"]), state["kept"]
        self.held, self.best, self.seconds = (
            HeldOut(*state["held"]),
            state["best"],
            state["seconds"],
        )
        self.status = None if state["status"] is None else Status.of(state["status"])

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before an interruption too."""
        return self.seconds + time.monotonic() - self.began

    @property
    def made(self) -> int:
        """Steps so far."""
        return len(self.runs.losses)

    @property
    def out_of_steps(self) -> bool:
        """Whether all steps are made."""
        return self.made >= self.course.limit

    @property
    def epoch(self) -> int:
        """The epoch under way, from 1."""
        return len(self.history) + 1


def fit(
    engine: EagerEngine,
    course: Course,
    *,
    budget: Budget,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> tuple[Outcome, float]:
    """Train the engine's parameters; leave those of the best or the last epoch in them.

    Args:
        engine: What executes steps.
        course: What to do.
        budget: What may be spent.
        progress: Told each run of steps and each epoch.
        checkpoint: Where to keep the state of the fit, and to go on from.

    Returns:
        How the fit went, and the bound at its end in nats.
    """
    training = _Training(course, Runs(engine, budget, progress), engine)
    status, raised = carry_out(
        training,
        checkpoint,
        lambda: _run(training, progress, checkpoint),
        lambda: f" in epoch {training.epoch}. {_kept(training)}",
    )
    if training.kept or training.runs.average:
        write(engine, training.kept or training.runs.average)
    keep(training, status, checkpoint)
    columns = {}
    if training.history:
        columns = dict(zip(HISTORY, map(list, zip(*training.history, strict=True)), strict=True))
    outcome = replace(training.runs.outcome(status, raised), history=columns)
    if status.reason == "failed":
        return outcome, math.nan
    return outcome, float(engine.evaluate(_REPLICATES).mean())


def _run(training: _Training, progress: Progress, checkpoint: Checkpoint | None) -> Status:
    """Epoch by epoch, until one of the reasons to stop is there."""
    course, runs = training.course, training.runs
    ended = False
    while True:
        if runs.length == 0:
            runs.begin(min(course.steps, course.limit - training.made))
        if checkpoint is not None:
            checkpoint.mark(training.state, runs.losses, now=ended)
        ended = False
        rate = _rate(training)
        if runs.advance(rate, _words(training, rate)):
            continue
        if runs.done == course.steps:
            status = _end_epoch(training, progress, rate)
            ended = True
        else:
            status = _cut_short(training)
        if status is not None:
            return status


def _rate(training: _Training) -> float:
    """The learning rate in the middle of the next run; an optimiser of the user's is given its own."""
    course = training.course
    middle = training.made + 0.5 * training.runs.ahead
    factor = course.plan.factor(middle / course.total)
    own = training.engine.scale_rates(factor)
    return course.rate * factor if own is None else own


def _end_epoch(training: _Training, progress: Progress, rate: float) -> Status | None:
    """Write an epoch down and keep its parameters if they are the best; how the fit ends, if so."""
    course, runs = training.course, training.runs
    number, failed = training.epoch, runs.failed
    average, steps = runs.end()
    bound = -float(torch.tensor(runs.losses[-steps:], dtype=torch.float64).nanmean()) / course.rows
    held = HeldOut(math.nan, math.nan) if course.validate is None else course.validate()
    row = [float(number), training.elapsed, rate, bound, held.bound]
    training.history.append(row)
    progress.line(f"epoch {number}/{course.plan.epochs}: {_numbers(bound, held.bound, rate)}")
    if failed or (course.validate is not None and not math.isfinite(held.bound)):
        return _diverged(training, number)
    if course.validate is None:
        training.kept, training.best = average, number
    elif held.bound > training.held.bound:
        training.kept, training.best, training.held = read(training.engine), number, held
    if number - training.best >= course.plan.waits:
        return Status(True, "converged", f"Stopped early in epoch {number}. {_kept(training)}")
    if number == course.plan.epochs:
        return _all_ran(training)
    return _cut_short(training) if training.out_of_steps or runs.late else None


def _all_ran(training: _Training) -> Status:
    """What to say when no epoch is left: nobody looked whether more would help."""
    number = training.epoch - 1
    advice = f"Trained for {number} epochs. {_kept(training)}"
    if training.course.validate is None:
        bounds = [row[HISTORY.index("bound")] for row in training.history[-2:]]
        moved = (
            f" The last epoch moved the training bound by {bounds[-1] - bounds[0]:+.3g}."
            if (len(bounds) > 1)
            else ""
        )
        advice += (
            f"{moved} Whether more would help shows in posterior.history, or with validation=."
        )
    elif training.best == number:
        advice += " It was still rising: more epochs may help."
    return Status(True, "converged", advice)


def _cut_short(training: _Training) -> Status:
    what = "number of steps" if training.out_of_steps else "budget"
    return Status(
        False,
        "budget",
        f"The {what} ran out after {len(training.history)} of {training.course.plan.epochs} epochs. "
        f"{_kept(training)}",
    )


def _diverged(training: _Training, number: int) -> Status:
    return Status(
        False,
        "diverged",
        f"The bound or its gradient was NaN or infinite in epoch {number} ({training.engine.skipped} "
        "steps skipped): try a smaller rate, clip=1.0 or warmup=0.1 in Epochs, or look at "
        f"vi.check(model). {_kept(training)}",
    )


def _kept(training: _Training) -> str:
    """Which parameters are the result, and how good they are."""
    unit = "nats per row" if training.course.rows > 1 else "nats"
    if not training.kept:
        return "No epoch was finished; its iterates so far are averaged."
    if training.course.validate is None:
        bound = training.history[training.best - 1][HISTORY.index("bound")]
        return f"The iterates of epoch {training.best} are averaged (training bound {bound:.4g} {unit})."
    return (
        f"The parameters of epoch {training.best} are kept: validation bound "
        f"{training.held.bound:.4g} {unit} (s.e. {training.held.se:.2g} over rows)."
    )


def _words(training: _Training, rate: float) -> str:
    """What the progress bar says."""
    runs, course = training.runs, training.course
    losses = runs.losses[-runs.done :] if runs.done else runs.losses[-1:]
    bound = -sum(losses) / len(losses) / course.rows if losses else math.nan
    validation = training.history[-1][HISTORY.index("validation")] if training.history else math.nan
    return f"epoch {training.epoch}/{course.plan.epochs}, {_numbers(bound, validation, rate)}"


def _numbers(bound: float, validation: float, rate: float) -> str:
    held = "" if math.isnan(validation) else f", validation {validation:.3f}"
    return f"bound {bound:.3f}{held}, rate {rate:.2g}"

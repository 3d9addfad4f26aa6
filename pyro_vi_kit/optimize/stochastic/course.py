"""A fit by epochs laid out for a guide and its data: steps of an epoch, rows, validation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from pyro_vi_kit.optimize.engines import EagerEngine
from pyro_vi_kit.optimize.stochastic.epochs import Epochs
from pyro_vi_kit.optimize.stochastic.validation import Held, Validation, data_plate

# Steps of an epoch where each of them sees all data.
_FULL_DATA_STEPS = 100


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
    validate: Callable[[], Held] | None = None

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

"""What every method is given and hands back: what it may spend, and how the fit went.

The parameters are in the guide.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import first_line

# What is told of each epoch: its number, seconds since the start of training, learning rate at its
# end, mean training bound and validation bound, both in nats per row of the data.
HISTORY = ("epoch", "seconds", "rate", "bound", "validation")


@dataclass
class Budget:
    """What a fit may spend: seconds that the user gave, or counted work; by default there is no end.

    Seconds are the one thing by which a clock decides what is computed. Without them the same seed gives
    the same numbers.

    Attributes:
        budget: What may be spent.
        evaluations: Per-sample gradient evaluations of the log density after which to stop.
        spent: Those so far.
    """

    deadline: float | None = None
    evaluations: int | None = None
    spent: int = 0

    @classmethod
    def of_seconds(cls, seconds: float | None) -> Budget:
        """So many seconds from now; no end when None."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinite where there is none."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    @property
    def evaluations_left(self) -> float:
        """Until the work is done that was allowed; infinite where there is no limit."""
        return float("inf") if self.evaluations is None else self.evaluations - self.spent

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self.seconds_left < 0.0 or self.evaluations_left <= 0


@dataclass(frozen=True)
class Outcome:
    """How a fit went.

    Attributes:
        method: Its name.
        status: How it ended.
        losses: Minus the bound at each step, nats; NaN where a step was skipped.
        evaluations: Per-sample gradient evaluations of the log density.
        skipped: Steps whose gradient was not finite.
        history: A list of numbers for each of `HISTORY`, one for each epoch; empty where steps do not
            go by epochs.
        engine: What evaluated the density, where that was no stochastic engine.
        error: What was raised, where the fit was interrupted or failed.
    """

    method: str
    status: Status
    losses: list[float] = field(default_factory=list)
    evaluations: int = 0
    skipped: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    engine: str = "eager"
    error: BaseException | None = None


def stopped_by(error: BaseException) -> Literal["interrupted", "failed"]:
    """What a fit is that ends with this."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def cut_short(error: BaseException, kept: str) -> Status:
    """How a fit ended that was interrupted, or in which something was raised.

    Args:
        error: What was raised.
        kept: What there is in the end, the rest of the sentence.
    """
    if isinstance(error, KeyboardInterrupt):
        return Status(False, "interrupted", f"Interrupted{kept}")
    said = f"{type(error).__name__} was raised: {first_line(error)}"
    return Status(False, "failed", f"{said}{kept}")

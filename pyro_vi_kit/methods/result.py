"""What every method hands back: how the fit went. The parameters are in the guide."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_vi_kit.types import Status


@dataclass(frozen=True)
class Outcome:
    """How a fit went.

    Attributes:
        method: Its name.
        status: How it ended.
        losses: Minus the bound at each step, nats; NaN where a step was skipped.
        evaluations: Per-sample gradient evaluations of the log density.
        skipped: Steps whose gradient was not finite.
        engine: What evaluated the density, where that was no stochastic engine.
    """

    method: str
    status: Status
    losses: list[float] = field(default_factory=list)
    evaluations: int = 0
    skipped: int = 0
    engine: str = "eager"

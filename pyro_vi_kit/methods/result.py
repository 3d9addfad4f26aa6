"""What every method hands back: how the fit went. The parameters are in the guide."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyro_vi_kit.types import Status

# What is told of each epoch: its number, seconds since the start of training, learning rate at its
# end, mean training bound and validation bound, both in nats per row of the data.
HISTORY = ("epoch", "seconds", "rate", "bound", "validation")


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
    """

    method: str
    status: Status
    losses: list[float] = field(default_factory=list)
    evaluations: int = 0
    skipped: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    engine: str = "eager"

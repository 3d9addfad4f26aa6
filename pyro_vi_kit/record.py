"""How a fit was done: what `Posterior` reports and what its file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pyro_vi_kit.types import Objective, Status


@dataclass(frozen=True, eq=False)
class Record:
    """How a fit was done.

    Attributes:
        objective: What was maximised.
        method: ``lbfgs`` or ``stochastic``.
        engine: ``captured``, ``compiled``, ``eager`` or ``pyro``.
        status: How it ended.
        losses: Minus the bound at each step, nats.
        evaluations: Per-sample gradient evaluations of the log density.
        seconds: Wall time of the whole fit.
        seed: What the fit's random numbers started from.
        bound: The trained objective's value at the end, nats; None where it is the ELBO.
        skipped: Steps whose gradient was not finite.
        estimator: Of the gradient, where steps were stochastic: ``pathwise`` or ``dreg``.
        batch_size: Rows of the data plate in each step; all when None.
        history: What is told of each epoch, columns of equal length; empty where there were none.
        refined: Whether it is of the numbers of each row alone, which an encoder had given before.
        correction: What was done to the fitted guide afterwards, in words; empty where nothing was.
        note: Why steps were not captured, where they should have been; empty otherwise.
    """

    objective: Objective
    method: str
    engine: str
    status: Status
    losses: np.ndarray
    evaluations: int
    seconds: float
    seed: int
    bound: float | None = None
    skipped: int = 0
    estimator: str | None = None
    batch_size: int | Mapping[str, int] | None = None
    note: str = ""
    history: Mapping[str, np.ndarray] = field(default_factory=dict)
    refined: bool = False
    correction: str = ""

    def attrs(self) -> dict[str, str | int | float]:
        """What an exported file says of it."""
        return {
            "objective": self.objective.name,
            "method": self.method,
            "engine": f"{self.engine} ({self.note})" if self.note else self.engine,
            "refined": int(self.refined),
            "seed": self.seed,
            "status": self.status.reason,
            "advice": self.status.advice,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        } | ({"correction": self.correction} if self.correction else {})

"""How a fit was done: what `Posterior` reports and what its file keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.objectives import Objective

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rung:
    """One guide that ``guide="auto"`` tried, or left out.

    Attributes:
        guide: Its name, with the options that are not the default ones.
        elbo: Nats; None where it was left out.
        khat: Pareto k-hat of the joint importance ratios; None where it was left out.
        verdict: ``good``, ``resample`` or ``reject``; empty where it was left out.
        seconds: Wall time, verdict included.
        ended: How its fit ended (`Status.reason`), or why it was left out.
        chosen: Whether it is the posterior.
    """

    guide: str
    elbo: float | None
    khat: float | None
    verdict: str
    seconds: float
    ended: str
    chosen: bool = False

    def __str__(self) -> str:
        """It in a few words, a star where it was chosen."""
        if not self.verdict:
            return f"{self.guide} ({self.ended})"
        star = "*" if self.chosen else ""
        return f"{self.guide}{star} ({self.verdict}, k-hat {self.khat:.2f}, {self.seconds:.1f} s)"


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
        estimator: Of the gradient, where steps were stochastic: one of `objectives.ESTIMATORS`.
        batch_size: Rows of the data plate in each step; all when None.
        history: What is told of each epoch, columns of equal length; empty where there were none.
        refined: Whether it is of the numbers of each row alone, which an encoder had given before.
        ladder: What ``guide="auto"`` tried, in order; empty where the guide was named.
        correction: What was done to the fitted guide afterwards, in words; empty where nothing was.
        note: Why steps were not captured, where they should have been; empty otherwise.
        fingerprint: What the model computed when it was fitted (see `fingerprint.of`); None where
            there is no density of it.
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
    ladder: tuple[Rung, ...] = ()
    correction: str = ""
    fingerprint: Mapping[str, Any] | None = None

    def attrs(self, status: Status) -> dict[str, str | int | float]:
        """What an exported file says of it.

        Args:
            status: Its own, with what else was given up.
        """
        facts = {"ladder": " -> ".join(map(str, self.ladder))} if self.ladder else {}
        if status.notes:
            facts["notes"] = "\n".join(status.notes)
        if self.correction:
            facts["correction"] = self.correction
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
        } | facts


def ladder_frame(rungs: Sequence[Rung]) -> pd.DataFrame:
    """What was tried as a table; see `Posterior.ladder`."""
    import pandas as pd

    columns = ["guide", "elbo", "khat", "verdict", "seconds", "chosen", "ended"]
    rows = [[getattr(rung, column) for column in columns] for rung in rungs]
    frame = pd.DataFrame(rows, columns=columns).astype({"elbo": float, "khat": float})
    frame.insert(0, "rung", range(1, len(rungs) + 1))
    return frame

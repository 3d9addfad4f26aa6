"""What an amortized guide loses, datum by datum (Cremer, Li & Duvenaud 2018).

The best member of the family for a datum falls short of its log evidence by the approximation gap; the
encoder, which has one answer for all data, falls short of that member by the amortization gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.psis import psis_rows
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.objectives import Elbo
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.diagnostics.pointwise import (
    PerDatum,
    frame_of,
    globals_words,
    mean_and_se,
    seen_per_datum,
)
from pyro_vi_kit.posterior.refinement import TOLERANCE, refine

if TYPE_CHECKING:
    import pandas as pd

_NAMES = (
    "elbo",
    "elbo_refined",
    "log_evidence",
    "log_evidence_se",
    "amortization",
    "amortization_se",
    "approximation",
    "approximation_se",
)


def gaps(
    approximation: GuideApproximation,
    coords: Mapping[str, Sequence[object]],
    *,
    plate: str | None,
    draws: int,
    seed: int,
    steps: int | None,
    tol: float = TOLERANCE,
    progress: bool | None = False,
) -> pd.DataFrame:
    """Amortization and approximation gap of each datum; see `Posterior.amortization_gap`."""
    before = seen_per_datum(approximation.guide, approximation.params, plate)
    if before.guide.table(before.block) is not None:
        raise OptionError(
            f"each row of plate {before.plate.name!r} has numbers of its own already, so that there is "
            "no amortization gap: ask the amortized posterior for it, or see posterior.per_datum()"
        )
    held = GuideApproximation(approximation.name, before.guide, approximation.params)
    refined, record = refine(held, Elbo(1), steps=steps, tol=tol, seed=seed, progress=progress)
    after = seen_per_datum(refined.guide, refined.params, plate)
    columns = _compared(before, after, draws, seed_of(seed, "comparison"))
    frame = frame_of(columns, before.plate, coords)
    means = {name: float(columns[name].mean()) for name in ("amortization", "approximation")}
    errors = {
        f"{name}_se": float(np.sqrt((columns[f"{name}_se"] ** 2).sum()) / len(frame))
        for name in means
    }
    frame.attrs |= {"plate": before.plate.name, "draws": draws, **means, **errors}
    frame.attrs["globals"] = globals_words(before.guide)
    frame.attrs["refinement"] = record.status.advice
    frame.attrs["summary"] = (
        f"{len(frame):,} rows: amortization gap {means['amortization']:.4f} nats a datum (s.e. "
        f"{errors['amortization_se']:.2g}), approximation gap {means['approximation']:.4f} (s.e. "
        f"{errors['approximation_se']:.2g})"
    )
    return frame


def _compared(before: PerDatum, after: PerDatum, draws: int, seed: int) -> dict[str, np.ndarray]:
    """The columns, `[N]` each; both guides are seen on common noise."""
    parts = []
    pairs = zip(before.weights(draws, seed), after.weights(draws, seed), strict=True)
    for (_, own), (_, refined) in pairs:
        smoothed = psis_rows(refined)
        evidence, evidence_se = smoothed.log_mean_weight, smoothed.log_mean_weight_se
        gap, gap_se = mean_and_se(refined - own)
        elbo, _ = mean_and_se(refined)
        # Delta method: the log mean weight moves with w / mean(w), the mean log weight with log w.
        moved = np.exp(refined - evidence) - refined
        parts.append(
            (
                mean_and_se(own)[0],
                elbo,
                evidence,
                evidence_se,
                gap,
                gap_se,
                evidence - elbo,
                mean_and_se(moved)[1],
            )
        )
    columns = map(np.concatenate, zip(*parts, strict=True))
    return dict(zip(_NAMES, columns, strict=True))

"""From an encoder's answer for each row to numbers of the row's own, and what the encoder loses.

The encoder says where each row starts, and stochastic steps go on from there with its numbers alone:
semi-amortized inference (Kim, Wiseman, Miller, Sontag & Rush 2018; Marino, Yue & Mandt 2018). Whatever
rows share is held: the globals' distribution, a flow's layers, and the model's learned parameters.

The best member of the family for a datum falls short of its log evidence by the approximation gap; the
encoder, which has one answer for all data, falls short of that member by the amortization gap (Cremer,
Li & Duvenaud 2018).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ModelError, OptionError, first_line
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.psis import psis_rows
from pyro_vi_kit.core.runtime import RandomStream, seed_of
from pyro_vi_kit.guides import Guide, tabulated
from pyro_vi_kit.guides.local.heads import Head
from pyro_vi_kit.guides.local.local import LocalFamily, Table
from pyro_vi_kit.model.groups import width_of
from pyro_vi_kit.model.log_density import Plate
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable
from pyro_vi_kit.objectives import Elbo, Objective
from pyro_vi_kit.objectives.estimators import chosen as chosen_estimator
from pyro_vi_kit.optimize.engines import Batches, BatchSource, CapturedEngine
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic import stochastic
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.diagnostics.pointwise import (
    PerDatum,
    frame_of,
    globals_words,
    mean_and_se,
    seen_per_datum,
)
from pyro_vi_kit.posterior.record import Record

if TYPE_CHECKING:
    import pandas as pd

# Nats a datum.
TOLERANCE = 1e-3
_PARTICLES = 8
# Numbers of the model in one step; of more rows than that a step sees some.
_NUMBERS = 2_000_000
_RATE = 0.02
_WINDOW = 100
# Of each row, to see how wide it is.
_DRAWS = 16
_SEED = 40_312
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


def refine(
    approximation: GuideApproximation,
    objective: Objective,
    *,
    steps: int | None = None,
    tol: float = TOLERANCE,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = False,
) -> tuple[GuideApproximation, Record]:
    """Train numbers of each row, from what the encoders say of it; see `Posterior.refine`.

    Of the ELBO the particles are chosen here.

    Returns:
        The guide with tables in the place of its encoders, and how they were trained.

    Raises:
        OptionError: If the guide has no local block.
        ModelError: If `batch_size` is given and the model cannot be subsampled.
    """
    started = time.monotonic()
    if objective.is_elbo:
        objective = Elbo(_PARTICLES)
    elif not objective.multi_sample:
        objective = dataclasses.replace(objective, particles=_PARTICLES)  # type: ignore[type-var]
    guide = _trainee(approximation)
    sizes, given_up = _sizes(guide, objective.particles, batch_size)
    estimator = chosen_estimator(guide, objective)
    engine = CapturedEngine(
        guide,
        objective,
        seed=seed_of(seed, "refinement"),
        batches=Batches(sizes, device=guide.density.device) if sizes else None,
        estimator=estimator,
    )
    schedule = _schedule(guide, engine.batches, steps, tol)
    with Progress(f"{guide.name} (rows)", schedule.max_steps, progress) as shown:
        outcome, bound = stochastic.fit(engine, schedule, budget=Budget(), progress=shown)
    refined = GuideApproximation(approximation.name, guide, approximation.params)
    return refined, Record(
        objective=objective,
        method=outcome.method,
        engine=engine.name,
        note=engine.note if engine.name == "eager" else "",
        status=_about_rows(outcome.status).noting(given_up),
        losses=np.asarray(outcome.losses),
        evaluations=outcome.evaluations,
        seconds=time.monotonic() - started,
        seed=seed,
        bound=None if objective.is_elbo else engine.reported(bound),
        skipped=outcome.skipped,
        estimator=estimator,
        batch_size={plate.name: size for plate, size in sizes.items()} or None,
        refined=True,
    )


def _trainee(approximation: GuideApproximation) -> Guide:
    """A copy of the guide in which nothing can be trained but the numbers of each row."""
    guide = approximation.guide
    if all(block.plate is None for block in guide.blocks):
        raise OptionError(
            f"guide {guide.name!r} has no distribution for each datum that could be refined: fit with "
            "guide='amortized'"
        )
    made = tabulated(guide.moved_to(guide.density.holding(approximation.params)))
    made.requires_grad_(False)
    for block in made.blocks:
        family = made.families[block.name]
        if isinstance(family, LocalFamily) and family.table is not None:
            _measure(family.head, family.table)
            family.table.rows.requires_grad_()
    return made


@torch.no_grad()
def _measure(head: Head, table: Table) -> None:
    """Measure the numbers of a table in sds of its rows, so that a step means the same everywhere."""
    with RandomStream(_SEED):
        sd, mean = torch.std_mean(head(table.rows).sample((_DRAWS,)), 0)
    unit = sd.median(0).values
    unit = torch.where((unit > 0) & unit.isfinite(), unit, head.unit)
    table.rows.copy_(head.reframe(table.rows, mean.mean(0), unit))


def _sizes(guide: Guide, particles: int, batch_size: int | None) -> tuple[dict[Plate, int], str]:
    """Rows of a step by plate, none where it sees all; and why it has to, where they are many."""
    plates = [block.plate for block in guide.blocks if block.plate is not None]
    share = _NUMBERS / max(width_of(guide.density) * particles, 1)
    if batch_size is None and share >= 1.0:
        return {}, ""
    sizes = {p: min(p.size, batch_size or max(1, int(share * p.size))) for p in plates}
    try:
        require_subsamplable(guide.density, sizes)
    except ModelError as error:
        if batch_size is not None:
            raise
        return {}, f"Each step sees all rows, since some cannot be had alone: {first_line(error)}"
    return sizes, ""


def _schedule(
    guide: Guide, batches: BatchSource | None, steps: int | None, tol: float
) -> stochastic.Schedule:
    epoch = 1 if batches is None else batches.epoch
    rows = sum(block.plate.size for block in guide.blocks if block.plate is not None)
    return stochastic.Schedule(
        rate=_RATE,
        window=epoch * -(-_WINDOW // epoch),
        patience=2,
        max_steps=steps or stochastic.MAX_STEPS,
        replicates=64 if batches is None else 16,
        tolerance=tol * rows,
        tight=not guide.point,
    )


def _about_rows(status: Status) -> Status:
    """The same status; what goes on with a refinement is another one."""
    advice = status.advice.replace("go on with resume=", "refine() the result once more")
    return dataclasses.replace(status, advice=advice)


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

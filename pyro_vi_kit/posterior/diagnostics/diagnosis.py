"""From a trained guide to its verdict, and to one for each number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.psis import Psis
from pyro_vi_kit.core.stopping import model_errors
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.dependence import centred_sites
from pyro_vi_kit.posterior.approximation import (
    Approximation,
    GuideApproximation,
    TraceApproximation,
)
from pyro_vi_kit.posterior.diagnostics import pointwise
from pyro_vi_kit.posterior.diagnostics.chains import Chains, run_chains
from pyro_vi_kit.posterior.diagnostics.findings import Findings, needs_chains
from pyro_vi_kit.posterior.diagnostics.shifts import (
    Columns,
    Shifts,
    by_weights,
    flattened,
    scale_of,
    smoothed_khats,
)
from pyro_vi_kit.posterior.diagnostics.verdict import (
    LEVELS,
    Verdict,
    judge,
    judge_rows,
)
from pyro_vi_kit.posterior.diagnostics.wording import Cure
from pyro_vi_kit.posterior.evaluation import Evaluation
from pyro_vi_kit.posterior.labels import labels_of

if TYPE_CHECKING:
    import pandas as pd

# Rows whose own weights a table of diagnoses waits for, and draws of each.
_ROWS, _ROW_DRAWS = 2000, 1000
# Hardly any scale is as small, and it is a reason only where a fit is not good.
_NOTHING = 1e-10
_SEED = 75_025


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What is known about a fit, and what follows.

    Attributes:
        verdict: Whether to believe it.
        found: What is known.
        levels: ``good``, ``resample`` or ``reject`` for each number, `[n]`.
        flat: Draws of q of each, `[S, n]`.
        columns: What each number was judged by: the probabilities of its states, where it is discrete.
    """

    verdict: Verdict
    found: Findings
    levels: np.ndarray
    flat: np.ndarray
    columns: Columns
    labels: Sequence[str]

    def table(self, approximation: Approximation) -> pd.DataFrame:
        """One row per number; see `Posterior.diagnose`."""
        from pyro_vi_kit.posterior.summary import VerdictFrame

        found = self.found
        moves = found.moves if found.moves is not None else found.weights
        moves = Shifts(*(part[self.columns.worst(moves.worst())] for part in moves))
        sites = np.array(found.sites)[self.columns.worst(np.zeros(len(found.sites)))]
        khats, rows = smoothed_khats(self.flat, found.smoothed), _row_khats(approximation)
        for name, known in rows.items():
            mine = sites == name
            if mine.sum() % len(known) == 0:
                khats[mine] = np.repeat(known, mine.sum() // len(known))
        frame = VerdictFrame(
            {
                "khat": khats,
                "mean_shift": moves.mean,
                "mean_shift_se": moves.mean_se,
                "sd_shift": np.expm1(moves.sd),
                "sd_shift_se": moves.sd_se * np.exp(moves.sd),
                "verdict": self.levels,
            },
            index=list(self.labels),
        )
        frame.attrs["verdict"] = str(self.verdict)
        frame.attrs["khat"] = (
            "of the importance weights of each datum"
            if rows and set(rows) == set(found.sites)
            else "heuristic: of the importance weights, averaged over draws near in that number"
        )
        frame.attrs["shifts"] = _source(found)
        return frame


@model_errors
def diagnose(
    approximation: Approximation,
    density: Density | None,
    evaluation: Evaluation,
    named: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]],
    status: Status,
    names: tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[Any]]],
) -> Diagnosis | None:
    """Judge a fit by all that can be known about it; None for a point estimate.

    Args:
        approximation: The trained guide.
        density: Its model's, where there is one.
        evaluation: Weighted draws of it.
        named: Brings values into each site's own shape.
        status: How the fit ended.
        names: Dims of each site, and coordinates of dims, for the labels.

    Raises:
        ModelError: If the model raises.
    """
    smoothed = evaluation.smoothed
    if smoothed is None:
        return None
    labels, _ = labels_of(evaluation.values, *names)
    found, flat, columns = _findings_of(approximation, density, evaluation, smoothed, named, names)
    verdict, levels = judge(found, status, approximation.name)
    if verdict.level != "good" and density is not None:
        verdict, levels = judge(found, status, approximation.name, _cures(density))
    if verdict.level == "reject":
        # Weights of many rows are uneven jointly, even where those of each row are not.
        by_rows = _by_rows(approximation, evaluation, status)
        if by_rows is not None:
            levels = np.array([by_rows.sites[name] for name in found.sites], dtype=object)
            verdict = by_rows
    severity = np.array([LEVELS.index(level) for level in levels])
    return Diagnosis(verdict, found, levels[columns.worst(severity)], flat, columns, labels)


def _findings_of(
    approximation: Approximation,
    density: Density | None,
    evaluation: Evaluation,
    smoothed: Psis,
    named: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]],
    names: tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[Any]]],
) -> tuple[Findings, np.ndarray, Columns]:
    """What is known of each column, draws of the numbers `[S, n]`, and how these are columns."""
    values = evaluation.values
    overflowing = tuple(n for n, draws in values.items() if not np.isfinite(draws).all())
    labels, sites = labels_of(values, *names)
    flat = flattened(values)
    flat = np.where(np.isfinite(flat), flat, 0.0)
    columns = Columns(flat, _discrete(flat, sites, values, approximation))
    judged, indicator = columns(flat), columns.indicator
    names_of = [sites[i] for i in columns.number]
    own = _drawn_by_guide(approximation, evaluation.values)
    found = Findings(
        labels=columns.labels(labels),
        sites=names_of,
        smoothed=smoothed,
        gap=evaluation.gap,
        weights=by_weights(judged, smoothed, indicator),
        overflowing=overflowing,
        unbounded=tuple(_unbounded(values, density)),
        outside=evaluation.outside,
        khats=lambda: smoothed_khats(flat, smoothed)[columns.number],
        given=indicator & np.array([name not in own for name in names_of], dtype=bool),
        units=np.where(indicator, scale_of(judged, indicator)[1], np.nan),
    )
    asked = not overflowing and needs_chains(smoothed, evaluation.gap)
    if asked and isinstance(approximation, GuideApproximation):

        def numbers(z: Mapping[str, Tensor]) -> np.ndarray:
            return columns(flattened(named(approximation.constrained(z, _SEED))))

        found = _with_chains(found, run_chains(approximation, judged, numbers, indicator=indicator))
        if found.contradicted[found.measured].any():
            again = run_chains(approximation, judged, numbers, weighted=True, indicator=indicator)
            found = _with_chains(found, again, restarted=True)
    return found, flat, columns


def _discrete(
    flat: np.ndarray,
    sites: Sequence[str],
    values: Mapping[str, np.ndarray],
    approximation: Approximation,
) -> np.ndarray:
    """Which numbers are discrete, `[n]`: by their site, or because they are whole ones that differ."""
    density = approximation.density
    known = {name for name, draws in values.items() if draws.dtype.kind in "biu"}
    if density is not None:
        known |= {site.name for site in density.discrete}
    whole = (flat == np.rint(flat)).all(0)
    # A zero of a triangular matrix is a constant, and one that rounds.
    return whole & ((flat.min(0) < flat.max(0)) | np.array([name in known for name in sites]))


def _drawn_by_guide(
    approximation: Approximation, values: Mapping[str, np.ndarray]
) -> frozenset[str]:
    """Sites that q has a distribution for; the others are drawn given these, or computed."""
    density = approximation.density
    if density is None:
        return frozenset(values)
    summed = not isinstance(approximation, TraceApproximation)
    kinds = ("latent",) if summed else ("latent", "discrete")
    return frozenset(site.name for site in density.structure.of_kind(*kinds)) | frozenset(
        site.name for site in density.latents
    )


def _unbounded(values: Mapping[str, np.ndarray], density: Density | None) -> Iterator[str]:
    """Why the density may have no bound: data of no spread, and draws that run to 0."""
    floor = "give the scale a floor, as in 0.01 + s"
    for site in () if density is None else density.constant:
        yield f"the data at site {site!r} are one number again and again: {floor} if one is learned"
    for site, draws in values.items():
        middle = np.median(np.abs(draws), axis=0) if draws.dtype.kind == "f" else np.zeros(0)
        if ((middle > 0) & (middle < _NOTHING)).any():
            yield f"draws of site {site!r} run to 0, as where data are met exactly: {floor}"


def _with_chains(found: Findings, chains: Chains | str, *, restarted: bool = False) -> Findings:
    if isinstance(chains, str):
        line = f"From resampled draws: {chains}" if restarted else chains
        return replace(found, given_up=(*found.given_up, line))
    return replace(
        found,
        chains=chains.shifts,
        memory=chains.memory,
        stuck=chains.stuck,
        restarted=restarted,
    )


def _cures(density: Density) -> list[Cure]:
    """Sites whose prior depends on other latents, first those that do by their scale."""
    if density.streamed is not None:
        return []
    # What `obs_mask` fills in is data, and no effect that could be written another way.
    filled = {f"{name}_unobserved" for name in density.structure.sites}
    centred = [site for site in centred_sites(density) if site.site not in filled]
    scaled = [Cure(site.site, site.scale, "scale") for site in centred if site.scale]
    moved = [Cure(s.site, s.location, "location") for s in centred if not s.scale]
    return scaled + moved


def _by_rows(
    approximation: Approximation, evaluation: Evaluation, status: Status
) -> Verdict | None:
    """Whether to believe it row by row; None where rows have something in common."""
    if not isinstance(approximation, GuideApproximation):
        return None
    guide, params = approximation.guide, approximation.params
    if any(block.plate is None for block in guide.blocks):
        return None
    try:
        found = pointwise.sample_of_rows(guide, params)
    except OptionError:
        return None
    rows = sum(block.plate.size for block in guide.blocks if block.plate is not None)
    latents = guide.density.dim / rows
    return judge_rows(found, rows, latents, evaluation.values, status, approximation.name)


def _row_khats(approximation: Approximation) -> dict[str, np.ndarray]:
    """k-hat of each row's own weights, `[N]`, by site of a local block with a plate of its own."""
    if not isinstance(approximation, GuideApproximation):
        return {}
    khats: dict[str, np.ndarray] = {}
    for block in approximation.guide.blocks:
        if block.plate is None or block.plate.size > _ROWS:
            continue
        # Rows of inner plates lie behind those of the data plate, which has to be the outermost dim.
        inside = [site for site in block.sites if block.axis(site) == 0]
        try:
            seen = pointwise.seen_per_datum(
                approximation.guide, approximation.params, block.plate.name
            )
        except OptionError:
            continue
        khat = pointwise.quality(seen, _ROW_DRAWS, _SEED)["khat"]
        khats |= {site.name: khat for site in inside}
    return khats


def _source(found: Findings) -> str:
    """What the shifts are by, in words."""
    if found.trusted and found.mixed:
        return "by importance weights or short Hamiltonian chains, whichever is more precise"
    if found.mixed:
        return "by short Hamiltonian chains from draws of q"
    return "by importance weights" + ("" if found.trusted else ", which are not to be trusted here")

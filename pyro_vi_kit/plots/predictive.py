"""`predictive`: the data among data sets that the fitted model makes, and their test statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.options import COUNT, checks, mapping, of_class, optional
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.plots.density import density, support
from pyro_vi_kit.plots.style import COLOURS, INK, destination, number, panels, quality, save
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.posterior.diagnostics.predictive import (
    Comparison,
    Function,
    Replicated,
    comparisons,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DATA, _MODEL = COLOURS[1], COLOURS[0]
_CURVES = 40
_BINS = 30
# A range of at most so many steps is a grid.
_GRID = 1000
_PALE = 0.45
# Bars of a rootogram, each of one count or more, at the most; the last one holds the rest.
_MOST_COUNTS = 25


@checks(
    posterior=of_class(Posterior, "pass what vi.fit or vi.load returns"),
    path=optional(a_path),
    statistics=optional(mapping),
    max_panels=COUNT,
)
def predictive(
    posterior: Posterior,
    path: str | Path | None = None,
    statistics: Mapping[str, Function] | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
    max_panels: int = 12,
    corrected: bool | None = None,
) -> Figure:
    """Draw the data over data sets that the model makes, then each statistic's value among theirs.

    Continuous data are densities over those of 40 replicated data sets. Counts are a rootogram: square
    roots of how often each count occurs, in the data and, with a 90 % interval, in the replicated ones
    (Kleiber & Zeileis 2016, https://doi.org/10.1080/00031305.2016.1173590). Classes are shares.

    Args:
        posterior: The fit.
        path: Where to save the picture, by its ending PNG or another format of matplotlib.
        statistics: As `Posterior.check_predictive` has them.
        sites: Observed sites; all when None.
        draws: Replicated data sets.
        seed: The same seed gives the same picture.
        max_panels: Where there are more, the statistics that fit worst are shown.
        corrected: As `Posterior.check_predictive` has it.

    Returns:
        The matplotlib ``Figure``.

    Raises:
        OptionError: If an option cannot be used, or there are no observed data.
        FileError: If the picture cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """
    target = destination(path)
    replicates = posterior.replicate(draws, seed, sites=sites, corrected=corrected)
    found = [c for c in comparisons(replicates, statistics) if np.isfinite(c.observed)]
    shown = replicates.sites[:max_panels]
    left = max_panels - len(shown)
    worst = sorted(range(len(found)), key=lambda i: found[i].p_value)[: max(left, 0)]
    figure, axes = panels(len(shown) + len(worst), height=1.1)
    for axis, site in zip(axes, shown, strict=False):
        _overlay(axis, site)
    for axis, i in zip(axes[len(shown) :], sorted(worst), strict=True):
        _statistic(axis, found[i], len(replicates.sites) > 1)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(_title(posterior, replicates.note), fontsize=11, color=INK)
    return save(figure, target)


def _overlay(axis: Axes, site: Replicated) -> None:
    observed = site.observed.ravel().astype(float)
    copies = site.replicated.reshape(len(site.replicated), -1).astype(float)
    if site.kind in ("binary", "category"):
        _shares(axis, observed, copies)
    elif site.kind == "count":
        _rootogram(axis, observed, copies)
    elif observed.size == 1:
        _histogram(axis, copies.ravel(), float(observed[0]))
    else:
        _densities(axis, observed, copies)
    axis.set_title(f"{site.name}: data and copies", fontsize=9, color=INK)


def _densities(axis: Axes, observed: np.ndarray, copies: np.ndarray) -> None:
    finite = [row[np.isfinite(row)] for row in copies[:_CURVES]]
    curves = [row for row in finite if row.size > 1 and np.ptp(row) > 0]
    ends = np.quantile(np.concatenate([observed, *curves]), [0.005, 0.995])
    width = max(float(np.ptp(ends)), 1e-9)
    low = min(ends[0], observed.min()) - 0.05 * width
    window = (float(low), float(max(ends[1], observed.max()) + 0.05 * width))
    every = np.concatenate([observed, *curves])
    bounds = support([every]) if np.ptp(every) > 0 else (-np.inf, np.inf)
    for row in curves:
        axis.plot(*density(row, window, bounds), color=_MODEL, lw=0.6, alpha=0.35, zorder=2)
    if np.ptp(observed) > 0:
        axis.plot(*density(observed, window, bounds), color=_DATA, lw=1.9, zorder=3)
    else:
        axis.axvline(observed[0], color=_DATA, lw=1.9, zorder=3)
    axis.set(xlim=window, yticks=[])
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", nbins=5)


def _rootogram(axis: Axes, observed: np.ndarray, copies: np.ndarray) -> None:
    low, top = _range(observed, copies)
    width = -(-(top - low + 1) // _MOST_COUNTS)
    bars = -(-(top - low + 1) // width)
    edges = low - 0.5 + width * np.arange(bars + 1)
    inside = np.append(edges[:-1], np.inf)  # the last bar holds the rest
    counted = np.array([np.histogram(row[np.isfinite(row)], inside)[0] for row in copies])
    seen = np.sqrt(np.histogram(observed, inside)[0])
    least, middle, most = np.quantile(np.sqrt(counted), [0.05, 0.5, 0.95], axis=0)
    places = (edges[1:] + edges[:-1]) / 2
    axis.bar(places, seen, width=0.85 * width, color=_DATA, alpha=_PALE, zorder=1)
    _intervals(axis, places, middle, least, most)
    axis.set_ylabel("√ number", fontsize=8, color=INK)
    axis.locator_params(axis="x", nbins=6, integer=True)


def _range(observed: np.ndarray, copies: np.ndarray) -> tuple[int, int]:
    """All data and nearly all copies, from 0 where that is near."""
    low, high = np.quantile(copies, [0.001, 0.999])
    top = max(observed.max(), min(high, 3 * observed.max() + 5))
    low = min(observed.min(), low)
    return int(0 if 2 * low < top else low), int(top)


def _shares(axis: Axes, observed: np.ndarray, copies: np.ndarray) -> None:
    classes = np.unique(observed)[:_MOST_COUNTS]
    seen = [(observed == value).mean() for value in classes]
    made = np.stack([(copies == value).mean(-1) for value in classes], -1)
    low, middle, high = np.quantile(made, [0.05, 0.5, 0.95], axis=0)
    places = np.arange(len(classes))
    axis.bar(places, seen, width=0.7, color=_DATA, alpha=_PALE, zorder=1)
    _intervals(axis, places, middle, low, high)
    axis.set_xticks(places, [f"{value:g}" for value in classes])
    axis.set_ylabel("share", fontsize=8, color=INK)


def _intervals(
    axis: Axes, places: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    axis.vlines(places, low, high, color=_MODEL, lw=1.6, zorder=3)
    axis.plot(places, middle, "o", color=_MODEL, ms=3.5, zorder=4)


def _statistic(axis: Axes, found: Comparison, several: bool) -> None:
    _histogram(axis, found.finite, found.observed)
    name = f"{found.site}: {found.statistic}" if several else found.statistic
    doubt = found.reading.split(":")[0]
    title = f"{name}: {doubt}, p = {number(found.p_value, '.2g')}"
    axis.set_title(title, fontsize=9, color=INK if doubt == "fits" else _DATA)


def _histogram(axis: Axes, values: np.ndarray, observed: float) -> None:
    """What the model makes, and what was observed."""
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) > 0:
        window = _window(values, observed)
        counts, edges = np.histogram(values, _edges(values))
        axis.stairs(counts, edges, fill=True, color=_MODEL, alpha=_PALE, zorder=1)
        axis.set_xlim(window)
    elif values.size:
        axis.axvline(values[0], color=_MODEL, alpha=_PALE, lw=6, zorder=1)
    axis.axvline(observed, color=_DATA, lw=1.9, zorder=3)
    axis.set(yticks=[])
    axis.locator_params(axis="x", nbins=4)


def _window(values: np.ndarray, observed: float) -> tuple[float, float]:
    """Nearly all of the copies' values, and the data's."""
    low, high = np.quantile(values, [0.002, 0.998])
    low, high = min(low, observed), max(high, observed)
    margin = 0.06 * max(high - low, 1e-12)
    return float(low - margin), float(high + margin)


def _edges(values: np.ndarray) -> np.ndarray:
    """Equal bins, each of as many values where these lie on a grid, as shares and counts do."""
    low, high = float(values.min()), float(values.max())
    distinct = np.unique(np.round((values - low) / (high - low), 9)) * (high - low)
    step = float(np.diff(distinct).min())
    if (high - low) / step > _GRID:
        return np.linspace(low, high, _BINS + 1)
    width = step * np.ceil((high - low) / step / _BINS)
    return low - step / 2 + width * np.arange(np.floor((high - low) / width + 1e-6) + 2)


def _legend() -> list:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=_DATA, lw=2, label="the data"),
        Line2D([], [], color=_MODEL, lw=2, label="data sets made by the model"),
    ]


def _title(posterior: Posterior, note: str) -> str:
    how = ", corrected" if "corrected" in note else ""
    fit = f"{posterior.guide}: {quality(posterior)}{how}"
    return f"Data and predictions of {posterior.model.name} ({fit})"

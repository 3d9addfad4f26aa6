"""`marginals`: the density of each parameter, fits over the reference."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import ModelError, UnknownNameError
from pyro_vi_kit.core.export import Tree
from pyro_vi_kit.core.options import COUNT, SEED, checks, integer, names, optional
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.plots.density import density, support
from pyro_vi_kit.plots.style import GREY, INK, destination, panels, quality, save, styles
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.compare import Paired, Reference, by_name, error_table, pair
from pyro_vi_kit.validation.compare.measures import varies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTILE_ERRORS = ("q05_error", "q50_error", "q95_error")
_BINS = 40
# A spike of a fit that is too narrow may be cut: the reference must stay readable under it.
_TALLEST = 3.5
_LONGEST_TAIL = 6.0  # interquartile ranges
_POINT = 1e-9


@checks(
    path=optional(a_path),
    sites=optional(names),
    max_panels=COUNT,
    draws=integer(4, 10**8),
    seed=SEED,
)
def marginals(
    reference: Tree,
    posteriors: Mapping[str, Posterior] | Posterior,
    path: str | Path | None = None,
    sites: Sequence[str] | None = None,
    max_panels: int = 12,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Figure:
    """Draw marginal densities of fits over a histogram of the reference, one panel a parameter.

    Args:
        reference: What `vi.nuts` returns, or any ArviZ object with a posterior.
        posteriors: Fits by name, or one fit.
        path: Where to save the picture, by its ending PNG or another format of matplotlib.
        sites: Sites (``theta``) or single parameters (``theta[Choate]``) to show; all by default.
        max_panels: Where there are more parameters, those are shown on which a fit's quantiles are
            farthest from the reference's.
        draws: Draws from each fit.
        seed: The same seed gives the same picture.

    Returns:
        The matplotlib ``Figure``.

    Raises:
        OptionError: If an option cannot be used.
        ModelError: If no parameter is common to reference and fits.
        FileError: If the picture cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """
    target = destination(path)
    fits, truth = by_name(posteriors), Reference(reference)
    pairs = {name: pair(truth, fit, name, draws=draws, seed=seed) for name, fit in fits.items()}
    shown, total = _chosen(pairs, sites, max_panels)
    figure, axes = panels(len(shown))
    for axis, label in zip(axes, shown, strict=True):
        _panel(axis, label, pairs)
    handles = _legend(truth, fits)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 5),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(_title(fits, truth, len(shown), total), fontsize=11, color=INK)
    figure.supylabel("density", fontsize=9, color=INK)
    return save(figure, target)


def _chosen(
    pairs: Mapping[str, Paired], sites: Sequence[str] | None, most: int
) -> tuple[list[str], int]:
    """Labels to show in the model's order, and how many there were to choose from."""
    known = {site for paired in pairs.values() for site in paired.sites}
    labels = {label for paired in pairs.values() for label in paired.labels}
    for name in sites or ():
        if name not in known | labels:
            raise UnknownNameError("site", name, known)
    errors = _quantile_errors(pairs, known | labels if sites is None else sites)
    if not errors:
        raise ModelError("nothing to plot: every parameter is a constant in the reference")
    kept = set(sorted(errors, key=lambda label: -errors[label])[:most])
    return [label for label in errors if label in kept], len(errors)


def _quantile_errors(pairs: Mapping[str, Paired], wanted: Container[str]) -> dict[str, float]:
    """The largest error of any fit in a quantile of each number that varies, by label."""
    worst: dict[str, float] = {}
    for paired in pairs.values():
        errors = error_table(paired)
        sizes = np.max([np.abs(errors[name]) for name in _QUANTILE_ERRORS], 0)
        for i in np.flatnonzero(varies(paired.truth.reshape(-1, len(paired.labels)))):
            label = paired.labels[i]
            if paired.sites[i] in wanted or label in wanted:
                worst[label] = max(worst.get(label, 0.0), float(sizes[i]))
    return worst


def _panel(axis: Axes, label: str, pairs: Mapping[str, Paired]) -> None:
    truth, columns = _columns(label, pairs)
    window = _window(truth, list(columns.values()))
    bounds = support([truth, *(v for v in columns.values() if _spreads(v, window))])
    height = tallest = _histogram(axis, truth, window)
    outside = 0
    for name, colour, dashes in styles(pairs):
        if name not in columns:
            continue
        values = columns[name]
        if _spreads(values, window):
            curve = density(values, window, bounds)
            axis.plot(*curve, color=colour, ls=dashes, lw=1.6, zorder=3)
            seen = (curve.x >= window[0]) & (curve.x <= window[1])
            tallest = max(tallest, curve.y[seen].max(initial=0.0))
        else:
            axis.axvline(values[0], color=colour, ls=dashes, lw=1.6, zorder=3)
        if not window[0] <= np.median(values) <= window[1]:
            _point_outside(axis, name, colour, left=values[0] < window[0], row=outside)
            outside += 1
    axis.set(xlim=window, ylim=(0, 1.08 * min(tallest, _TALLEST * height)), yticks=[])
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(_shortened(label), fontsize=9, color=INK)


def _columns(label: str, pairs: Mapping[str, Paired]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draws of a parameter: the reference's, and the finite ones of each fit that has it."""
    holders = {name: paired for name, paired in pairs.items() if label in paired.labels}
    paired = next(iter(holders.values()))
    truth = paired.truth[..., paired.labels.index(label)].ravel()
    columns = {}
    for name, paired in holders.items():
        values = paired.draws[:, paired.labels.index(label)]
        if np.isfinite(values).any():
            columns[name] = values[np.isfinite(values)]
    return truth, columns


def _histogram(axis: Axes, truth: np.ndarray, window: tuple[float, float]) -> float:
    """Draw the reference; returns its height."""
    inside = truth[(truth >= window[0]) & (truth <= window[1])]
    counts, edges = np.histogram(inside, _BINS)
    heights = counts / (len(truth) * (edges[1] - edges[0]))
    axis.stairs(heights, edges, fill=True, color=GREY, zorder=1)
    return float(heights.max())


def _spreads(values: np.ndarray, window: tuple[float, float]) -> bool:
    """Whether draws are more than one point."""
    return values.size > 1 and bool(np.ptp(values) > _POINT * (window[1] - window[0]))


def _point_outside(axis: Axes, name: str, colour: str, *, left: bool, row: int) -> None:
    """Say on which side of the panel a fit is."""
    axis.text(
        0.02 if left else 0.98,
        0.95 - 0.11 * row,
        f"← {name}" if left else f"{name} →",
        transform=axis.transAxes,
        ha="left" if left else "right",
        va="top",
        fontsize=7,
        color=colour,
    )


def _window(truth: np.ndarray, fits: Sequence[np.ndarray]) -> tuple[float, float]:
    """What to show: nearly all of the reference, and of the fits up to once its width beyond it."""
    quartiles = np.quantile(truth, [0.25, 0.75])
    tail = _LONGEST_TAIL * np.ptp(quartiles)
    low, high = np.quantile(truth, [0.003, 0.997])
    # Of heavy tails only a part, or there is nothing else to see.
    low, high = max(low, quartiles[0] - tail), min(high, quartiles[1] + tail)
    width = high - low
    # A bound of the support is within reach of the data's end, and shown with it.
    ends = [max(truth.min(), low - 0.05 * width), min(truth.max(), high + 0.05 * width)]
    for values in fits:
        ends += list(np.quantile(values, [0.01, 0.99]))
    left, right = max(min(ends), low - width), min(max(ends), high + width)
    margin = 0.03 * (right - left)
    return float(left - margin), float(right + margin)


def _legend(truth: Reference, fits: Mapping[str, Posterior]) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    doubt = "" if truth.report.converged else " (not converged)"
    handles: list = [Patch(color=GREY, label=truth.name.removeprefix("the ") + doubt)]
    for name, colour, line in styles(fits):
        label = f"{name}: {quality(fits[name])}"
        handles.append(Line2D([], [], color=colour, ls=line, lw=2, label=label))
    return handles


def _title(fits: Mapping[str, Posterior], truth: Reference, shown: int, total: int) -> str:
    models = {fit.model.name for fit in fits.values()}
    title = f"Marginal posteriors of {', '.join(sorted(models))}"
    if shown < total:
        title += f": the {shown} of {total} parameters where a fit is farthest from {truth.name}"
    return title


def _shortened(label: str, most: int = 34) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"

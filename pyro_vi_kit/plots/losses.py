"""`losses`: how the bound went, a panel for each fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.options import checks, optional
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.plots.style import INK, destination, number, panels, save, styles
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.compare import by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below this many steps each one is a point, and there is nothing to smooth.
_FEW = 200
_WINDOWS = 50
# Of the steps, in order of the bound, the part that may fall below the panel.
_CUT = 0.15
_LEAST_HEIGHT = 0.1  # nats


@checks(path=optional(a_path))
def losses(
    posteriors: Mapping[str, Posterior] | Posterior, path: str | Path | None = None
) -> Figure:
    """Draw the bound against the step, a panel for each fit with axes of its own.

    The panel's y-axis starts where most steps are, so that the first ones do not flatten the rest;
    where that cuts some off, the panel says how low the first one was.

    Args:
        posteriors: Fits by name, or one fit.
        path: Where to save the picture, by its ending PNG or another format of matplotlib.

    Returns:
        The matplotlib ``Figure``.

    Raises:
        OptionError: If ``posteriors`` holds no fits.
        FileError: If the picture cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """
    target = destination(path)
    fits = by_name(posteriors)
    figure, axes = panels(len(fits), height=1.15)
    for axis, (name, colour, _) in zip(axes, styles(fits), strict=True):
        _panel(axis, name, fits[name], colour)
    models = sorted({fit.model.name for fit in fits.values()})
    figure.suptitle(f"Training bound of {', '.join(models)}", fontsize=11, color=INK)
    return save(figure, target)


def smoothed(bound: np.ndarray) -> np.ndarray:
    """Running mean of `[steps]` over a fiftieth of the steps; NaN only where all of them are."""
    window = np.ones(max(1, len(bound) // _WINDOWS))
    known = np.isfinite(bound)
    count = np.convolve(known, window, mode="same")
    total = np.convolve(np.where(known, bound, 0.0), window, mode="same")
    return np.divide(total, count, out=np.full(len(bound), np.nan), where=count > 0.5)


def _panel(axis: Axes, name: str, posterior: Posterior, colour: str) -> None:
    bound = -np.asarray(posterior.losses, dtype=float)
    bound[~np.isfinite(bound)] = np.nan
    steps = np.arange(1, len(bound) + 1)
    if len(bound) < _FEW:
        axis.plot(steps, bound, color=colour, lw=1.4, marker="o", ms=3)
        line = bound
    else:
        line = smoothed(bound)
        axis.plot(steps, bound, color=colour, lw=0.5, alpha=0.3)
        axis.plot(steps, line, color=colour, lw=1.8)
    _cut(axis, bound, line, posterior.elbo)
    _explain(axis, bound, posterior)
    axis.set_title(f"{name}\n{_outcome(posterior)}", fontsize=9, color=INK)
    axis.set_xlabel("L-BFGS step" if posterior.method == "lbfgs" else "step", fontsize=8)
    axis.set_ylabel(_bound_name(posterior), fontsize=8, color=INK)
    axis.locator_params(axis="x", nbins=5, integer=True)
    axis.locator_params(axis="y", nbins=6)
    axis.ticklabel_format(axis="y", useOffset=False)
    if len(bound) <= 1:
        axis.set_xlim(0, 2)
        axis.set_xticks([1])


def _explain(axis: Axes, bound: np.ndarray, posterior: Posterior) -> None:
    """The ELBO of the finished fit on fresh draws, as a line, and where the bound started."""
    finite = bound[np.isfinite(bound)]
    if finite.size and finite[0] < axis.get_ylim()[0]:
        axis.plot([], [], " ", label=f"starts at {number(finite[0], ',.4g')}, below")
    if posterior.elbo is not None and np.isfinite(posterior.elbo):
        label = f"ELBO of the fit {number(posterior.elbo, ',.2f')}"
        axis.axhline(posterior.elbo, color=INK, lw=1.0, ls=(0, (4, 2)), zorder=3, label=label)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", fontsize=8, frameon=False)


def _cut(axis: Axes, bound: np.ndarray, line: np.ndarray, final: float | None) -> None:
    """Set the y-axis to where most steps are."""
    finite, trend = bound[np.isfinite(bound)], line[np.isfinite(line)]
    if not finite.size:
        axis.text(0.5, 0.5, "never finite", transform=axis.transAxes, ha="center", color=INK)
        return
    late = bound[len(bound) // 2 :]
    noise = np.nanquantile(late, [0.02, 0.98]) if np.isfinite(late).any() else finite[-1:]
    bottom = min(np.quantile(trend, _CUT), noise[0])
    top = max(trend.max(), noise[-1])
    height = max(top - bottom, _LEAST_HEIGHT, 1e-6 * abs(top))
    # A bound other than the ELBO lies above it; not so far that this should set the scale.
    if final is not None and abs(final - bottom) < 3 * height:
        bottom, top = min(bottom, final), max(top, final)
    # Room for the legend below the curve.
    axis.set_ylim(bottom - 0.35 * height, top + 0.08 * height)


def _outcome(posterior: Posterior) -> str:
    steps, skipped = len(posterior.losses), posterior.record.skipped
    plural = "" if steps == 1 else "s"
    words = [posterior.status.reason, f"{posterior.seconds:.3g} s", f"{steps:,} step{plural}"]
    return ", ".join([*words, f"{skipped:,} skipped"] if skipped else words)


def _bound_name(posterior: Posterior) -> str:
    name = "log density" if posterior.elbo is None else posterior.record.objective.name
    pretty = {"elbo": "ELBO", "iwae": "IWAE bound", "renyi": "Rényi bound"}
    return f"{pretty.get(name, name)} (nats)"

"""Pictures of a calibration: ECDFs of the truth's probabilities, and coverage, with bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import checks, names, of_class, optional
from pyro_vi_kit.core.options import path as a_path
from pyro_vi_kit.plots.style import COLOURS, GREY, INK, destination, panels, save
from pyro_vi_kit.validation.calibrate import Calibration
from pyro_vi_kit.validation.calibrate.calibration_tests import Band, band, ecdf
from pyro_vi_kit.validation.calibrate.simulation import TARP
from pyro_vi_kit.validation.calibrate.verdict import CALIBRATED, JOINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 12
# Of more curves in a panel each is thin.
_FEW = 3
_FINE, _WRONG = COLOURS[0], COLOURS[1]
_CALIBRATION = of_class(Calibration, "pass what vi.calibrate returns")
_OF_SITES = checks(calibration=_CALIBRATION, sites=optional(names), path=optional(a_path))


@_OF_SITES
def rank_ecdf(
    calibration: Calibration,
    sites: Sequence[str] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """The ECDF of each truth's probability under the guide, less that of uniform numbers.

    A curve that leaves the grey band is that of a number on which the guide is not calibrated: an arch
    above zero says that the guide is too high, one below that it is too low; up on the left and down on
    the right that it is too narrow, the reverse that it is too wide (Säilynoja et al. 2022).

    Args:
        calibration: What `vi.calibrate` returned.
        sites: Which, a panel each; by default the twelve with the smallest p-values at the most, in the
            model's order.
        path: Where to write the picture.

    Raises:
        OptionError: If a site is not there, or the path's ending is no kind of picture.
        FileError: If the path cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """

    def curve(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        return ecdf(values, points) - points

    words = ("share of draws below the truth", "ECDF less uniform")
    return _by_site(calibration, sites, path, curve, words, level=True)


@_OF_SITES
def coverage(
    calibration: Calibration,
    sites: Sequence[str] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """How often central intervals hold the truth, against the mass that the guide gives them.

    Below the grey band intervals are too narrow, above it too wide.

    Args:
        calibration: What `vi.calibrate` returned.
        sites: As for `rank_ecdf`.
        path: Where to write the picture.

    Raises:
        OptionError: If a site is not there, or the path's ending is no kind of picture.
        FileError: If the path cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """

    def curve(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        return ecdf(np.abs(2.0 * values - 1.0), points)

    chosen = sites if sites is not None else [s for s in _worst(calibration) if s not in JOINT]
    words = ("mass of the interval", "holds the truth")
    return _by_site(calibration, chosen, path, curve, words, level=False)


@checks(calibration=_CALIBRATION, path=optional(a_path))
def expected_coverage(calibration: Calibration, path: str | Path | None = None) -> Figure:
    """How often regions about random points hold the truth, all latents jointly (TARP).

    Args:
        calibration: What `vi.calibrate` returned.
        path: Where to write the picture.

    Raises:
        OptionError: If a fitter did not give all latents, or the path's ending is no kind of picture.
        FileError: If the path cannot be written.
        MissingDependencyError: If matplotlib is not installed.
    """
    target = destination(path)
    frame = calibration.expected_coverage()
    figure, (axis,) = panels(1, height=1.7)
    limits = Band(*(frame[name].to_numpy() for name in ("credibility", "low", "high")))
    _band(axis, limits, level=False)
    wrong = calibration.verdict.sites[TARP] != CALIBRATED
    x, y = _ends(frame["coverage"].to_numpy(), limits, level=False)
    axis.plot(x, y, color=_WRONG if wrong else _FINE, lw=1.5, label=calibration.guide)
    axis.set_xlabel("mass of the region under the guide", fontsize=9, color=INK)
    axis.set_ylabel("holds the truth", fontsize=9, color=INK)
    axis.set_title("All latents jointly (TARP)", fontsize=10, color=INK, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    _headline(figure, calibration)
    return save(figure, target)


def _by_site(
    calibration: Calibration,
    sites: Sequence[str] | None,
    path: str | Path | None,
    curve: Callable[[np.ndarray, np.ndarray], np.ndarray],
    words: tuple[str, str],
    *,
    level: bool,
) -> Figure:
    """A panel for each site, a curve in it for each of its numbers.

    Args:
        calibration: What is shown.
        sites: Which.
        path: Where to write the picture.
        curve: From probabilities of the truths and points to what is drawn at these points.
        words: Of the x-axis and the y-axis.
        level: Whether uniform numbers give a level line, the diagonal being subtracted.
    """
    target = destination(path)
    known = calibration.by_site
    chosen = _worst(calibration) if sites is None else list(sites)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        what = f"site {unknown[0]!r}" if unknown else "no site"
        raise OptionError(f"sites= names {what}; there are: {', '.join(known)}")
    verdicts = calibration.summary()["verdict"].to_dict()
    limits = band(len(calibration.numbers))
    figure, axes = panels(len(chosen), height=1.1)
    for axis, name in zip(axes, chosen, strict=True):
        _band(axis, limits, level=level)
        wrong = [label for label in known[name] if verdicts[label] != CALIBRATED]
        width = 1.2 if len(known[name]) <= _FEW else 0.7
        # What is wrong lies above what is not.
        for label in sorted(known[name], key=wrong.__contains__):
            x, y = _ends(curve(known[name][label], limits.points), limits, level=level)
            axis.plot(x, y, color=_WRONG if label in wrong else _FINE, lw=width)
        _title(axis, name, calibration.verdict.sites[name], len(wrong), len(known[name]))
    figure.supxlabel(words[0], fontsize=9, color=INK)
    figure.supylabel(words[1], fontsize=9, color=INK)
    _headline(figure, calibration)
    return save(figure, target)


def _worst(calibration: Calibration) -> list[str]:
    """The sites with the smallest p-values, in the model's order, joint quantities last."""
    p = calibration.p_values()
    kept = sorted(p, key=p.__getitem__)[:_MOST_PANELS]
    return [name for name in p if name in kept]


def _band(axis: Axes, limits: Band, *, level: bool) -> None:
    """Where curves of a calibrated guide lie, and the one of uniform numbers."""
    less = limits.points if level else 0.0
    x, low = _ends(limits.low - less, limits, level=level)
    _, high = _ends(limits.high - less, limits, level=level)
    axis.fill_between(x, low, high, color=GREY, alpha=0.6, lw=0, label="95 % band, if calibrated")
    axis.plot([0, 1], [0, 0 if level else 1], color=INK, lw=0.6)


def _ends(values: np.ndarray, limits: Band, *, level: bool) -> tuple[np.ndarray, np.ndarray]:
    """A curve with its ends, at zero and at one, or at zero where the diagonal is subtracted."""
    return np.r_[0.0, limits.points, 1.0], np.r_[0.0, values, 0.0 if level else 1.0]


def _title(axis: Axes, name: str, verdict: str, wrong: int, count: int) -> None:
    fine = verdict == CALIBRATED
    share = f" ({wrong} of {count})" if not fine and count > 1 else ""
    axis.set_title(name, fontsize=9, color=INK, loc="left", fontweight="bold")
    axis.set_title(
        "" if fine else verdict + share, fontsize=8, color=INK if fine else _WRONG, loc="right"
    )


def _headline(figure: Figure, calibration: Calibration) -> None:
    count = len(calibration.numbers)
    figure.suptitle(
        f"{calibration.guide} on {calibration.model.name}: {calibration.verdict.level}\n{count} "
        "simulations; grey: where 95 % of calibrated curves lie",
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )

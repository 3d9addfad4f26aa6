"""Draws the pictures of docs/BELIEVE.md: ``python docs/images/believe.py`` from the root."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import pyro_vi_kit as vi
from pyro_vi_kit.core.export import datasets
from pyro_vi_kit.plots import predictive

HERE = Path(__file__).parent
GREY, BLUE, ORANGE, INK = "#B5B5B5", "#0072B2", "#D55E00", "#333333"
DOTS = 1500


def from_the_page() -> dict[str, Any]:
    """The names that the page's first blocks make, up to the funnel."""
    text = (HERE.parent / "BELIEVE.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        if "linear_response" not in block:
            exec(compile(block, "BELIEVE.md", "exec"), names)
        if "funnel = " in block:
            return names
    raise SystemExit("the page has no block that makes `funnel`")


def contours(axis: Any, x: np.ndarray, y: np.ndarray) -> None:
    """The ellipses that hold 50 % and 95 % of a normal with the draws' moments."""
    factor = np.linalg.cholesky(np.cov(x, y))
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for share, width in ((0.5, 1.2), (0.95, 2.0)):
        ring = factor @ circle * np.sqrt(-2 * np.log(1 - share))
        axis.plot(x.mean() + ring[0], y.mean() + ring[1], color=BLUE, lw=width, zorder=3)


def three_fits(panels: list[tuple[Any, ...]]) -> None:
    figure, axes = blank((11, 3.7))
    for axis, (title, fit, reference, names, columns) in zip(axes, panels, strict=True):
        draws, truth = fit.sample(4000, seed=0), datasets(reference)["posterior"]
        exact = {
            k: truth[k].values.reshape(-1, *truth[k].shape[2:])[:DOTS] for k in truth.data_vars
        }
        axis.plot(*columns(exact), ".", color=GREY, ms=2.5, zorder=1)
        contours(axis, *columns(draws))
        axis.set_xlabel(names[0], fontsize=9, color=INK)
        axis.set_ylabel(names[1], fontsize=9, color=INK)
        axis.set_title(f"{title}\nverdict: {fit.verdict.level}", fontsize=10, color=INK)
    figure.savefig(HERE / "believe_three_fits.png", dpi=110, facecolor="white")


def weights(panels: list[tuple[Any, ...]]) -> None:
    figure, axes = blank((11, 2.9))
    for axis, (title, fit, *_) in zip(axes, panels, strict=True):
        log_w = fit.log_weights(1000, seed=1)
        share = np.exp(log_w - np.logaddexp.reduce(log_w))
        tall = share * len(share)
        axis.vlines(np.arange(len(tall)), 0, tall, color=np.where(tall > 20, ORANGE, BLUE), lw=0.7)
        axis.axhline(1.0, color=INK, lw=0.8, ls=(0, (4, 2)))
        axis.set_ylim(0, max(6.0, 1.05 * tall.max()))
        axis.set_xlabel("draw", fontsize=9, color=INK)
        axis.set_ylabel("weight", fontsize=9, color=INK)
        worth = 100 / (len(share) * (share**2).sum())
        axis.set_title(f"{title}\nworth {worth:.0f} % of its draws", fontsize=10, color=INK)
    figure.savefig(HERE / "believe_weights.png", dpi=110, facecolor="white")


def blank(size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = [figure.add_subplot(1, 3, i + 1) for i in range(3)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return figure, axes


def main() -> None:
    page = from_the_page()
    quick, better, funnel = page["quick"], page["better"], page["funnel"]
    cars = vi.nuts(page["model"], chains=4, draws=1000, seed=0, progress=False)
    # The centred model is what NUTS fails on as well; the other way to write it has the same posterior.
    from models import eight_schools

    schools = vi.nuts(eight_schools.MODEL, chains=4, draws=1000, seed=0, progress=False)
    line = ("start (feet)", "slope (feet for each mile an hour)")

    def lean(values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return values["start"], values["slope"]

    def neck(values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return values["theta"][:, 0], np.log(values["tau"])

    panels = [
        ("full_rank: it covers the posterior", better, cars, line, lean),
        ("mean_field: it cannot lean", quick, cars, line, lean),
        ("a funnel", funnel, schools, ("theta of the first school", "log tau"), neck),
    ]
    three_fits(panels)
    weights(panels)
    predictive(better, HERE / "believe_predictive.png", draws=1000)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    main()

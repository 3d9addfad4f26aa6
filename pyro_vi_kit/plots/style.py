"""What the plots share: figures without a screen, panels in a grid, colours, and saving."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import MissingDependencyError, OptionError
from pyro_vi_kit.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dashes: TypeAlias = tuple[float, tuple[float, ...]]

# Okabe & Ito's palette, which colour-blind readers can tell apart, without its pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Dashes let a curve be seen under another; 4 patterns and 7 colours make 28 different lines.
LINES: tuple[Dashes, ...] = ((0, ()), (0, (6, 1.5)), (0, (2.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
GREY = "#CFCFCF"
INK = "#333333"

_PANEL = (3.1, 2.2)  # inches
_MOST_COLUMNS = 4
_DPI = 160


def destination(path: str | Path | None) -> Path | None:
    """Where the picture goes, refused before any work is done where it cannot.

    Raises:
        FileError: If the path cannot be written.
        OptionError: If its ending is no kind of picture that matplotlib writes.
    """
    if path is None:
        return None
    target = files.check_writable(path)
    known = _figure_class()().canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in known:
        raise OptionError(
            f"cannot write a picture to {target.name}: end it in .png (or {', '.join(known)})"
        )
    return target


def panels(count: int, *, height: float = 1.0) -> tuple[Figure, list[Axes]]:
    """An empty figure with ``count`` panels in a grid, of a height relative to the usual one.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    columns = count if count <= _MOST_COLUMNS else _balanced(count)
    rows = math.ceil(count / columns)
    # A single panel needs the width of two for its title and legend.
    size = (_PANEL[0] * max(columns, 2), _PANEL[1] * height * rows + 0.9)
    figure = _figure_class()(figsize=size, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return figure, axes


def _balanced(count: int) -> int:
    """Three or four columns, whichever leaves fewer places of the grid empty."""
    return min((4, 3), key=lambda columns: -count % columns)


def styles(names: Iterable[str]) -> Iterator[tuple[str, str, Dashes]]:
    """Name, colour and dashes of each fit."""
    for i, name in enumerate(names):
        yield name, COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]


def quality(posterior: Posterior) -> str:
    """The fit's verdict in a word, for a legend."""
    verdict = posterior.verdict
    return "point estimate" if verdict is None else verdict.level


def number(value: float, form: str) -> str:
    """A formatted number with the minus sign that the ticks have."""
    return format(value, form).replace("-", "\u2212")


def save(figure: Figure, path: Path | None) -> Figure:
    """Write the figure where a path is given, and hand it back.

    Names in it are the user's own, and a dollar sign in one begins no formula.
    """
    from matplotlib.text import Text

    ticks = {
        id(label)
        for axis in figure.axes
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels())
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in ticks:
            text.set_parse_math(False)
    if path is not None:
        memory, kind = io.BytesIO(), path.suffix.lstrip(".").lower()
        figure.savefig(memory, format=kind, dpi=_DPI, facecolor="white")
        files.write(path, memory.getvalue())
    return figure


def _figure_class() -> type[Figure]:
    # Not pyplot: that keeps every figure and may look for a screen.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'pyro_vi_kit[plots]'"
        ) from error
    return Figure

"""Numbers to tables: ratios, slopes, first times, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

DASH = "–"


@dataclass(frozen=True)
class Measured:
    """A number that may only be a lower bound, because what was measured had not ended at its cap."""

    value: float
    at_least: bool = False

    def over(self, other: Measured) -> Measured:
        """The ratio to what did end.

        Raises:
            ValueError: If the denominator is a lower bound, which would make the ratio an upper one.
        """
        if other.at_least:
            raise ValueError("the ratio to a lower bound is no lower bound")
        return Measured(self.value / other.value, self.at_least)

    def __str__(self) -> str:
        return ("≥ " if self.at_least else "") + number(self.value)


def median_of(values: Sequence[Measured]) -> Measured | None:
    """The median; a lower bound where a lower bound among them could move it, None of nothing."""
    if not values:
        return None
    middle = median(value.value for value in values)
    return Measured(middle, any(value.at_least and value.value <= middle for value in values))


def first_within(
    times: Sequence[float], values: Sequence[float], target: float, within: float
) -> float | None:
    """The first time at which a value is not further than this below the target; None if never."""
    for time, value in zip(times, values, strict=True):
        if value >= target - within:
            return time
    return None


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The least-squares slope of log cost on log size: cost grows as size to this power.

    Raises:
        ValueError: If there are not two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a slope needs two different sizes")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def number(value: Any, digits: int = 3) -> str:
    """A number in few digits; words as they are; a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    rounded = float(f"{value:.{digits}g}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, min(places, 6))}f}"


def markdown(columns: Mapping[str, str] | Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table.

    Args:
        columns: Keys of the rows with the words over them; or the keys alone.
        rows: Values by key; a dash where there is none.
    """
    heads = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    body = [[number(row.get(key)).replace("|", "\\|") for key in heads] for row in rows]
    cells = [list(heads.values()), *body]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    right = [all(_numeric(line[i]) for line in body) for i in range(len(heads))]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.rjust(width) if to_right else part.ljust(width)
            for part, width, to_right in zip(parts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + ":" if to_right else "-" * width
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in body)])


def _numeric(text: str) -> bool:
    try:
        float(text.removeprefix("≥ ").replace(",", ""))
    except ValueError:
        return text == DASH
    return True


def failures(rows: Iterable[Mapping[str, Any]], label: Callable[[Any], str]) -> list[str]:
    """The part of a report that names the rows that failed, and why: a list of one, or of none."""
    lines = [f"- {label(row)}: {row['error']}" for row in rows if row["error"]]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []

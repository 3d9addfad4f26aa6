"""One line per fit: which to believe, how wrong it is, how much faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.validation.compare.table import OVERALL

if TYPE_CHECKING:
    import pandas as pd

_DECIMALS = {
    "khat": 2,
    "elbo": 2,
    "mean_error": 2,
    "sd_ratio": 2,
    "sliced_w1": 3,
    "sliced_w1_null": 3,
}
_DIGITS = {"seconds": 3, "speedup": 2}
_NONE = "–"


def overview(frame: pd.DataFrame) -> pd.DataFrame:
    """The overall rows of `compare`'s table, rounded, in the order in which one asks.

    Args:
        frame: What `compare` returned.

    Returns:
        One row per fit with the columns ``fit``, ``verdict``, ``khat``, ``elbo`` (nats),
        ``mean_error`` (reference sd), ``sd_ratio``, ``sliced_w1`` and ``sliced_w1_null`` (reference
        sd), ``seconds`` and ``speedup``, and the attrs of ``frame``.
    """
    # A site may itself be called "overall"; its row has no time.
    rows = frame[(frame["parameter"] == OVERALL) & frame["seconds"].notna()]
    columns = ["fit", "verdict", *_DECIMALS, *_DIGITS]
    table = rows.reset_index(drop=True).loc[:, columns]
    for name, decimals in _DECIMALS.items():
        table[name] = [round(float(value), decimals) for value in table[name]]
    for name, digits in _DIGITS.items():
        table[name] = [_significant(value, digits) for value in table[name]]
    table.attrs.update(frame.attrs)
    return table


def format_overview(frame: pd.DataFrame, title: str = "") -> str:
    """The table of `compare`, or its overview, as plain text with headings, units and notes."""
    table = overview(frame) if "parameter" in frame else frame
    null = _shared_null(table)
    name = table.attrs.get("reference", "the reference")
    columns = [
        _column(table, "fit", ("", "fit"), str),
        _column(table, "verdict", ("", "verdict"), _word),
        _column(table, "khat", ("", "k-hat"), _number(".2f")),
        _column(table, "elbo", ("ELBO", "(nats)"), _number(",.2f")),
        _column(table, "mean_error", ("worst mean", "error (sd)"), _number("+.2f")),
        _column(table, "sd_ratio", ("worst", "sd ratio"), _number(".2f")),
        _distances(table, null),
        _column(table, "seconds", ("time", "(s)"), _number(",.3g")),
        _column(table, "speedup", (f"× {name.removeprefix('the ')}", "speed"), _number(",.2g")),
    ]
    lines = [title, ""] if title else []
    if table.attrs.get("reference_converged") is False:
        problems = "; ".join(table.attrs["reference_problems"])
        lines += [f"{name} has not converged and is no reference: {problems}.", ""]
    lines += _aligned(columns)
    notes = _notes(table, name)
    return "\n".join([*lines, "", *notes] if notes else lines)


def _column(
    table: pd.DataFrame, name: str, heading: tuple[str, str], form: Callable[[Any], str]
) -> list[str]:
    return [*heading, *(form(value) for value in table[name])]


def _distances(table: pd.DataFrame, null: float | None) -> list[str]:
    """Distances; that of exact draws is in the heading where it is the same for all fits."""
    form = _number(".2f")
    if null is not None:
        return _column(table, "sliced_w1", ("sliced W1", f"(exact: {null:.2f})"), form)
    pairs = zip(table["sliced_w1"], table["sliced_w1_null"], strict=True)
    return ["sliced W1", "(exact)", *(f"{form(value)} ({form(exact)})" for value, exact in pairs)]


def _shared_null(table: pd.DataFrame) -> float | None:
    nulls = {f"{value:.2f}" for value in table["sliced_w1_null"]}
    return float(nulls.pop()) if len(nulls) == 1 and "nan" not in nulls else None


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, numbers to the right, a rule under the heading."""
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(2, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _notes(table: pd.DataFrame, name: str) -> list[str]:
    """What the numbers are measured against, and below what they mean nothing."""
    facts, notes = table.attrs, []
    if "reference_draws" in facts:
        chains, draws = facts["reference_chains"], facts["reference_draws"]
        seconds = facts.get("reference_seconds", math.nan)
        took = "" if math.isnan(seconds) else f" in {_significant(seconds, 3):,g} s"
        notes.append(
            f"Against {name}, {draws:,} draws in {chains} chain{'s' * (chains != 1)}{took}. Errors "
            "are those of the worst parameter."
        )
    if "mean_error_noise" in facts:
        notes.append(
            f"Mean errors within {facts['mean_error_noise']:.2f} sd cannot be told from Monte "
            "Carlo noise."
        )
    if facts.get("left_out"):
        notes.append(f"Not in {name} and not compared: {', '.join(facts['left_out'])}.")
    return notes


def _word(level: object) -> str:
    # A table that was read from a CSV file has NaN for no verdict.
    return level if isinstance(level, str) and level else _NONE


def _number(form: str) -> Callable[[float], str]:
    def text(value: float) -> str:
        return _NONE if math.isnan(value) else _plain(value, form)

    return text


def _plain(value: float, form: str) -> str:
    """The number without an exponent, which ``g`` would give a large one."""
    if form.endswith("g") and math.isfinite(value) and abs(value) >= 100:
        return f"{value:,.0f}"
    return format(value, form)


def _significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")

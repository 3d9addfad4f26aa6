"""The results of a bench in words: a line per cell while it runs, a table per model at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.validation.compare import OVERALL, format_overview
from pyro_vi_kit.validation.suite.cells import DONE, FAILED, NOT_APPLICABLE

if TYPE_CHECKING:
    import pandas as pd

_USABLE = {
    "good": "The fastest that is good:",
    "resample": "The fastest to use through posterior.resample():",
}
_NUMBERS = (
    "khat",
    "elbo",
    "mean_error",
    "mean_error_noise",
    "sd_ratio",
    "sliced_w1",
    "sliced_w1_null",
    "seconds",
    "speedup",
    "nuts_seconds",
)


def progress_line(row: dict[str, Any]) -> str:
    """What is said of a cell as soon as it is done, from its record."""
    if row["status"] == NOT_APPLICABLE:
        return f"not applicable: {row['error']}"
    if row["status"] == FAILED:
        return f"FAILED: {row['error']}"
    words = [row["verdict"] or "point estimate"]
    if row["khat"] is not None:
        words.append(f"k-hat {row['khat']:.2f}")
    if not row["converged"]:
        words.append("not converged")
    return ", ".join([*words, f"{row['seconds']:.2f} s"])


def format_results(frame: pd.DataFrame) -> str:
    """A table per model of what `run` or `collect` returned, with what to use and what went wrong."""
    parts = [_format_model(str(model), rows) for model, rows in frame.groupby("model", sort=False)]
    return "\n\n\n".join(parts)


def advice(frame: pd.DataFrame) -> str:
    """Which of one model's fits to take: the fastest good one, and a faster one to resample."""
    fits = [row for row in frame.to_dict(orient="records") if row["status"] == DONE]
    taken: list[str] = []
    seconds = math.inf
    for level, words in _USABLE.items():
        quickest = min(
            (row for row in fits if row["verdict"] == level),
            key=lambda row: row["seconds"],
            default=None,
        )
        if quickest is not None and quickest["seconds"] < seconds:
            seconds = quickest["seconds"]
            taken.append(f"{words} {_with_time(quickest)}.")
    return "\n".join(taken) or (
        "None of these is to be believed: take NUTS, or reparameterise the model."
    )


def _with_time(row: Mapping[Any, Any]) -> str:
    words = f"{row['guide']} / {row['objective']}, {row['seconds']:,.2f} s"
    if row["speedup"] is None or math.isnan(row["speedup"]):
        return words
    return f"{words}, {float(format(row['speedup'], '.2g')):,g} times as fast as NUTS"


def _format_model(model: str, rows: pd.DataFrame) -> str:
    lines = [model]
    tried = rows.loc[rows["seconds"].notna()]
    if len(tried):
        table = format_overview(_overview(tried), model)
        lines = [table, *_time_of_nuts(tried), advice(tried)]
    lines += [
        f"{row['status']}: {row['guide']} / {row['objective']}: {row['error']}"
        for row in rows.to_dict(orient="records")
        if row["status"] in (FAILED, NOT_APPLICABLE)
    ]
    return "\n".join(lines)


def _overview(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as `vi.compare` would have made them."""
    names = rows["guide"] + " / " + rows["objective"]
    if len(set(rows["seed"])) > 1:
        names = names + " / seed " + rows["seed"].astype(str)
    frame = rows.assign(parameter=OVERALL, fit=names, verdict=rows["verdict"].fillna(""))
    frame[list(_NUMBERS)] = frame[list(_NUMBERS)].astype(float)
    frame.attrs = {"reference": "NUTS"}
    doubts = {str(row["nuts_warnings"]) for row in rows.to_dict(orient="records") if _doubted(row)}
    if doubts:
        frame.attrs |= {"reference_converged": False, "reference_problems": sorted(doubts)}
    noise = [float(value) for value in rows["mean_error_noise"].dropna()]
    if noise:
        frame.attrs["mean_error_noise"] = max(noise)
    return frame


def _doubted(row: Mapping[Any, Any]) -> bool:
    return row["nuts_converged"] is False


def _time_of_nuts(rows: pd.DataFrame) -> list[str]:
    known = [float(value) for value in rows["nuts_seconds"].dropna()]
    return [f"NUTS took {max(known):,.1f} s."] if known else []

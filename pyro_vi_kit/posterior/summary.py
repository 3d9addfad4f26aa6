"""Tables that are printed under their verdict, one row per number.

To be imported where a table is made: pandas takes a while to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_vi_kit.core.metrics import interval, mcse_mean
from pyro_vi_kit.posterior.labels import labels


class VerdictFrame(pd.DataFrame):
    """A DataFrame whose printed form begins with ``attrs["verdict"]``; parts of it are plain ones."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __repr__(self) -> str:
        """The verdict, and the table as pandas prints it."""
        verdict = self.attrs.get("verdict", "")
        return f"{verdict}\n\n{super().__repr__()}" if verdict else super().__repr__()

    def _repr_html_(self) -> str | None:
        from html import escape

        verdict, table = self.attrs.get("verdict", ""), super()._repr_html_()
        return f"<p>{escape(verdict)}</p>{table}" if verdict and table else table


def summarise(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    verdicts: Sequence[str],
    prob: float,
    verdict: str = "",
) -> pd.DataFrame:
    """Mean, sd, equal-tailed interval and Monte Carlo error of the mean.

    Args:
        values: Independent draws by site, `[S, *shape]`.
        dims: Names of each site's dims.
        coords: Names along those dims.
        verdicts: Level of each number, in the order of the rows; none where there are none.
        prob: Mass of the interval.
        verdict: What the table is printed under, and has in its ``attrs``.
    """
    tail = 50.0 * (1.0 - prob)
    rows: dict[str, dict[str, Any]] = {}
    for name, given in values.items():
        # Numbers with draws that are not finite have no moments, which the verdict says in words.
        finite = np.asarray(np.isfinite(given).all(0))
        draws = np.where(finite, given, 0.0)
        low, high = interval(draws, prob)
        columns = {
            "mean": draws.mean(0),
            "sd": draws.std(0, ddof=1) if len(draws) > 1 else np.zeros(draws.shape[1:]),
            f"{tail:g}%": low,
            f"{100 - tail:g}%": high,
            "mcse_mean": mcse_mean(draws),
        }
        for index, label in labels(name, draws.shape[1:], dims.get(name, ()), coords):
            rows[label] = {
                key: float(np.asarray(column)[index]) if finite[index] else np.nan
                for key, column in columns.items()
            }
            rows[label]["verdict"] = str(verdicts[len(rows) - 1]) if len(verdicts) else ""
    frame = VerdictFrame.from_dict(rows, orient="index")
    frame.attrs["verdict"] = verdict
    return frame

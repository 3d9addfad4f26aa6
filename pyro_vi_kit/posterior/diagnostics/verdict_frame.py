"""A table that is printed under its verdict."""

from __future__ import annotations

import pandas as pd


class HeadedFrame(pd.DataFrame):
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

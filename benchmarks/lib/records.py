"""Results as they come: one JSON line per cell, and one CSV of them all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.options import say
from benchmarks.lib.processes import call


class Records:
    """The rows of one script, each written as soon as it is there.

    Args:
        out: The folder.
        name: The script's name: rows go to ``name.jsonl`` and ``name.csv``.
        resume: Keep what an earlier run has written; otherwise it is thrown away.
    """

    def __init__(self, out: Path, name: str, resume: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._lines, self._table = out / f"{name}.jsonl", out / f"{name}.csv"
        self.rows: list[dict[str, Any]] = []
        if resume and self._lines.exists():
            self.rows = [json.loads(line) for line in self._lines.read_text().splitlines()]
        else:
            self._lines.write_text("")

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of an earlier run that was measured with exactly this, unless it failed."""
        for row in self.rows:
            if row.get("error") is None and all(row.get(k) == v for k, v in key.items()):
                return row
        return None

    def measure(
        self, key: Mapping[str, Any], target: str, arguments: Mapping[str, Any], *, cap: float
    ) -> dict[str, Any]:
        """The row of this key: of an earlier run, or measured now in a process of its own.

        Args:
            key: What the row is of.
            target: What to call, ``package.module:function``; it returns the rest of the row.
            arguments: Its keyword arguments.
            cap: Seconds that it may take.

        Returns:
            The row; ``error`` is None, or why there is nothing beside the key.
        """
        row = self.find(key)
        if row is None:
            done = call(target, arguments, cap=cap)
            row = self.add({**key, **(done.value or {}), "error": done.error})
        return row

    def measure_all(
        self,
        target: str,
        cells: Sequence[Mapping[str, Any]],
        told: Callable[[dict[str, Any]], str],
        *,
        cap: float,
    ) -> list[dict[str, Any]]:
        """The rows of these keys in turn, each told of on stderr as soon as it is there.

        Args:
            target: What to call, with a key as its arguments; a posterior is its ``name``.
            cells: What each row is of.
            told: What is said of a row that did not fail.
            cap: Seconds that each may take.
        """
        rows = []
        for i, cell in enumerate(cells, 1):
            arguments = {"name" if k == "posterior" else k: v for k, v in cell.items()}
            rows.append(self.measure(cell, target, arguments, cap=cap))
            of = ", ".join(f"{k} {v}" for k, v in cell.items())
            say(f"[{i}/{len(cells)}] {of}: {rows[-1]['error'] or told(rows[-1])}")
        return rows

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write a row, all of whose values JSON can hold."""
        self.rows.append(dict(row))
        with self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        names = dict.fromkeys(name for known in self.rows for name in known)
        with self._table.open("w", encoding="utf-8", newline="") as table:
            writer = csv.DictWriter(table, list(names))
            writer.writeheader()
            writer.writerows(self.rows)
        return self.rows[-1]

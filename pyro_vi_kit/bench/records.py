"""What a bench leaves behind: a record per cell, written when it is done, and one table of all.

``out/results.csv`` is made of ``out/MODEL/GUIDE-OBJECTIVE-seedN.json``; beside each lies the
posterior, ``.nc``, and beside those of a model its reference, ``reference.nc``.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.bench.cells import Cell
from pyro_vi_kit.errors import FileError

if TYPE_CHECKING:
    import pandas as pd

TABLE = "results.csv"
COLUMNS = (
    "model",
    "guide",
    "objective",
    "seed",
    "status",
    "converged",
    "verdict",
    "khat",
    "elbo",
    "elbo_se",
    "bound",
    "log_evidence",
    "seconds",
    "evaluations",
    "nuts_seconds",
    "nuts_converged",
    "nuts_warnings",
    "speedup",
    "mean_error",
    "mean_error_noise",
    "sd_ratio",
    "sliced_w1",
    "sliced_w1_null",
    "sliced_w1_null_q99",
    "error",
    "file",
)
DONE, FAILED, NOT_APPLICABLE = "done", "failed", "not applicable"


def folder_for_results(path: str | os.PathLike[str]) -> Path:
    """Make a folder for results, before any work is done for it.

    Args:
        path: The folder; its parents are made too.

    Returns:
        Its absolute path.

    Raises:
        FileError: If it cannot be made or written to.
    """
    folder = Path(path).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot make the folder {folder}: {error.strerror}; choose another path"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"no right to write to {folder}; choose another path")
    return folder


def record_path(out: Path, cell: Cell) -> Path:
    """Where a cell's record lies; its posterior has the ending .nc."""
    return out / cell.model / f"{cell.name}.json"


def write_record(out: Path, cell: Cell, settings: str, row: dict[str, Any]) -> None:
    """Write a cell's record, all of it or nothing."""
    unknown = set(row) - set(COLUMNS)
    if unknown:
        raise ValueError(f"not columns of the table: {sorted(unknown)}")
    facts = {"model": cell.model, "guide": cell.guide, "objective": cell.objective}
    text = json.dumps({"settings": settings, "row": facts | {"seed": cell.seed} | row}, indent=1)
    _replace(record_path(out, cell), text)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if {"settings", "row"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def collect(out: str | os.PathLike[str], first: list[Cell] | None = None) -> pd.DataFrame:
    """All that is recorded in a folder, a row per cell.

    Args:
        out: The folder.
        first: Cells whose rows come first, in this order.
    """
    import pandas as pd

    out = Path(out)
    wanted = [record_path(out, cell) for cell in first or []]
    paths = dict.fromkeys([*wanted, *sorted(out.glob("*/*.json"))])
    records = [record for path in paths if (record := read_record(path)) is not None]
    return pd.DataFrame([record["row"] for record in records], columns=list(COLUMNS))


def write_table(out: str | os.PathLike[str], first: list[Cell] | None = None) -> Path:
    """Write the table of all that is recorded in a folder; see `collect`."""
    target = Path(out) / TABLE
    _replace(target, collect(out, first).to_csv(index=False))
    return target


def _replace(target: Path, text: str) -> None:
    """Write a file in one step of the file system."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise FileError(
            f"cannot write {target}: {error}; check the space and the rights on {target.parent}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)

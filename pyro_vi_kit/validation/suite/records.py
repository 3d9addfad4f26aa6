"""What a bench leaves behind: a record per cell, written when it is done, and one table of all.

``out/results.csv`` is made of ``out/MODEL/GUIDE-OBJECTIVE-seedN.json``; beside each lies the
posterior, ``.nc``, and beside those of a model its reference, ``reference.nc``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import FileError
from pyro_vi_kit.validation.suite.cells import Cell

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
    # As it is read back, so that its checksum is that of what is read.
    record = {"settings": settings, "row": facts | {"seed": cell.seed} | row}
    record = json.loads(json.dumps(record))
    text = json.dumps(record | {"checksum": _checksum(record)}, indent=1)
    files.write(record_path(out, cell), text.encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that is whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
        return record if checksum == _checksum(record) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


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
    table = collect(out, first).to_csv(index=False)
    return files.write(Path(out) / TABLE, table.encode())

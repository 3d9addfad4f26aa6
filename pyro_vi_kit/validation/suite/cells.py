"""What a bench runs, one cell for each model, guide and objective, and what it leaves behind.

``out/results.csv`` is made of ``out/MODEL/GUIDE-OBJECTIVE-seedN.json``, a cell's record, written when it
is done; beside each lies the posterior, ``.nc``, and beside those of a model its reference,
``reference.nc``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.version import __version__
from pyro_vi_kit.fitting import auto, plan, request
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.modelfile import model_files

if TYPE_CHECKING:
    import pandas as pd

Named = Iterable[str] | Mapping[str, Mapping[str, Any]]
"""Guides or objectives by name, with their options if they have any."""

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


@dataclass(frozen=True, eq=False)
class Cell:
    """One fit to be made.

    Attributes:
        path: The model file.
        guide: The guide's name.
        objective: The objective's name.
        seed: Of the fit.
        guide_options: Options of the guide.
        objective_options: Options of the objective.
    """

    path: Path
    guide: str
    objective: str
    seed: int
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    objective_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """What results are filed under: the model file's name."""
        return self.path.stem

    @property
    def parts(self) -> tuple[Any, Any]:
        """Guide and objective as `fit` takes them: the name where there are no options."""
        guide, objective = self.guide_options, self.objective_options
        return (
            guides.specify(self.guide, **guide) if guide else self.guide,
            objectives.make(self.objective, **objective) if objective else self.objective,
        )

    def record(self, out: Path) -> Path:
        """Where the cell's record lies; its posterior has the ending .nc."""
        return out / self.model / f"{self.guide}-{self.objective}-seed{self.seed}.json"

    def settings(self, reference: str) -> str:
        """A hash of all that the result depends on, that of its `reference_settings` included."""
        given = [dict(options) for options in (self.guide_options, self.objective_options)]
        named = [reference, self.guide, self.objective, self.seed]
        return _hash([*named, *given] if any(given) else named)


def enumerate_cells(
    models: Iterable[str | os.PathLike[str]], guide_names: Named, objective_names: Named, seed: int
) -> list[Cell]:
    """All cells, model by model, guide by guide.

    Raises:
        FileError: If a file does not exist.
        OptionError: If a name or an option is unknown, none is given, or two files have one name.
    """
    chosen, goals = _with_options(guide_names), _with_options(objective_names)
    for kind, given in (("guide", chosen), ("objective", goals), ("model", list(models))):
        if not given:
            raise OptionError(f"no {kind} is given: name one or more")
    for guide, options in chosen.items():
        if guide != guides.AUTO:
            guides.specify(guide, **options)
    for objective, options in goals.items():
        objectives.make(objective, **options)
    paths = model_files(models)
    by_stem: dict[str, Path] = {}
    for path in paths:
        if by_stem.setdefault(path.stem, path) != path:
            raise OptionError(
                f"{by_stem[path.stem]} and {path} would be filed under one name: rename one of them"
            )
    return [
        Cell(path, guide, objective, seed, chosen[guide], goals[objective])
        for path in paths
        for guide in chosen
        for objective in goals
    ]


def _with_options(names: Named) -> dict[str, Mapping[str, Any]]:
    return dict(names) if isinstance(names, Mapping) else {name: {} for name in names}


def obstacle(density: Density, guide: Any, objective: Any) -> str | None:
    """Why a guide cannot be fitted to a model with an objective, as `fit` says it; None where it can."""
    try:
        asked = request.checked(density.model, objective=objective, seed=0)
        if guide != guides.AUTO:
            return plan.obstacle(asked, guides.make(guide, density))
        auto.require_possible(asked)
    except OptionError as error:
        return str(error)
    return None


def reference_settings(path: Path, options: dict[str, Any] | None) -> str:
    """A hash of all that a model's reference depends on: its file, and the sampler's options.

    What the model file reads or imports is not looked at.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash([__version__, content, options])


# -- records ----------------------------------------------------------------------------------


def write_record(out: Path, cell: Cell, settings: str, row: dict[str, Any]) -> None:
    """Write a cell's record, all of it or nothing."""
    unknown = set(row) - set(COLUMNS)
    if unknown:
        raise ValueError(f"not columns of the table: {sorted(unknown)}")
    facts = {"model": cell.model, "guide": cell.guide, "objective": cell.objective}
    # As it is read back, so that its checksum is that of what is read.
    record = {"settings": settings, "row": facts | {"seed": cell.seed} | row}
    record = json.loads(json.dumps(record))
    text = json.dumps(record | {"checksum": _hash(record)}, indent=1)
    files.write(cell.record(out), text.encode())


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that is whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
        return record if checksum == _hash(record) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def collect(out: str | os.PathLike[str], first: Iterable[Cell] = ()) -> pd.DataFrame:
    """All that is recorded in a folder, a row per cell, these cells' rows first."""
    import pandas as pd

    out = Path(out)
    paths = dict.fromkeys([*(cell.record(out) for cell in first), *sorted(out.glob("*/*.json"))])
    records = [record for path in paths if (record := read_record(path)) is not None]
    return pd.DataFrame([record["row"] for record in records], columns=list(COLUMNS))


def write_table(out: str | os.PathLike[str], first: Iterable[Cell] = ()) -> Path:
    """Write the table of all that is recorded in a folder; see `collect`."""
    table = collect(out, first).to_csv(index=False)
    return files.write(Path(out) / TABLE, table.encode())


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

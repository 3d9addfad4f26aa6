"""`run`: cell by cell, each recorded when it is done, so that an interruption costs one cell."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.core import export, files
from pyro_vi_kit.core.errors import FileError
from pyro_vi_kit.core.files import folder_for_results
from pyro_vi_kit.core.stopping import terminable
from pyro_vi_kit.fitting.fit import fit
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.model.modelfile import load_model_file, model_files
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.compare import OVERALL, compare, quality
from pyro_vi_kit.validation.nuts import SamplerWarning, nuts
from pyro_vi_kit.validation.suite.cells import (
    DONE,
    FAILED,
    NOT_APPLICABLE,
    Cell,
    Named,
    collect,
    enumerate_cells,
    obstacle,
    read_record,
    reference_settings,
    write_record,
    write_table,
)
from pyro_vi_kit.validation.suite.table import progress_line

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]

_COMPARED = (
    "speedup",
    "mean_error",
    "sd_ratio",
    "sliced_w1",
    "sliced_w1_null",
    "sliced_w1_null_q99",
)


@dataclass(frozen=True)
class Nuts:
    """How references are sampled; see `vi.nuts`.

    Attributes:
        chains: Independent chains.
        draws: Draws kept per chain.
        tune: Warm-up draws per chain.
        seed: Of the chains.
        sampler: ``auto``, ``nutpie`` or ``pyro``.
    """

    chains: int = 4
    draws: int = 1000
    tune: int | None = None
    seed: int = 0
    sampler: str = "auto"


@dataclass(frozen=True)
class _Bench:
    """What the cells of one run share."""

    out: Path
    cells: list[Cell]
    nuts: Nuts | None
    say: Say
    progress: bool | None

    def done(self, cell: Cell, settings: str, row: dict[str, Any]) -> None:
        """Record a cell, bring the table up to date and say so."""
        write_record(self.out, cell, settings, row)
        write_table(self.out, self.cells)
        self.tell(cell, progress_line(row))

    def tell(self, cell: Cell, text: str) -> None:
        """One line of progress."""
        number, total = self.cells.index(cell) + 1, len(self.cells)
        place = f"[{number:>{len(str(total))}}/{total}]"
        self.say(f"{place} {cell.model}  {cell.guide} / {cell.objective}: {text}")


@terminable
def run(
    models: Sequence[str | os.PathLike[str]] | Mapping[Path, Model],
    guides: Named,
    objectives: Named,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    nuts: Nuts | None = Nuts(),
    say: Say = print,
    progress: bool | None = False,
) -> pd.DataFrame:
    """Fit every guide to every model with every objective, beside NUTS.

    A cell that fails is recorded with its error and the run goes on; one that cannot work (a point
    estimate of a multi-sample bound) is recorded as not applicable.

    Args:
        models: Model files and folders of them, or what `load_models` made of these.
        guides: Guides' names, or a dict of their options by name.
        objectives: Objectives' names, likewise.
        out: Folder for the results; what it holds of other cells stays.
        seed: Of every fit.
        resume: Leave out the cells, and keep the references, that are there already and were made
            with the same settings. Cells that failed are tried again.
        nuts: How to sample the references; None for fits alone.
        say: Gets one line about each cell.
        progress: Show the progress within a cell on stderr; None for only on a terminal.

    Returns:
        The table that is in ``out/results.csv``: all that is recorded in the folder, this run's
        cells first. The columns that `vi.compare` has mean the same, in its overall row.

    Raises:
        FileError: If a file or the folder cannot be used.
        ModelError: If a model file does not import or has no ``MODEL``.
        OptionError: If a name or an option is unknown.
        KeyboardInterrupt: If interrupted; the running cell is lost, all others are recorded.
    """
    cells = enumerate_cells(models, guides, objectives, seed)
    loaded = models if isinstance(models, Mapping) else load_models(models)
    bench = _Bench(folder_for_results(out), cells, nuts, say, progress)
    for path in dict.fromkeys(cell.path for cell in cells):
        _run_model(bench, path, loaded[path], resume)
    return collect(bench.out, cells)


def load_models(paths: Iterable[str | os.PathLike[str]]) -> dict[Path, Model]:
    """The models of model files, and of folders of them.

    Raises:
        FileError: If a file does not exist.
        ModelError: If one does not import or has no ``MODEL``.
    """
    return {path: load_model_file(path) for path in model_files(paths)}


def _run_model(bench: _Bench, path: Path, model: Model, resume: bool) -> None:
    reference = reference_settings(path, asdict(bench.nuts) if bench.nuts else None)
    settings = {cell: cell.settings(reference) for cell in bench.cells if cell.path == path}
    todo = []
    for cell, wanted in settings.items():
        if resume and _is_done(bench.out, cell, wanted):
            bench.tell(cell, "done before")
        else:
            # What the table says of a cell is of these settings or nothing.
            cell.record(bench.out).unlink(missing_ok=True)
            todo.append(cell)
    folder_for_results(bench.out / path.stem)
    todo = _applicable(bench, model, {cell: settings[cell] for cell in todo})
    if not todo:
        write_table(bench.out, bench.cells)
        return
    truth, problem = _reference(bench, path.stem, model, reference, resume)
    for cell in todo:
        bench.done(cell, settings[cell], _run_cell(bench, cell, model, truth, problem))


def _is_done(out: Path, cell: Cell, settings: str) -> bool:
    record = read_record(cell.record(out))
    if record is None or record["settings"] != settings:
        return False
    row = record["row"]
    return row["status"] == NOT_APPLICABLE or (
        row["status"] == DONE and _is_whole(out / str(row["file"]))
    )


def _is_whole(file: Path) -> bool:
    try:
        return files.unsealed(file.read_bytes(), file)[1]
    except OSError:
        return False


def _applicable(bench: _Bench, model: Model, settings: dict[Cell, str]) -> list[Cell]:
    """The cells that can be run; the others are recorded with the reason."""
    possible: list[Cell] = []
    density: Density | None = None
    for cell, wanted in settings.items():
        try:
            density = density or Density(model)
            reason = obstacle(density, *cell.parts)
        except Exception as error:  # noqa: BLE001 - whatever the model raises is the cell's result
            bench.done(cell, wanted, {"status": FAILED, "error": _words(error)})
            continue
        if reason is None:
            possible.append(cell)
        else:
            bench.done(cell, wanted, {"status": NOT_APPLICABLE, "error": reason})
    return possible


def _reference(
    bench: _Bench, name: str, model: Model, settings: str, resume: bool
) -> tuple[export.Tree | None, str]:
    """The model's reference, from the folder or sampled now; or why there is none."""
    if bench.nuts is None:
        return None, ""
    path = bench.out / name / "reference.nc"
    if resume and path.is_file():
        try:
            tree = export.read(path)
        except FileError:
            tree = None
        if tree is not None and tree.attrs.get("bench_settings") == settings:
            bench.say(f"{name}: NUTS sampled before")
            return tree, ""
    bench.say(f"{name}: sampling the reference with NUTS")
    try:
        with warnings.catch_warnings():
            # Said below, and in the table.
            warnings.simplefilter("ignore", SamplerWarning)
            tree = nuts(model, **asdict(bench.nuts), progress=bench.progress)
        if tree.attrs["interrupted"]:
            raise KeyboardInterrupt
    except Exception as error:  # noqa: BLE001 - recorded with every cell of the model
        bench.say(f"{name}: NUTS failed: {_words(error)}")
        return None, f"reference: {_words(error)}"
    tree.attrs["bench_settings"] = settings
    export.write(tree, path)
    doubt = "" if tree.attrs["converged"] else f", NOT converged: {tree.attrs['warnings']}"
    bench.say(f"{name}: NUTS took {tree.attrs['seconds']:.1f} s{doubt}")
    return tree, ""


def _run_cell(
    bench: _Bench, cell: Cell, model: Model, truth: export.Tree | None, problem: str
) -> dict[str, Any]:
    """Fit, save and compare; the row, whatever happens."""
    row: dict[str, Any] = {"status": FAILED}
    try:
        posterior = fit(model, *cell.parts, seed=cell.seed, progress=bench.progress)
        if posterior.status.reason == "interrupted":
            raise KeyboardInterrupt
        file = cell.record(bench.out).with_suffix(".nc")
        posterior.save(file)
        row |= _facts(posterior) | {"file": str(file.relative_to(bench.out))}
        if truth is not None:
            row |= _compared(posterior, truth)
        failed = problem or ("" if posterior.status.reason != "diverged" else "the fit diverged")
        return row | {"status": FAILED if failed else DONE, "error": failed}
    except Exception as error:  # noqa: BLE001 - one cell's failure must not end the others
        return row | {"error": _words(error)}


def _facts(posterior: Posterior) -> dict[str, Any]:
    evidence = posterior.log_evidence
    return quality(posterior) | {
        "converged": posterior.status.converged,
        "bound": posterior.bound,
        "log_evidence": None if evidence is None else evidence[0],
        "evaluations": posterior.evaluations,
    }


def _compared(posterior: Posterior, truth: export.Tree) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)
        frame = compare(truth, {"fit": posterior})
    overall = frame[frame["parameter"] == OVERALL].iloc[-1]
    return {name: float(overall[name]) for name in _COMPARED} | {
        "nuts_seconds": float(truth.attrs["seconds"]),
        "nuts_converged": bool(truth.attrs["converged"]),
        "nuts_warnings": str(truth.attrs["warnings"]),
        "mean_error_noise": float(frame.attrs["mean_error_noise"]),
    }


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

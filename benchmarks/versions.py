"""The oldest and the newest packages that pyproject.toml allows, on each Python that it names.

    python -m benchmarks.versions                          # all cells; a download of many GB, once
    python -m benchmarks.versions --only 3.12:oldest       # one of them
    python -m benchmarks.versions --python ~/py3.13/bin/python

Needs uv (`pip install uv`), which resolves to the oldest releases. Every cell is a fresh environment in
a temporary folder, one at a time, into which this package is installed as anybody would; what is run
there is `benchmarks/lib/smoke.py`. The table is written to docs/VERSIONS.md: cells that were not tried
this time keep what an earlier run found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import ONE_THREAD, ROOT
from benchmarks.lib.tables import markdown

PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
DOCUMENT = ROOT / "docs" / "VERSIONS.md"
_SHOWN = ("torch", "pyro-ppl", "numpy", "scipy", "pandas", "xarray", "arviz", "nutpie")
_INSTALL_SECONDS, _RUN_SECONDS = 3600.0, 1200.0


@dataclass(frozen=True)
class Cell:
    """One environment.

    Attributes:
        python: A version, as ``3.12``.
        age: ``oldest`` or ``newest``.
    """

    python: str
    age: str

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.python}:{self.age}"


class NotTriedError(Exception):
    """A cell that cannot be tried here, and why."""


def interpreter(python: str, given: Sequence[str]) -> str:
    """An interpreter of that version, among those given or on the path.

    Raises:
        NotTriedError: If there is none.
    """
    for candidate in (*given, f"python{python}", "python3", "python"):
        found = shutil.which(candidate)
        if found is None:
            continue
        asked = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        done = subprocess.run([found, "-c", asked], capture_output=True, text=True, check=False)
        version, _, path = done.stdout.strip().partition(" ")
        if version == python:
            return path
    raise NotTriedError(f"no Python {python} here")


def tried(cell: Cell, given: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `smoke` says in a fresh environment; ``why`` in its place where there is none."""
    try:
        python = interpreter(cell.python, given)
        with tempfile.TemporaryDirectory(dir=folder, prefix="cell_") as place:
            return _smoke(_installed(cell, python, Path(place)), Path(place))
    except NotTriedError as error:
        return {"why": str(error)}


def _installed(cell: Cell, python: str, place: Path) -> Path:
    """The interpreter of an environment with this package and what it needs."""
    _uv("venv", "-q", "--python", python, str(place / "venv"))
    own = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    into = ("pip", "install", "-q", "--python", str(own))
    needed = place / "needed.txt"
    _uv(
        *("pip", "compile", "-q", "--python", str(own), "--only-binary", ":all:"),
        *("--resolution", RESOLUTIONS[cell.age], "--extra", "nuts", "--extra", "plots"),
        *(str(ROOT / "pyproject.toml"), "-o", str(needed)),
    )
    _uv(*into, "-r", str(needed))
    _uv(*into, "--no-deps", str(ROOT))
    return own


def _uv(*arguments: str) -> None:
    found = shutil.which("uv")
    command = [found] if found else [sys.executable, "-m", "uv"]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["uv failed"]
        raise NotTriedError(f"no build: {said[-1].strip()[:200]}")


def _smoke(python: Path, place: Path) -> dict[str, Any]:
    script = shutil.copyfile(ROOT / "benchmarks" / "lib" / "smoke.py", place / "smoke.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYRO_VI"))}
    try:
        done = subprocess.run(
            [str(python), str(script)],
            capture_output=True,
            text=True,
            timeout=_RUN_SECONDS,
            env=environment | ONE_THREAD,
            cwd=place,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"steps": {"all": f"not done in {_RUN_SECONDS:.0f} s"}, "versions": {}}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"steps": {"all": said[-1]}, "versions": {}}


def document(found: dict[str, dict[str, Any]]) -> str:
    """The table, with what went wrong below it."""
    cells = [Cell(python, age) for python in PYTHONS for age in RESOLUTIONS]
    rows, wrong = [], []
    for cell in cells:
        result = found.get(cell.name, {})
        versions, steps = result.get("versions", {}), result.get("steps", {})
        failed = [f"{step}: {said}" for step, said in steps.items() if said != "ok"]
        outcome = "works" if steps and not failed else "fails" if failed else "not tried"
        rows.append(
            {
                "Python": result.get("python", cell.python),
                "releases": cell.age,
                **{name: versions.get(name, "") for name in _SHOWN},
                "NUTS on": result.get("nuts_engine", ""),
                "outcome": outcome,
                "on": result.get("date", ""),
            }
        )
        reasons = failed or [f"not tried: {why}" for why in [result.get("why")] if why]
        wrong += [f"- {cell.name}: {reason}" for reason in reasons]
    head = (
        "# Versions\n\n"
        "Written by `python -m benchmarks.versions`: the oldest and the newest releases that "
        "pyproject.toml allows, in fresh environments. In each a search and a flow are fitted, NUTS "
        "is run and compared with them, a posterior is exported, saved and loaded, and the command "
        "line is used; every number that comes back is checked.\n\n"
    )
    parts = [head + markdown(list(rows[0]), rows), "\n".join(wrong)]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Try cells, and write the table."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument(
        "--python", action="append", default=[], help="an interpreter; several times"
    )
    words.add_argument("--only", type=options.listed, default=[], help="as 3.12:oldest,3.13:newest")
    words.add_argument("--folder", type=Path, help="where environments are made (some 8 GB)")
    words.add_argument("--records", type=Path, default=options.OUT / "versions.json")
    asked = words.parse_args(argv)
    known = {Cell(python, age).name: Cell(python, age) for python in PYTHONS for age in RESOLUTIONS}
    chosen = options.chosen(asked.only, list(known), "cell") if asked.only else list(known)
    found = json.loads(asked.records.read_text()) if asked.records.exists() else {}
    folder = asked.folder or Path(tempfile.gettempdir())
    for name in chosen:
        options.say(f"{name} ...")
        result = tried(known[name], asked.python, folder)
        found[name] = result | {"date": datetime.date.today().isoformat()}
        options.say(json.dumps(result.get("steps") or result))
        asked.records.parent.mkdir(parents=True, exist_ok=True)
        asked.records.write_text(json.dumps(found, indent=1))
        DOCUMENT.write_text(document(found))
    steps = [result.get("steps", {}) for result in found.values()]
    return int(any(said != "ok" for outcome in steps for said in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())

"""The open posteriors and their references, without loading torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.lib.processes import ROOT

FILES = ROOT / "benchmarks" / "posteriordb"
VARIABLE = "PYRO_VI_KIT_POSTERIORDB"

# Those that --quick runs: small, and of different kinds.
QUICK = (
    "eight_schools_eight_schools_noncentered",
    "ark_ark",
    "kidiq_kidscore_interaction",
)
OPTIMA = {"mean_field": "meanfield", "full_rank": "fullrank"}


def names() -> list[str]:
    """The model files, without their ending."""
    return sorted(path.stem for path in FILES.glob("[a-z]*.py"))


def folder() -> Path:
    """Where the references lie: the environment variable's folder, or the one by default."""
    return Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "posteriordb")


def missing() -> str | None:
    """Why nothing can be measured against the references, or None where they are there."""
    if folder().is_dir():
        return None
    return f"no reference posteriors at {folder()}: set {VARIABLE} to their folder"


@dataclass(frozen=True)
class Reference:
    """One posterior.

    Attributes:
        name: Its model file, without the ending.
    """

    name: str

    @property
    def path(self) -> Path:
        """Its model file."""
        return FILES / f"{self.name}.py"

    @cached_property
    def posterior(self) -> str:
        """The reference's name."""
        found = re.search(r'^POSTERIOR = "(.*)"', self.path.read_text(encoding="utf-8"), re.M)
        if found is None:
            raise ValueError(f"{self.path} names no POSTERIOR")
        return found[1]

    @property
    def data(self) -> dict[str, Any]:
        """Its data, as JSON has them."""
        return self._read("data.json")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Log evidence, moments and family optima."""
        return self._read("reference.json")

    def optimum(self, guide: str) -> tuple[float, float] | None:
        """The best ELBO of a guide's family and its standard error, nats; None if not known."""
        if guide not in OPTIMA:
            return None
        best = self.facts["family_optima"][OPTIMA[guide]]
        return best["elbo"], best["elbo_mcse"]

    def module(self) -> Any:
        """Its model file, run anew: another model object on every call."""
        spec = importlib.util.spec_from_file_location(f"posteriordb_{self.name}", self.path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{self.path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _read(self, file: str) -> dict[str, Any]:
        return json.loads((folder() / self.posterior / file).read_text(encoding="utf-8"))

"""What a bench runs: one cell for each model, guide and objective."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.version import __version__
from pyro_vi_kit.fitting import auto, plan, request
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.modelfile import model_files


@dataclass(frozen=True)
class Cell:
    """One fit to be made.

    Attributes:
        path: The model file.
        guide: The guide's name.
        objective: The objective's name.
        seed: Of the fit.
    """

    path: Path
    guide: str
    objective: str
    seed: int

    @property
    def model(self) -> str:
        """What results are filed under: the model file's name."""
        return self.path.stem

    @property
    def name(self) -> str:
        """The stem of the cell's files in the model's folder."""
        return f"{self.guide}-{self.objective}-seed{self.seed}"

    def settings(self, reference: str) -> str:
        """A hash of all that the result depends on.

        Args:
            reference: `reference_settings` of what it is compared with.
        """
        return _hash([reference, self.guide, self.objective, self.seed])


def enumerate_cells(
    models: Sequence[str | os.PathLike[str]],
    guide_names: Sequence[str],
    objective_names: Sequence[str],
    seed: int,
) -> list[Cell]:
    """All cells, model by model, guide by guide.

    Args:
        models: Model files, and folders of them.
        guide_names: Guides.
        objective_names: Objectives.
        seed: Of every fit.

    Raises:
        FileError: If a file does not exist.
        OptionError: If a name is unknown or none is given, or two files have one name.
    """
    for kind, given in (("guide", guide_names), ("objective", objective_names), ("model", models)):
        if not given:
            raise OptionError(f"no {kind} is given: name one or more")
    for guide in guide_names:
        if guide != guides.AUTO:
            guides.specify(guide)
    for objective in objective_names:
        objectives.make(objective)
    paths = model_files(models)
    by_stem: dict[str, Path] = {}
    for path in paths:
        if by_stem.setdefault(path.stem, path) != path:
            raise OptionError(
                f"{by_stem[path.stem]} and {path} would be filed under one name: rename one of them"
            )
    return [
        Cell(path, guide, objective, seed)
        for path in paths
        for guide in dict.fromkeys(guide_names)
        for objective in dict.fromkeys(objective_names)
    ]


def obstacle(density: Density, guide: str, objective: str) -> str | None:
    """Why a guide cannot be fitted to a model with an objective, as `fit` says it; None where it can.

    Args:
        density: The model.
        guide: The guide's name.
        objective: The objective's name.
    """
    try:
        asked = request.checked(density.model, objective, seed=0)
        if guide == guides.AUTO:
            auto.require_possible(asked)
        else:
            plan.require_possible(asked, guides.make(guide, density))
    except OptionError as error:
        return str(error)
    return None


def reference_settings(path: Path, options: dict[str, Any] | None) -> str:
    """A hash of all that a model's reference depends on.

    What the model file reads or imports is not looked at.

    Args:
        path: The model file.
        options: The sampler's; None where no reference is wanted.
    """
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return _hash([__version__, content, options])


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

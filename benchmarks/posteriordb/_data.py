"""Where the reference posteriors lie, and how the model files beside this one read their data."""

import json
import os
from pathlib import Path

import torch

from pyro_vi_kit.core.errors import FileError

VARIABLE = "PYRO_VI_KIT_POSTERIORDB"


def folder():
    """The folder of reference posteriors: the environment variable's, or the one by default."""
    repository = Path(__file__).resolve().parents[2]
    return Path(os.environ.get(VARIABLE) or repository.parent / "shared" / "posteriordb")


def load(posterior):
    """The data of one posterior, numbers as they are and lists as float64 tensors.

    float64 because some of these posteriors are so narrow that rounding the data moves them.
    """
    path = folder() / posterior / "data.json"
    if not path.is_file():
        raise FileError(
            f"no data for {posterior!r} at {path}: set {VARIABLE} to the folder that holds "
            "<posterior>/data.json and <posterior>/reference.json"
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in data.items()
    }

"""Variational inference for Pyro models: one call, fast, and honest about its quality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vi_kit.model import Model as Model

# Everything public and where it lives. Imported on first use (PEP 562), so that the command line
# answers `--help` without loading torch.
_HOME = {
    "Model": "pyro_vi_kit.model",
}

__version__ = "0.1.0"
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

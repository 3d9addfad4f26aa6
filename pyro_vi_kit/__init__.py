"""Variational inference for Pyro models: one call, fast, and honest about its quality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vi_kit import guides as guides
    from pyro_vi_kit import objectives as objectives
    from pyro_vi_kit.calibration import Calibration as Calibration
    from pyro_vi_kit.calibration import calibrate as calibrate
    from pyro_vi_kit.checks import check as check
    from pyro_vi_kit.comparison import compare as compare
    from pyro_vi_kit.errors import ViError as ViError
    from pyro_vi_kit.fitting import fit as fit
    from pyro_vi_kit.methods.epochs import Epochs as Epochs
    from pyro_vi_kit.model import Model as Model
    from pyro_vi_kit.posterior import Posterior as Posterior
    from pyro_vi_kit.posterior import load as load
    from pyro_vi_kit.sampling import nuts as nuts

# Everything public and where it lives. Imported on first use (PEP 562), so that the command line
# answers `--help` without loading torch.
_HOME = {
    "Calibration": "pyro_vi_kit.calibration",
    "Epochs": "pyro_vi_kit.methods.epochs",
    "Model": "pyro_vi_kit.model",
    "Posterior": "pyro_vi_kit.posterior",
    "ViError": "pyro_vi_kit.errors",
    "calibrate": "pyro_vi_kit.calibration",
    "check": "pyro_vi_kit.checks",
    "compare": "pyro_vi_kit.comparison",
    "fit": "pyro_vi_kit.fitting",
    "load": "pyro_vi_kit.posterior",
    "nuts": "pyro_vi_kit.sampling",
}
_PACKAGES = ("guides", "objectives")

__version__ = "0.1.0"
__all__ = [*_HOME, *_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

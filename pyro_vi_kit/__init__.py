"""Variational inference for Pyro models: one call, fast, and honest about its quality."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.core.version import __version__ as __version__

if TYPE_CHECKING:
    from pyro_vi_kit import guides as guides
    from pyro_vi_kit import objectives as objectives
    from pyro_vi_kit.core.errors import ViError as ViError
    from pyro_vi_kit.fitting.fit import fit as fit
    from pyro_vi_kit.model.checks import check as check
    from pyro_vi_kit.model.model import Model as Model
    from pyro_vi_kit.optimize.stochastic.epochs import Epochs as Epochs
    from pyro_vi_kit.posterior import Posterior as Posterior
    from pyro_vi_kit.posterior import load as load
    from pyro_vi_kit.validation.calibrate import Calibration as Calibration
    from pyro_vi_kit.validation.calibrate import calibrate as calibrate
    from pyro_vi_kit.validation.compare import compare as compare
    from pyro_vi_kit.validation.nuts import nuts as nuts

# Everything public and where it lives. Imported on first use (PEP 562), so that the command line
# answers `--help` without loading torch.
_HOME = {
    "Calibration": "pyro_vi_kit.validation.calibrate",
    "Epochs": "pyro_vi_kit.optimize.stochastic.epochs",
    "Model": "pyro_vi_kit.model.model",
    "Posterior": "pyro_vi_kit.posterior",
    "ViError": "pyro_vi_kit.core.errors",
    "calibrate": "pyro_vi_kit.validation.calibrate",
    "check": "pyro_vi_kit.model.checks",
    "compare": "pyro_vi_kit.validation.compare",
    "fit": "pyro_vi_kit.fitting.fit",
    "load": "pyro_vi_kit.posterior",
    "nuts": "pyro_vi_kit.validation.nuts",
}
_PACKAGES = ("guides", "objectives")

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

"""The smallest bulk effective sample size over all sites, by ArviZ, the same way for everybody."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np


def smallest(draws: Mapping[str, Any]) -> dict[str, float]:
    """Min bulk ESS and max R-hat of draws `{site: [chains, draws, ...]}`.

    Returns:
        ``ess``; ``rhat``, NaN for one chain; and the ``seconds`` that finding them took, which are
        nobody's sampling.
    """
    started = time.perf_counter()
    from pyro_vi_kit.core.export import Group, to_arviz
    from pyro_vi_kit.validation.nuts.report import diagnose

    groups = {"posterior": Group({name: np.asarray(value) for name, value in draws.items()})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = diagnose(to_arviz(groups))
    return {
        "ess": float(report.min_ess_bulk),
        "rhat": float(report.max_rhat),
        "seconds": time.perf_counter() - started,
    }

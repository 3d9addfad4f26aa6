"""What a fit gives: draws, quality, corrections, predictions, and the way out to ArviZ."""

from __future__ import annotations

from pyro_vi_kit.posterior.base import is_small
from pyro_vi_kit.posterior.posterior import Posterior, load

__all__ = ["Posterior", "is_small", "load"]

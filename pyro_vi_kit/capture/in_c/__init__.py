"""Graphs in plain C, compiled by the system's compiler: small work, in a microsecond or two."""

from __future__ import annotations

from pyro_vi_kit.capture.in_c.density import CDensity
from pyro_vi_kit.capture.in_c.expressions import RefusedError
from pyro_vi_kit.capture.in_c.library import CFunction
from pyro_vi_kit.capture.in_c.source import source_of

__all__ = ["CDensity", "CFunction", "RefusedError", "source_of"]

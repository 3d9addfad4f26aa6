"""Graphs in plain C, compiled by the system's compiler: small work, in a microsecond or two."""

from __future__ import annotations

from pyro_vi_kit.capture.in_c.library import CFunction
from pyro_vi_kit.capture.in_c.source import RefusedError, source_of

__all__ = ["CFunction", "RefusedError", "source_of"]

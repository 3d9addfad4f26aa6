"""Record a function of tensors once, and replay its operations without the Python around them."""

from __future__ import annotations

from pyro_vi_kit.capture.graph import Graph
from pyro_vi_kit.capture.in_c import CDensity
from pyro_vi_kit.capture.program import Program, capture, capture_holding
from pyro_vi_kit.capture.recorder import CaptureError, record
from pyro_vi_kit.capture.shared import SharedProgram

__all__ = [
    "CDensity",
    "CaptureError",
    "Graph",
    "Program",
    "SharedProgram",
    "capture",
    "capture_holding",
    "record",
]

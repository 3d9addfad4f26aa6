"""How a step is executed."""

from __future__ import annotations

from pyro_vi_kit.optimize.engines.base import Engine, Window
from pyro_vi_kit.optimize.engines.batches import Batch, Batches, BatchSource, StreamedBatches
from pyro_vi_kit.optimize.engines.captured import CapturedEngine
from pyro_vi_kit.optimize.engines.eager import EagerEngine, OptimizerFactory
from pyro_vi_kit.optimize.engines.pyro import PyroEngine

NAMES = ("auto", "captured", "compiled", "eager", "pyro")

__all__ = [
    "NAMES",
    "Batch",
    "BatchSource",
    "Batches",
    "CapturedEngine",
    "EagerEngine",
    "Engine",
    "OptimizerFactory",
    "PyroEngine",
    "StreamedBatches",
    "Window",
]

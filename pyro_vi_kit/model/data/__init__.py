"""Data that never fit in memory: rows of a `Dataset` or `DataLoader`, a batch at a time."""

from __future__ import annotations

from pyro_vi_kit.model.data.feed import Feed
from pyro_vi_kit.model.data.stream import Stream

__all__ = ["Feed", "Stream"]

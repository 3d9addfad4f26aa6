"""Fits beside a reference posterior: how wrong each is, and how much faster."""

from pyro_vi_kit.validation.compare.alignment import Paired, Reference, by_name, pair
from pyro_vi_kit.validation.compare.measures import error_table
from pyro_vi_kit.validation.compare.overview import format_overview, overview
from pyro_vi_kit.validation.compare.table import COLUMNS, OVERALL, compare, quality

__all__ = [
    "COLUMNS",
    "OVERALL",
    "Paired",
    "Reference",
    "by_name",
    "compare",
    "error_table",
    "format_overview",
    "overview",
    "pair",
    "quality",
]

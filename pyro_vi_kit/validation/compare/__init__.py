"""Fits beside a reference posterior: how wrong each is, and how much faster.

Draws are lined up by name (`alignment`), measured (`measures`), and told as a table (`table`,
`overview`). Whether the reference itself has converged is `nuts.report`'s to say.
"""

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

"""Many fits beside their references, one after another: models x guides x objectives."""

from pyro_vi_kit.validation.suite.cells import Cell, enumerate_cells, obstacle
from pyro_vi_kit.validation.suite.records import COLUMNS, collect, folder_for_results, write_table
from pyro_vi_kit.validation.suite.runner import Nuts, run
from pyro_vi_kit.validation.suite.table import format_results

__all__ = [
    "COLUMNS",
    "Cell",
    "Nuts",
    "collect",
    "enumerate_cells",
    "folder_for_results",
    "format_results",
    "obstacle",
    "run",
    "write_table",
]

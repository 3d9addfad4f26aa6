"""Many fits beside their references, one after another: models x guides x objectives.

`cells` says what is run and what is recorded of each, `runner` runs it, `table` puts it in words.
How fits and references are made and compared is elsewhere.
"""

from pyro_vi_kit.validation.suite.cells import (
    COLUMNS,
    Cell,
    collect,
    enumerate_cells,
    obstacle,
    write_table,
)
from pyro_vi_kit.validation.suite.runner import Nuts, load_models, run
from pyro_vi_kit.validation.suite.table import format_results

__all__ = [
    "COLUMNS",
    "Cell",
    "Nuts",
    "collect",
    "enumerate_cells",
    "format_results",
    "load_models",
    "obstacle",
    "run",
    "write_table",
]

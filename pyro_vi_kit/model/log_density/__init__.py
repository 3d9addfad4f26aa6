"""The model as a batched log density over unconstrained space."""

from pyro_vi_kit.model.log_density.density import Density
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.log_density.layout import Block
from pyro_vi_kit.model.log_density.recordings import Recordings
from pyro_vi_kit.model.log_density.row_independence import rows_apart
from pyro_vi_kit.model.log_density.structure import Parameter, Plate, Site, Structure
from pyro_vi_kit.model.log_density.terms import Terms

__all__ = [
    "Block",
    "Density",
    "Drawn",
    "Parameter",
    "Plate",
    "Recordings",
    "Site",
    "Structure",
    "Terms",
    "rows_apart",
]

"""The model as a batched log density over unconstrained space."""

from pyro_vi_kit.model.log_density.density import Density, Recordings
from pyro_vi_kit.model.log_density.dependence import rows_apart
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.log_density.structure import Block, Parameter, Plate, Site, Structure
from pyro_vi_kit.model.log_density.visits import Terms

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

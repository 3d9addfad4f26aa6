"""The model as a batched log density over unconstrained space."""

from pyro_vi_kit.density.apart import rows_apart
from pyro_vi_kit.density.density import Density
from pyro_vi_kit.density.drawn import Drawn
from pyro_vi_kit.density.layout import Block
from pyro_vi_kit.density.recordings import Recordings
from pyro_vi_kit.density.structure import Parameter, Plate, Site, Structure
from pyro_vi_kit.density.terms import Terms

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

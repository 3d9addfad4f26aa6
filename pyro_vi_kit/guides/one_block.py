"""Guides that hold all latents in one block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.model.log_density import Density


class OneBlock(ABC):
    """A configured guide of one family over all latents."""

    name: ClassVar[str]

    def build(self, density: Density) -> Guide:
        """The guide for this model; what is random in it, from torch's random state.

        Raises:
            OptionError: If the model has too many latents.
        """
        return Guide(self.name, density, {density.block: self.family(density.dim)})

    @abstractmethod
    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large.
        """

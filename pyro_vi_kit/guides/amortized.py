"""An encoder from each datum to the posterior of its own latents (Kingma & Welling 2014)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_vi_kit.density import Block, Density, Plate, Site
from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.guides.adaptor import Guide, encoder_inputs
from pyro_vi_kit.guides.affine_coupling import require_widths
from pyro_vi_kit.guides.families import DiagonalNormal, EncodedNormal, Family, Standardised
from pyro_vi_kit.guides.mean_field import require_positive


@dataclass(frozen=True)
class Amortized:
    """An encoder reads each datum and gives its latents independent normals.

    The model needs one data plate with latents inside it. What is observed in that plate is the
    encoder's input; latents outside it get independent normals of their own.

    Args:
        encoder: A module from `[B, F]` (the plate's observations, flattened) to `[B, 2 d]` (means,
            then log sds) or to a pair `[B, d]` (means, sds). It is copied. By default an MLP on
            standardised inputs.
        hidden: Widths of the default MLP.
        init_scale: Initial standard deviation of the global latents.

    Raises:
        OptionError: If an option is out of its range.
    """

    name: ClassVar[str] = "amortized"

    encoder: nn.Module | None = None
    hidden: tuple[int, ...] = (64,)
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)
        object.__setattr__(self, "hidden", require_widths(self.name, self.hidden))
        if self.encoder is not None and not isinstance(self.encoder, nn.Module):
            raise OptionError(
                f"{self.name}: encoder must be a torch.nn.Module, got {type(self.encoder).__name__}"
            )

    def build(self, density: Density) -> Guide:
        """The guide for this model; weights from torch's random state.

        Raises:
            OptionError: If the model has no data plate with latents, or several, or the encoder's
                output has the wrong shape.
        """
        plate = self._data_plate(density)
        inside = tuple(site for site in density.latents if plate in site.plates)
        outside = tuple(site for site in density.latents if plate not in site.plates)
        block = Block("local", inside, plate)
        inputs = encoder_inputs(density, block, density.observations())
        blocks: dict[Block, Family] = {}
        if outside:
            shared = Block("global", outside)
            blocks[shared] = DiagonalNormal(shared.dim, self.init_scale)
        blocks[block] = EncodedNormal(self._encoder(inputs, block.dim), block.dim)
        return Guide(self.name, density, blocks)

    def _data_plate(self, density: Density) -> Plate:
        around: dict[str, list[Site]] = {}
        for site in density.latents:
            for plate in site.plates:
                around.setdefault(plate.name, []).append(site)
        if not around:
            raise OptionError(
                "guide 'amortized' needs a data plate with latents inside it, and every latent of "
                f"this model is global ({', '.join(s.name for s in density.latents)}): use "
                "guide='full_rank' or guide='affine_coupling'"
            )
        nested = [s.name for sites in around.values() for s in sites if len(s.plates) > 1]
        if len(around) > 1 or nested:
            raise OptionError(
                "guide 'amortized' takes latents in one data plate; this model has them in "
                f"{', '.join(around)}: use guide='mean_field' or guide='full_rank'"
            )
        return density.structure.plates[next(iter(around))]

    def _encoder(self, inputs: Tensor, dim: int) -> nn.Module:
        """The encoder in the inputs' dtype, tried on two rows."""
        if self.encoder is None:
            return Standardised(inputs, self.hidden, 2 * dim).to(inputs.dtype)
        encoder = copy.deepcopy(self.encoder).to(inputs.dtype)
        shape = (min(2, len(inputs)), inputs.shape[-1])
        try:
            with torch.no_grad():
                output = encoder(inputs[: shape[0]])
        except Exception as error:
            raise OptionError(
                f"the encoder raised {type(error).__name__} on an input of shape {shape} (rows, "
                f"flattened observations): {error}"
            ) from error
        parts = output if isinstance(output, tuple) else (output,)
        expected = (shape[0], dim if isinstance(output, tuple) else 2 * dim)
        if any(tuple(part.shape) != expected for part in parts) or len(parts) > 2:
            raise OptionError(
                f"the encoder gave {[tuple(part.shape) for part in parts]} on {shape[0]} rows; it "
                f"must give one tensor ({shape[0]}, {2 * dim}) of means and log sds, or a pair of "
                f"({shape[0]}, {dim}) of means and sds"
            )
        return encoder

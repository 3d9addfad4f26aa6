"""The bound of data that were held out, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.log_density import Density, Plate
from pyro_vi_kit.objectives import Objective

_SEED = 20_141
_PARTICLES = 8
_DRAWS = 64
# Rows of a local plate at once, and numbers that draws of a global guide may make at once.
_ROWS = 2048
_NUMBERS = 4_000_000


class HeldOut(NamedTuple):
    """A bound on held-out rows: its mean and the standard error of that over rows, nats per row."""

    bound: float
    se: float


class Validation:
    """What a guide under training says of data held out, on the same noise at every call.

    With local latents it is the bound of each row, given its own latents; what is shared by all rows
    (the prior of globals, log q of them) does not count. Without, it is the mean over draws of q of the
    log likelihood of each row.

    Args:
        guide: The guide.
        objective: Its bound is taken row by row; for the ELBO, of at least 8 draws.
        args: The model's positional arguments on the data held out.

    Raises:
        OptionError: If the guide cannot say anything of these data.
    """

    def __init__(self, guide: Guide, objective: Objective, args: Sequence[Any]) -> None:
        if any(guide.table(block) is not None for block in guide.blocks):
            raise OptionError(
                "Epochs: validation= asks what the guide says of new rows, and this one stores its "
                "numbers row by row: use guide='amortized', or leave validation= out"
            )
        model = guide.density.model.with_args(*args)
        try:
            own = guide.density
            self._density = Density(
                model,
                dtype=own.dtype,
                device=own.device,
                drawn=own.drawn,
                init=own.initial(own.structure.plates),
            )
            self._guide = guide.moved_to(self._density)
        except Exception as error:
            raise OptionError(
                f"Epochs: the model cannot be run on validation= ({type(error).__name__}: {error}): "
                "give its positional arguments on the data held out, as a tuple"
            ) from error
        self._source = guide
        self._objective = objective
        self._local = [block.plate for block in self._guide.blocks if block.plate is not None]
        if not self._local and not self._density.observed:
            raise OptionError("Epochs: validation= needs a model that observes something")
        if not self._local and self._density.dim != guide.density.dim:
            raise OptionError(
                f"Epochs: validation= has {self._density.dim} latent numbers and the data "
                f"{guide.density.dim}: latents in a data plate say something of new rows with "
                "guide='amortized' only"
            )

    @torch.no_grad()
    def __call__(self, params: Mapping[str, Tensor]) -> HeldOut:
        """The bound at the guide's current parameters, and these of the model."""
        self._guide.load_state_dict(self._source.state_dict())
        with RandomStream(_SEED), isolated(self._density.dtype, self._density.device):
            rows = self._local_rows(params) if self._local else self._shared_rows(params)
        rows = rows.double()
        se = float(rows.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        return HeldOut(float(rows.mean()), se)

    def _local_rows(self, params: Mapping[str, Tensor]) -> Tensor:
        """The bound of each row, `[N]`; of several plates, one after the other."""
        multi = self._objective.multi_sample
        particles = (
            self._objective.particles if multi else max(_PARTICLES, self._objective.particles)
        )
        parts = []
        for plate in self._local:
            for start in range(0, plate.size, _ROWS):
                rows = torch.arange(start, min(start + _ROWS, plate.size))
                index = {plate.name: rows}
                draw = self._guide.draw(particles, index, share=multi)
                weights = self._objective.weights(self._guide, draw, Batch(index, params=params))
                parts.append(self._objective.look(weights.local[plate.name]))
        return torch.cat(parts)

    def _shared_rows(self, params: Mapping[str, Tensor]) -> Tensor:
        """The mean log likelihood of each row, `[N]`; of all data where they are in no plate."""
        size = max(1, sum(value.numel() for value in self._density.observed.values()))
        chunk = max(1, _NUMBERS // size)
        total: Any = 0.0
        for start in range(0, _DRAWS, chunk):
            z = self._guide.draw(min(chunk, _DRAWS - start)).z
            total = total + self._rows_of(self._density.log_likelihood(z, params))
        return total / _DRAWS

    def _rows_of(self, likelihood: Mapping[str, Tensor]) -> Tensor:
        """Add up over draws and sites, `[N]`, or `[1]` where the data have no plate in common."""
        plate = data_plate(self._density)
        total: Any = 0.0
        for value in likelihood.values():
            rows = value.sum(0)
            if plate is not None:
                rows = rows.movedim(plate.dim, 0).reshape(plate.size, -1).sum(-1)
            total = total + (rows if plate is not None else rows.sum().reshape(1))
        return total


def data_plate(density: Density) -> Plate | None:
    """The outermost plate around all that was observed; None where there is none."""
    sites = [density.structure.sites[name] for name in density.observed]
    plates = {site.plates[0] if site.plates else None for site in sites}
    return plates.pop() if len(plates) == 1 else None

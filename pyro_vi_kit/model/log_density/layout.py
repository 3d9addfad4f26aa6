"""How named unconstrained values lie in flat vectors: one block for all, or one row per datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pyro_vi_kit.model.log_density.structure import Plate, Site


@dataclass(frozen=True)
class Block:
    """Latent sites that share one distribution of the guide.

    Attributes:
        name: What the guide calls it.
        sites: Its latents, in the model's order.
        plate: None for a global block of `D` numbers; else the data plate, for rows of `d` numbers,
            one per datum.
    """

    name: str
    sites: tuple[Site, ...]
    plate: Plate | None = None

    @property
    def dim(self) -> int:
        """Numbers in the block: D for all, or d for each datum."""
        return sum(prod(self.rest(site)) for site in self.sites)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Split `[K, D]`, or `[K, B, d]`, into `{site: [K, *batch, *event]}`, unconstrained."""
        values, start = {}, 0
        for site in self.sites:
            rest = self.rest(site)
            size = prod(rest)
            part = flat[..., start : start + size].reshape(*flat.shape[:-1], *rest)
            if self.plate is not None:
                part = torch.movedim(part, 1, 1 + self.axis(site))
            values[site.name] = part
            start += size
        return values

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            if self.plate is None:
                parts.append(value.reshape(value.shape[0], -1))
            else:
                rows = torch.movedim(value, 1 + self.axis(site), 1)
                parts.append(rows.reshape(*rows.shape[:2], -1))
        return torch.cat(parts, -1)

    def labels(self) -> list[tuple[str, int]]:
        """Site name and position in the flattened site, for each number of the block."""
        return [(site.name, i) for site in self.sites for i in range(prod(self.rest(site)))]

    def axis(self, site: Site) -> int:
        """Where the data plate lies among the site's dims, counted from the left."""
        return len(site.batch_shape) + (self.plate.dim if self.plate is not None else 0)

    def rest(self, site: Site) -> tuple[int, ...]:
        """Unconstrained shape of a site in the block: of all of it, or of one datum's part."""
        shape = list(site.unconstrained_shape)
        if self.plate is not None:
            del shape[self.axis(site)]
        return tuple(shape)


def global_block(sites: Sequence[Site]) -> Block:
    """One block for all these latents."""
    return Block("latent", tuple(sites))

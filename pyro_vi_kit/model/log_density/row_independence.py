"""Whether the rows of data plates depend on each other given what lies outside of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density.density import Density
from pyro_vi_kit.model.log_density.layout import Block
from pyro_vi_kit.model.log_density.structure import Site

_SEED = 4096


@torch.no_grad()
def rows_apart(density: Density, blocks: Sequence[Block]) -> bool:
    """Whether latents of a plate's row enter the log joint in the terms of that row alone.

    It is tried at one point: every other row of a plate gets other latents, and nothing else may change.

    Args:
        density: The model.
        blocks: Those with a plate are looked at.
    """
    with RandomStream(_SEED):
        away = density.cast(torch.randn(1, density.dim, dtype=density.dtype, device="cpu"))
        flat = away if density.start is None else density.near_start(away)
        z = density.within(density.block.unpack(flat))
        before = density.terms(z)
        for block in blocks:
            if block.plate is None:
                continue
            after = density.terms(z | {site.name: _moved(z, block, site) for site in block.sites})
            if not _close(before.shared, after.shared):
                return False
            for plate, rows in before.local.items():
                kept = slice(1, None, 2) if plate == block.plate.name else slice(None)
                if not _close(rows[:, kept], after.local[plate][:, kept]):
                    return False
    return True


def _moved(z: dict[str, Tensor], block: Block, site: Site) -> Tensor:
    """A site's value with every other row changed."""
    value = z[site.name]
    rows = torch.movedim(value, 1 + block.axis(site), 0).clone()
    rows[::2] = rows[::2].roll(1, -1) if site.states else rows[::2] + 0.25
    return torch.movedim(rows, 0, 1 + block.axis(site))


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

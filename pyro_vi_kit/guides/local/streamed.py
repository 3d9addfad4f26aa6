"""Log densities of draws on streamed data: one pass over all batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.guides.pyro_guide import Draw, Guide

# Numbers that one evaluation may hold, as many as elsewhere.
_CHUNK_NUMBERS = 4_000_000


@torch.no_grad()
def weigh_all(
    guide: Guide,
    draw: Draw,
    params: Mapping[str, Tensor] | None,
    batches: Iterable[list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Log p(x, z) and log q(z) of these draws of the globals, `[S]` each, nats, on all data.

    Latents inside the data plate are drawn anew for each batch, from torch's global random state.

    Args:
        guide: The guide, of a streamed model.
        draw: S draws of it.
        params: Unconstrained learned parameters.
        batches: The data tensors of every row once; where a loader leaves out the last few, the others
            stand for them.
    """
    streamed: Any = guide.density.streamed
    draws = len(draw.shared)
    shared, rows_p, rows_q, seen = None, torch.zeros(()), torch.zeros(()), 0
    for data in batches:
        numbers = sum(tensor.numel() for tensor in data) + guide.density.dim
        size = max(1, _CHUNK_NUMBERS // numbers)
        parts = [
            _weigh(guide, _some(draw, slice(i, i + size)), params, data)
            for i in range(0, draws, size)
        ]
        shared, p, q = (torch.cat(column) for column in zip(*parts, strict=True))
        rows_p, rows_q, seen = rows_p + p, rows_q + q, seen + len(data[0])
    if shared is None:
        raise ValueError("no batches")
    scale = streamed.rows / seen
    return shared + scale * rows_p, draw.shared + scale * rows_q


def joined_draws(draws: Sequence[Draw]) -> Draw:
    """Draws of one guide as one."""
    return Draw(
        _by_name([draw.z for draw in draws]),
        torch.cat([draw.shared for draw in draws]),
        _by_name([draw.local for draw in draws]),
        _by_name([draw.flat for draw in draws]),
    )


def _by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _weigh(
    guide: Guide,
    draw: Draw,
    params: Mapping[str, Tensor] | None,
    data: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The shared term, and the sums over one batch's rows of log p and of log q, `[s]` each."""
    if any(block.plate for block in guide.blocks):
        draw = guide.draw(len(draw.shared), data=data, given=draw)
    terms = guide.density.terms(draw.z, params, data, jacobian=not guide.point)
    streamed: Any = guide.density.streamed
    shared, p = streamed.split(terms)
    q = sum((rows.sum(-1) for rows in draw.local.values()), torch.zeros_like(draw.shared))
    return shared, p, q


def _some(draw: Draw, part: slice) -> Draw:
    """Some of the draws."""
    return Draw(
        {name: value[part] for name, value in draw.z.items()},
        draw.shared[part],
        {name: value[part] for name, value in draw.local.items()},
        {name: value[part] for name, value in draw.flat.items()},
    )

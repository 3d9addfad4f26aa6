"""Numbers stored for each datum, moved row by row: a step costs what its minibatch costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.local.local import Table
from pyro_vi_kit.optimize.engines import adam
from pyro_vi_kit.optimize.engines.adam import AdamState

# Of a row's averages, by the number of its own steps t: the weight of the last iterate is
# (1 + eta) / (t + eta), so that about the last quarter of them counts (Shamir & Zhang 2013).
_ETA = 3.0


class RowState(NamedTuple):
    """Where some rows stand.

    Attributes:
        x: Their numbers, `[B, p]`.
        mean: Running mean of the gradient, `[B, p]`.
        square: Running mean of its square, `[B, p]`.
        updates: Of each row so far, `[B, 1]`.
        average: Running mean of `x`, `[B, p]`: what the guide shows.
    """

    x: Tensor
    mean: Tensor
    square: Tensor
    updates: Tensor
    average: Tensor


def update(state: RowState, gradient: Tensor, finite: Tensor, rate: float | Tensor) -> RowState:
    """The rows behind one Adam step; the same where the step is not ``finite``.

    Args:
        state: Before.
        gradient: Of the loss, `[B, p]`.
        finite: Whether to take the step, a boolean scalar.
        rate: Learning rate.
    """
    moved = adam.update(AdamState(*state[:4]), gradient, finite, rate)
    taken = finite.to(state.x.dtype)
    weight = taken * (1.0 + _ETA) / (moved.updates + _ETA)
    return RowState(*moved, torch.lerp(state.average, moved.x, weight))


class RowTable:
    """A guide's table with what Adam knows of each of its rows.

    The guide's own parameter holds the averages; the iterates are in here.

    Args:
        plate: The plate whose rows they are.
        table: The guide's table.

    Attributes:
        state: Of all rows.
    """

    def __init__(self, plate: str, table: Table) -> None:
        self.plate = plate
        self.table = table
        x = table.rows.detach().clone()
        zeros = torch.zeros_like
        self.state = RowState(x, zeros(x), zeros(x), zeros(x[:, :1]), table.rows.detach())

    def pick(self, index: Mapping[str, Tensor]) -> RowState:
        """These rows."""
        chosen = index[self.plate]
        return RowState(*(part.index_select(0, chosen) for part in self.state))

    def put(self, index: Mapping[str, Tensor], rows: RowState) -> None:
        """Write these rows back."""
        chosen = index[self.plate]
        for whole, part in zip(self.state, rows, strict=True):
            whole.index_copy_(0, chosen, part)


def tables_of(guide: Guide, plates: Sequence[str]) -> list[RowTable]:
    """The tables of a guide whose rows come in minibatches."""
    found = []
    for block in guide.blocks:
        table = guide.table(block)
        if table is not None and block.plate is not None and block.plate.name in plates:
            found.append(RowTable(block.plate.name, table))
    return found

"""Which rows of a data plate a step sees."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_kit.density import Plate
from pyro_vi_kit.errors import OptionError


class Batches:
    """Minibatches without replacement: each epoch is a fresh permutation.

    Draws from torch's global random state; enter a `runtime.RandomStream` around `next`.

    Args:
        plate: The data plate.
        size: B, rows of a minibatch.

    Raises:
        OptionError: If `size` is no number of rows.
    """

    def __init__(self, plate: Plate, size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= plate.size:
            raise OptionError(
                f"batch_size must be between 1 and the {plate.size} rows of plate {plate.name!r}, "
                f"got {size!r}"
            )
        self.plate = plate
        self.size = size
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def plates(self) -> list[str]:
        """The names of the plates."""
        return [self.plate.name]

    @property
    def epoch(self) -> int:
        """Steps in an epoch."""
        return self.plate.size // self.size

    def next(self) -> dict[str, Tensor]:
        """Indices `[B]` by plate.

        Rows that do not fill a minibatch are dropped for the epoch; the next permutation drops others.
        """
        if len(self._order) < self.size:
            self._order = torch.randperm(self.plate.size)
        chosen, self._order = self._order[: self.size], self._order[self.size :]
        return {self.plate.name: chosen}

    def state(self) -> dict[str, Tensor]:
        """The rows that are left of this epoch, in order, by plate."""
        return {self.plate.name: self._order.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        self._order = state[self.plate.name].clone()

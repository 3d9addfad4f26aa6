"""Which rows of a data plate a step sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vi_kit.density import Plate
from pyro_vi_kit.errors import OptionError

_CPU = torch.device("cpu")


class Batches:
    """Minibatches without replacement: each epoch is a fresh permutation.

    Draws from torch's global random state; enter a `runtime.RandomStream` around `next`.

    Args:
        sizes: B, rows of a minibatch, for each plate. An epoch is one of the first plate.
        device: Where indices are wanted. They are drawn on the CPU, so that they are the same on all.

    Raises:
        OptionError: If a size is no number of rows.
    """

    def __init__(self, sizes: Mapping[Plate, int], device: torch.device = _CPU) -> None:
        for plate, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not whole or not 1 <= size <= plate.size:
                raise OptionError(
                    f"batch_size must be between 1 and the {plate.size} rows of plate "
                    f"{plate.name!r}, got {size!r}"
                )
        self.sizes = {plate.name: size for plate, size in sizes.items()}
        self._rows = {plate.name: plate.size for plate in sizes}
        self._device = device
        self._order = {name: torch.empty(0, dtype=torch.long) for name in self.sizes}

    @property
    def plates(self) -> list[str]:
        """The names of the plates."""
        return list(self.sizes)

    @property
    def epoch(self) -> int:
        """Steps in an epoch."""
        first = self.plates[0]
        return self._rows[first] // self.sizes[first]

    @property
    def share(self) -> float:
        """The share of all rows that a step sees."""
        first = self.plates[0]
        return self.sizes[first] / self._rows[first]

    def next(self) -> dict[str, Tensor]:
        """Indices `[B]` by plate.

        Rows that do not fill a minibatch are dropped for the epoch; the next permutation drops others.
        """
        chosen = {}
        for name, size in self.sizes.items():
            if len(self._order[name]) < size:
                self._order[name] = self._shuffled(name)
            chosen[name], self._order[name] = self._order[name].split(
                [size, len(self._order[name]) - size]
            )
        return chosen

    def example(self) -> dict[str, Tensor]:
        """Rows of the right number, which count for nothing."""
        return {name: self._shuffled(name)[:size] for name, size in self.sizes.items()}

    def _shuffled(self, name: str) -> Tensor:
        return torch.randperm(self._rows[name], device="cpu").to(self._device)

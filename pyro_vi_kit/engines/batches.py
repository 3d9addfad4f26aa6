"""Which rows of the data a step sees."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.density import Plate
from pyro_vi_kit.errors import OptionError


class Batch(NamedTuple):
    """What one step sees of the data.

    Attributes:
        index: Rows `[B]` by plate, of data in memory.
        data: Tensors in the place of the density's own, where data are streamed.
    """

    index: dict[str, Tensor]  # pyright: ignore[reportIncompatibleMethodOverride]
    data: list[Tensor] | None = None


class BatchSource(Protocol):
    """Where the steps of a fit have their batches from.

    Attributes:
        plate: The data plate.
        size: B, rows of a batch.
    """

    plate: Plate
    size: int

    @property
    def per_epoch(self) -> int:
        """Batches in which all rows are seen once, but for those that fill none."""
        ...

    def next(self) -> Batch:
        """The next batch."""
        ...

    def some(self) -> Batch:
        """Any batch, the order of `next` left alone; from torch's global random state."""
        ...


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
    def per_epoch(self) -> int:
        """See `BatchSource.per_epoch`."""
        return self.plate.size // self.size

    def next(self) -> Batch:
        """Indices `[B]` by plate.

        Rows that do not fill a minibatch are dropped for the epoch; the next permutation drops others.
        """
        if len(self._order) < self.size:
            self._order = torch.randperm(self.plate.size)
        chosen, self._order = self._order[: self.size], self._order[self.size :]
        return Batch({self.plate.name: chosen})

    def some(self) -> Batch:
        """See `BatchSource.some`."""
        return Batch({self.plate.name: torch.randperm(self.plate.size)[: self.size]})

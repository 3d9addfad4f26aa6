"""Which rows of the data a step sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.model.log_density import Plate

_CPU = torch.device("cpu")


class BatchSource(Protocol):
    """Where the steps of a fit have their batches from."""

    @property
    def plates(self) -> list[str]:
        """The plates whose rows batches index, in the order of `Batch.index`."""
        ...

    @property
    def epoch(self) -> int:
        """Batches in which all rows are seen once, but for those that fill none."""
        ...

    @property
    def share(self) -> float:
        """The share of all rows that a batch has."""
        ...

    def next(self) -> Batch:
        """The next batch."""
        ...

    def example(self) -> Batch:
        """Any batch, the order of `next` left alone; from torch's global random state."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it stands, as tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        ...


class Batches:
    """Minibatches without replacement: each epoch is a fresh permutation.

    Draws from torch's global random state; enter a `runtime.RandomStream` around `next`.

    Args:
        sizes: B, rows of a minibatch, for each plate. An epoch is one of the first plate.
        device: Where indices are wanted. They are drawn on the CPU, so that they are the same on all.

    Raises:
        OptionError: If a size is no number of rows.
    """

    def __init__(self, sizes: Mapping[Plate, int], *, device: torch.device = _CPU) -> None:
        for plate, size in sizes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not whole or not 1 <= size <= plate.size:
                raise OptionError(
                    f"batch_size must be between 1 and the {plate.size} rows of plate "
                    f"{plate.name!r}, got {told(size)}"
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

    def next(self) -> Batch:
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
        return Batch(chosen)

    def example(self) -> Batch:
        """See `BatchSource.example`."""
        return Batch({name: self._shuffled(name)[:size] for name, size in self.sizes.items()})

    def state(self) -> dict[str, Tensor]:
        """The rows that are left of this epoch, in order, by plate."""
        return {name: order.clone() for name, order in self._order.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self._order = {name: state[name].clone().to(self._device) for name in self.sizes}

    def _shuffled(self, name: str) -> Tensor:
        return torch.randperm(self._rows[name], device="cpu").to(self._device)

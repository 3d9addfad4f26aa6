"""Which rows of the data a step sees: of data in memory, or of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.model.data import Stream
from pyro_vi_kit.model.log_density import Density, Plate
from pyro_vi_kit.model.log_density.streamed import Streamed

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


# Batches that one look at the bound reads at the most.
_LOOK = 2_000


class StreamedBatches:
    """Batches of a stream for ever, and all of them once.

    Args:
        density: The density of a streamed model.
        size: B, rows of a batch.
        seed: Of the order of rows.

    Attributes:
        plate: The data plate, of N rows.
        size: B.
        feed: Where batches come from; its ``position`` is all that its state is.
    """

    def __init__(self, density: Density, size: int, seed: int) -> None:
        self._stream, self._streamed = streamed_parts(density)
        self._density = density
        found = density.structure.plates[self._streamed.plate]
        self.plate = Plate(found.name, found.dim, self._streamed.rows)
        self.size = size
        self.feed = self._stream.feed(size, seed_of(seed, "rows"), density.dtype)
        self._first: list[Tensor] | None = None
        self._evaluated: list[Tensor] | None = None

    @property
    def plates(self) -> list[str]:
        """See `BatchSource.plates`: none, since rows come with their data."""
        return []

    @property
    def epoch(self) -> int:
        """See `BatchSource.epoch`."""
        return self.feed.per_epoch

    @property
    def share(self) -> float:
        """See `BatchSource.share`."""
        return self.size / self.plate.size

    def state(self) -> dict[str, Any]:
        """See `BatchSource.state`."""
        return {"position": list(self.feed.position)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `BatchSource.restore`."""
        self.feed.go_to(*state["position"])

    def next(self) -> Batch:
        """See `BatchSource.next`."""
        return Batch({}, self._completed(self.feed.next()))

    def example(self) -> Batch:
        """Rows of one batch in another order: other data of the same shape, read once."""
        if self._first is None:
            self._first = self._stream.sample(self.size, self.feed.seed, self._density.dtype)
            # A loader's first batches may have fewer rows than a full one.
            rows = torch.arange(self.size) % len(self._first[0])
            self._first = [tensor[rows] for tensor in self._first]
        order = torch.randperm(self.size)
        return Batch({}, self._completed([tensor[order] for tensor in self._first]))

    def all(self) -> Iterator[list[Tensor]]:
        """The data tensors of every row once, the last batch as short as it is."""
        return self._density.batches(self.size)

    def looked_at(self) -> Iterator[list[Tensor]]:
        """The data tensors by which a bound is judged, the same at every call: of all rows.

        Of more than 2,000 batches they are so many at random, and stand for the others.
        """
        if self.epoch <= _LOOK:
            yield from self.all()
            return
        dtype = self._density.dtype
        feed = self._stream.feed(self.size, seed_of(self.feed.seed, "looks"), dtype)
        for _ in range(_LOOK):
            yield self._completed(feed.next())
        feed.close()

    def evaluated(self, rows: int) -> list[Tensor]:
        """The same rows at every call, so many at random, as data tensors."""
        if self._evaluated is None:
            batch = self._stream.sample(rows, seed_of(self.feed.seed, "looks"), self._density.dtype)
            self._evaluated = self._completed(batch)
        return self._evaluated

    def close(self) -> None:
        """Let go of threads and workers."""
        self.feed.close()

    def _completed(self, batch: list[Tensor]) -> list[Tensor]:
        return self._streamed.completed(batch, self._density.data)


def streamed_parts(density: Density) -> tuple[Stream, Streamed]:
    """The stream of a streamed model, and how its batches stand for all data."""
    stream, streamed = density.model.stream, density.streamed
    if stream is None or streamed is None:
        raise ValueError("the model is not streamed")
    return stream, streamed

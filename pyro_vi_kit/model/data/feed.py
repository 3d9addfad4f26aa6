"""Batches for ever: reshuffled each epoch, slow ones read while the last one is worked on."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.data.layout import Layout, len_of
from pyro_vi_kit.model.data.order import Order, mix
from pyro_vi_kit.model.data.sources import Batches, Rows

# Seconds that reading a batch takes where it is slow: the fastest of so many.
_SLOW = 0.002
_LOOKS = 3


class Position(NamedTuple):
    """Where a feed stands, and all that it needs to go on there.

    Attributes:
        epoch: Which one, from 0.
        batch: Batches of it that were handed out.
    """

    epoch: int
    batch: int


class Feed(ABC):
    """Batches of one size, without end; rows that do not fill one are dropped for the epoch.

    Args:
        rows: N.
        layout: What a batch holds.
        size: B, rows of a batch.
        seed: The same seed gives the same batches.
        dtype: Precision of floating tensors.
    """

    def __init__(self, rows: int, layout: Layout, size: int, seed: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.size = size
        self.seed = seed
        self.dtype = dtype
        self._layout = layout
        self._position = Position(0, 0)

    @property
    def per_epoch(self) -> int:
        """Full batches in an epoch, at least 1."""
        return max(1, self.rows // self.size)

    @property
    def position(self) -> Position:
        """Where it stands."""
        return self._position

    def go_to(self, epoch: int, batch: int) -> None:
        """Go on from a position, as if so many batches of that epoch had been handed out."""
        self.close()
        self._position = Position(epoch, batch)

    @abstractmethod
    def next(self) -> list[Tensor]:
        """The tensors of the next batch, B rows each."""

    @abstractmethod
    def close(self) -> None:
        """Let go of threads and workers; the feed can still be used."""


class RowFeed(Feed):
    """Batches of a dataset, in an order of the feed's own.

    Where reading takes milliseconds, a thread reads the next batch meanwhile, unless the dataset draws
    random numbers. What is read faster is not worth the handing over.

    Args:
        source: The dataset's rows.
        *arguments: Those of `Feed` behind ``rows``.
    """

    def __init__(self, source: Rows, *arguments: Any) -> None:
        super().__init__(source.rows, *arguments)
        self._source = source
        self._reads, self._fastest = 0, math.inf
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: Future[list[Tensor]] | None = None
        self._order: tuple[int, Order] | None = None

    def next(self) -> list[Tensor]:
        """See `Feed.next`."""
        at = self._position
        if self._ahead is None:
            started = time.perf_counter()
            batch = self._read(at, self._source.draws is not False)
            self._reads += 1
            self._fastest = min(self._fastest, time.perf_counter() - started)
        else:
            batch, self._ahead = self._ahead.result(), None
        last = at.batch + 1 >= self.per_epoch
        self._position = Position(at.epoch + 1, 0) if last else Position(at.epoch, at.batch + 1)
        if self._reads >= _LOOKS and self._fastest > _SLOW and self._source.draws is False:
            self._thread = self._thread or ThreadPoolExecutor(1, "pyro_vi_kit_feed")
            self._ahead = self._thread.submit(self._read, self._position)
        return batch

    def close(self) -> None:
        """See `Feed.close`."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead, self._thread = None, None

    def _read(self, at: Position, seeded: bool = False) -> list[Tensor]:
        """The batch at a position; in another thread nothing may touch torch's random state."""
        rows = self._rows_at(at)
        if not seeded:
            return self._layout.tensors(self._source.fetch(rows), self.dtype)
        seed = mix(mix(self.seed, at.epoch), at.batch) >> 1
        return self._layout.tensors(self._source.fetch_seeded(rows, seed), self.dtype)

    def _rows_at(self, at: Position) -> Any:
        if self._order is None or self._order[0] != at.epoch:
            self._order = (at.epoch, Order(self.rows, self.seed, at.epoch))
        start = at.batch * self.size
        return self._order[1].rows_at(start, start + self.size)


class LoaderFeed(Feed):
    """Batches of a loader, in its own order; when it ends, it starts again.

    Args:
        source: The loader's batches.
        *arguments: Those of `Feed` behind ``rows``.
    """

    def __init__(self, source: Batches, *arguments: Any) -> None:
        super().__init__(source.rows, *arguments)
        self._source = source
        self._batches: Iterator[list[Tensor]] | None = None

    def next(self) -> list[Tensor]:
        """See `Feed.next`.

        Raises:
            ModelError: If an epoch has no full batch.
        """
        if self._batches is None:
            self._batches = self._full_batches()
            for _ in range(self._position.batch):
                next(self._batches, None)
        batch = next(self._batches, None)
        if batch is None:
            self._position = Position(self._position.epoch + 1, 0)
            self._batches = self._full_batches()
            batch = next(self._batches, None)
        if batch is None:
            raise ModelError(
                f"an epoch of the loader has no batch of {self.size} rows, and steps see batches of "
                "one size: give the loader a batch_size of at most its rows"
            )
        self._position = Position(self._position.epoch, self._position.batch + 1)
        return batch

    def close(self) -> None:
        """See `Feed.close`."""
        self._batches = None

    def _full_batches(self) -> Iterator[list[Tensor]]:
        for batch in self._source.epoch(self.seed, self._position.epoch):
            tensors = self._layout.tensors(batch, self.dtype)
            if len_of(tensors) == self.size:
                yield tensors

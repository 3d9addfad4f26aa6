"""A `Dataset` or `DataLoader` as the data of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vi_kit.core.errors import ModelError, OptionError, told
from pyro_vi_kit.model.data.feed import Feed, LoaderFeed, RowFeed
from pyro_vi_kit.model.data.layout import Arguments, Layout, joined, len_of
from pyro_vi_kit.model.data.sources import Batches, Rows

# Rows that show what a dataset's batches hold.
_EXAMPLE = 256
# A batch of a dataset that nobody gave a size for holds about so many numbers.
_NUMBERS = 200_000
_SEED = 1_234_567


class Stream:
    """Rows of a dataset or loader, a batch at a time. Nothing is read before it is asked for.

    Args:
        source: A map-style dataset, or a loader of either style. A batch is what `default_collate`
            makes of rows; a dataset may give whole batches, see `sources.Rows`.
        rows: N, for a loader that cannot say it.

    Attributes:
        rows: N.
        batch_size: Rows of a batch, where a loader says it.

    Raises:
        ModelError: If N is not known, or is none.
    """

    def __init__(self, source: Dataset[Any] | DataLoader[Any], rows: int | None = None) -> None:
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ModelError(f"rows= must be the number of all rows, at least 1, got {told(rows)}")
        if isinstance(source, DataLoader):
            self.source: Rows | Batches = Batches(source, rows)
        else:
            self.source = Rows(source)
            if rows not in (None, self.source.rows):
                raise ModelError(
                    f"rows={rows} does not agree with the dataset's length, {self.source.rows}: leave "
                    "rows= out"
                )
        self.rows: int = self.source.rows

    @functools.cached_property
    def _example(self) -> tuple[Layout, list[Tensor]]:
        """What batches hold, and the first rows."""
        if isinstance(self.source, Rows):
            batch = self.source.fetch_seeded(np.arange(min(_EXAMPLE, self.rows)), _SEED)
        else:
            batch = next(self.source.epoch(_SEED, 0), None)
            if batch is None:
                raise ModelError("the loader gives no batch: its dataset or sampler has no rows")
        layout = Layout(batch)
        return layout, layout.tensors(batch)

    @property
    def layout(self) -> Layout:
        """What batches hold."""
        return self._example[0]

    @property
    def batch_size(self) -> int | None:
        """Rows of a loader's batches; None for a dataset."""
        if isinstance(self.source, Rows):
            return None
        return self.source.batch_size or self.layout.rows

    @property
    def numbers(self) -> int:
        """Numbers in one row."""
        return max(1, sum(t[0].numel() for t in self._example[1]))

    @property
    def tensors(self) -> int:
        """Tensors in one batch."""
        return len(self._example[1])

    def example(self) -> Arguments:
        """Positional and keyword arguments that hold the first rows, or a loader's first batch."""
        layout, tensors = self._example
        return layout.arguments(tensors)

    def size_for(self, batch_size: int | None) -> int:
        """B for a fit that asks for this batch size, or for none.

        Raises:
            OptionError: If it has more rows than there are, or is not the loader's.
        """
        own = self.batch_size
        if own is not None:
            if batch_size not in (None, own):
                raise OptionError(
                    f"batch_size={batch_size} does not agree with the loader's {own}: leave batch_size= "
                    "out, or give the loader another"
                )
            return own
        if batch_size is None:
            power = 2 ** int(np.log2(_NUMBERS / self.numbers)) if self.numbers < _NUMBERS else 1
            return min(self.rows, max(64, min(4096, power)))
        if batch_size > self.rows:
            raise OptionError(
                f"batch_size must be between 1 and the {self.rows} rows of the dataset, got "
                f"{batch_size}"
            )
        return batch_size

    def feed(self, size: int, seed: int, dtype: torch.dtype) -> Feed:
        """Batches for ever; see `Feed`."""
        arguments = (self.layout, size, seed, dtype)
        if isinstance(self.source, Rows):
            return RowFeed(self.source, *arguments)
        return LoaderFeed(self.source, *arguments)

    def sample(self, rows: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """About this many rows at random, `[rows, ...]` each; a loader's first batches."""
        rows = min(rows, self.rows)
        if isinstance(self.source, Rows):
            return self.feed(rows, seed, dtype).next()
        batches: list[list[Tensor]] = []
        for batch in self.source.epoch(seed, 0):
            batches.append(self.layout.tensors(batch, dtype))
            if sum(map(len_of, batches)) >= rows:
                break
        return joined(batches)

    def all_batches(self, size: int, dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """Every row once: of a dataset in its own order, a loader's batches as they come.

        Args:
            size: Rows of a dataset's batches; the last may have fewer.
            dtype: Precision of floating tensors.

        Raises:
            ModelError: If a loader gives fewer rows than it, or the user, says.
        """
        if isinstance(self.source, Rows):
            for start in range(0, self.rows, size):
                rows = np.arange(start, min(start + size, self.rows))
                yield self.layout.tensors(self.source.fetch_seeded(rows, _SEED + start), dtype)
            return
        seen = 0
        for batch in self.source.epoch(_SEED, 0):
            tensors = self.layout.tensors(batch, dtype)
            tensors = [tensor[: self.rows - seen] for tensor in tensors]
            seen += len_of(tensors)
            yield tensors
            if seen >= self.rows:
                return
        if not seen or (seen < self.rows and not self.source.drops_last):
            raise ModelError(
                f"the loader gave {seen} rows where {self.rows} were announced, and bounds are scaled "
                "to all rows: correct rows=, or the dataset's length"
            )

"""Where batches come from: rows of a `Dataset` by number, or whatever a `DataLoader` gives next."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.data.order import mix

_PROBE = 4


class Rows:
    """Rows of a map-style dataset, by number.

    Whole batches are taken where the dataset can give them: ``__getitems__(list of row numbers)`` that
    returns a batch (a tuple, dict, array or tensor), or ``__getitem__`` of an array of row numbers,
    which is compared with single rows first. Otherwise rows are fetched one by one, or as the list that
    ``__getitems__`` returns in torch's own protocol, and collated.

    Args:
        dataset: The dataset.

    Raises:
        ModelError: If it has no length, or no rows.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset):
            raise ModelError(
                f"{type(dataset).__name__} is iterable, and says nothing of batches: wrap it, "
                "vi.Model(fn, torch.utils.data.DataLoader(dataset, batch_size=1024), rows=N)"
            )
        self.dataset: Any = dataset
        self.rows: int = _length(dataset) or 0
        if not self.rows:
            raise ModelError(
                f"{type(dataset).__name__} has no rows: give the dataset a __len__ of at least 1"
            )
        self._whole: bool | None = None
        # Whether fetching draws from torch's global random state, as augmentation does; None before
        # the first batch.
        self.draws: bool | None = None

    def fetch(self, index: np.ndarray) -> Any:
        """These rows as one batch, uncast."""
        many = getattr(self.dataset, "__getitems__", None)
        if callable(many):
            found = many(index.tolist())
            return default_collate(found) if isinstance(found, list) else found
        if self._whole is None:
            self._whole = self._takes_arrays()
        return self.dataset[index] if self._whole else self._one_by_one(index)

    def fetch_seeded(self, index: np.ndarray, seed: int) -> Any:
        """The same, with this seed for what the dataset draws; the first batch tells whether it does."""
        if self.draws is False:
            return self.fetch(index)
        with RandomStream(seed):
            before = torch.get_rng_state()
            batch = self.fetch(index)
            self.draws = self.draws or not torch.equal(before, torch.get_rng_state())
        return batch

    def _one_by_one(self, index: np.ndarray) -> Any:
        return default_collate([self.dataset[i] for i in index.tolist()])

    def _takes_arrays(self) -> bool:
        """Whether an array of row numbers gives what its rows give one by one."""
        some = np.unique(np.linspace(0, self.rows - 1, _PROBE).astype(np.int64))[::-1].copy()
        try:
            with warnings.catch_warnings():
                # Rows of a read-only array are read here, and not written to.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                whole, single = self.dataset[some], self._one_by_one(some)
        except Exception:  # noqa: BLE001  whatever a dataset raises on an array, single rows may do
            return False
        one, other = tree_flatten(whole)[0], tree_flatten(single)[0]
        same_nest = type(whole) is type(single) or isinstance(whole, tuple)
        return same_nest and len(one) == len(other) and all(map(_equal, one, other))


class Batches:
    """The batches of a loader, its own sampler deciding which rows come when.

    Args:
        loader: The loader.
        rows: N, where the loader cannot say it.

    Raises:
        ModelError: If N is not known.
    """

    def __init__(self, loader: DataLoader[Any], rows: int | None) -> None:
        self.loader = loader
        self.rows: int = (_rows_of(loader) if rows is None else rows) or 0
        if not self.rows:
            raise ModelError(
                "the loader has no length, and a minibatch is scaled by the number of all rows: give "
                "it, vi.Model(fn, loader, rows=N)"
            )
        self.batch_size: int | None = loader.batch_size
        if self.batch_size is None:
            self.batch_size = getattr(loader.batch_sampler, "batch_size", None)
        self.drops_last = bool(loader.drop_last) or bool(
            getattr(loader.batch_sampler, "drop_last", False)
        )

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]:
        """The batches of one epoch, uncast; the same ones for the same seed and epoch.

        Samplers draw from the loader's generator, or from torch's global state. Both are set for the
        time of a draw, and are as the user left them afterwards.
        """
        stream = RandomStream(mix(seed, epoch) >> 1)
        generator = _Generator(self.loader.generator, mix(seed, epoch) >> 1)
        with stream, generator.lent():
            batches = iter(self.loader)
        while True:
            with stream, generator.lent():
                batch = next(batches, self)
            if batch is self:
                return
            yield batch


class _Generator:
    """A user's generator with a state of ours while it is lent."""

    def __init__(self, generator: torch.Generator | None, seed: int) -> None:
        self._generator = generator
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        if self._generator is None:
            yield
            return
        outer = self._generator.get_state()
        self._generator.set_state(self._state)
        try:
            yield
        finally:
            self._state = self._generator.get_state()
            self._generator.set_state(outer)


def _rows_of(loader: DataLoader[Any]) -> int | None:
    """Rows of an epoch: as many as the loader's sampler draws."""
    if not isinstance(loader.dataset, IterableDataset) and isinstance(
        loader.batch_sampler, BatchSampler
    ):
        return _length(loader.sampler)
    return _length(loader.dataset)


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def _equal(one: Any, other: Any) -> bool:
    try:
        one, other = torch.as_tensor(np.asarray(one)), torch.as_tensor(np.asarray(other))
        return one.shape == other.shape and torch.equal(one.to(other.dtype), other)
    except (TypeError, ValueError, RuntimeError):
        return False

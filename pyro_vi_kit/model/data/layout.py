"""What one batch holds: the arguments that it stands for, and their tensors as a flat list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vi_kit.core.errors import ModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(batch: Any) -> Arguments:
    """A tuple or list as positional arguments, a dict as keyword arguments, a tensor as the only one."""
    if isinstance(batch, Mapping):
        return (), {str(name): batch[name] for name in sorted(batch)}
    if isinstance(batch, list | tuple):
        return tuple(batch), {}
    return (batch,), {}


class Layout:
    """The nest that every batch has, as the first one showed it.

    Args:
        batch: An example.

    Raises:
        ModelError: If it holds anything but tensors of one row per datum.
    """

    def __init__(self, batch: Any) -> None:
        leaves, self._spec = tree_flatten(arguments_of(batch))
        # A plain tuple of tensors, which is what there mostly is, need not be taken apart each time.
        self._count = len(leaves)
        self._flat = isinstance(batch, list | tuple) and all(
            isinstance(part, Tensor | np.ndarray) for part in batch
        )
        if not leaves:
            raise ModelError("a batch of the stream is empty: its dataset gives no tensor per row")
        self.rows = len_of([_tensor(leaf) for leaf in leaves])

    def tensors(self, batch: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The tensors of a batch, in the order in which the model's arguments hold them.

        Contiguous, no two on the same memory; floating ones in ``dtype``.

        Raises:
            ModelError: If the batch is nested in another way than the first.
        """
        if self._flat and isinstance(batch, tuple) and len(batch) == self._count:
            leaves, spec = list(batch), self._spec
        else:
            leaves, spec = tree_flatten(arguments_of(batch))
        if spec != self._spec:
            raise ModelError(
                "a batch of the stream holds something else than the first: every row must give the "
                "same tensors, in the same order or under the same names"
            )
        seen: set[int] = set()
        tensors = []
        for leaf in leaves:
            tensor = _tensor(leaf)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            tensor = tensor.contiguous()
            if tensor.data_ptr() in seen:
                tensor = tensor.clone()
            seen.add(tensor.data_ptr())
            tensors.append(tensor)
        return tensors

    def arguments(self, tensors: list[Tensor]) -> Arguments:
        """The inverse of `tensors`: positional and keyword arguments."""
        return tree_unflatten(tensors, self._spec)


def len_of(tensors: list[Tensor]) -> int:
    """Rows of a batch.

    Raises:
        ModelError: If its tensors do not have one row per datum each.
    """
    lengths = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(lengths) != 1 or None in lengths:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ModelError(
            f"a batch of the stream holds tensors of shapes {shapes}: each must have one row per "
            "datum; give what is the same for all data as keyword arguments, kwargs={...}"
        )
    return int(lengths.pop() or 0)


def joined(batches: list[list[Tensor]]) -> list[Tensor]:
    """Batches one after another as one, tensor by tensor."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        plain = np.asarray(leaf)
        return torch.from_numpy(plain if _in_memory(plain) else plain.copy())
    raise ModelError(
        f"a batch of the stream holds a {type(leaf).__name__}: a model is called with tensors; leave "
        "it out of what the dataset returns, or turn it into numbers there"
    )


def _in_memory(array: np.ndarray) -> bool:
    """Whether an array is memory of the process that torch may have; a part of a file is not."""
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return array.flags.writeable and (root.base is None or isinstance(root.base, Tensor))

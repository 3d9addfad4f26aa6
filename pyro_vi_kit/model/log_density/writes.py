"""Whether a model writes into tensors that are older than its run: its arguments, its data, a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pyro_vi_kit.core.work import Watcher


class Undone(Watcher):
    """Undoes what is written into tensors that are older than the ``with`` block.

    Attributes:
        found: Whether there was such a write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self._made: dict[int, StorageWeakRef] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for target in _written(func, args, kwargs):
            storage = target.untyped_storage()
            if storage._cdata not in self._made and storage._cdata not in self._before:
                self.found = True
                whole = target.as_strided((storage.nbytes() // target.element_size(),), (1,), 0)
                self._before[storage._cdata] = (whole, whole.clone())
        given = {t.untyped_storage()._cdata for t in _tensors((args, tuple(kwargs.values())))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # else it is a view
                self._made.setdefault(storage._cdata, StorageWeakRef(storage))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for whole, before in self._before.values():
                whole.copy_(before)


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation writes numbers into."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(
                args[position] if position < len(args) else kwargs.get(argument.name)
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)

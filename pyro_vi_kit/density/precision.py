"""One precision and one device for all that a model computes, data that it closes over included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Precision(TorchFunctionMode):
    """Casts floating tensors of another precision, and moves those elsewhere, as operations meet them.

    A model's arguments and parameters are cast beforehand; this is for what it closes over. torch
    refuses matrix products of mixed precision, and lets a float32 vector win over a float64 number.

    Args:
        dtype: The precision.
        device: The device.

    Attributes:
        met: Whether there was anything to cast.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.met = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not _writes(getattr(func, "__name__", ""), kwargs):
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            strange = value.dtype != self.dtype and value.is_floating_point()
            if not strange and value.device == self.device:
                return value
            self.met = True
            return value.to(self.device, self.dtype if strange else value.dtype)
        if type(value) in (list, tuple):
            return type(value)(self._cast(part) for part in value)
        return value


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes into an argument, or only reads a property of it."""
    in_place = name.endswith("_") and not name.endswith("__")
    special = name in ("__get__", "__set__", "__setitem__") or name.startswith("__i")
    return in_place or special or "out" in kwargs

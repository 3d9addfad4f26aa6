"""A device that every machine has: the CPU's memory under another device's name.

torch keeps a device type for backends written in Python. Tensors of `Elsewhere` say that they are on
it, and compute on the CPU what is inside them. Operations that mix them with CPU tensors are refused as
a GPU's are, NumPy cannot see them, and their random numbers come from a generator of their own, so that
whatever a fit forgets to put on its device shows on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pyro_vi_kit.core import runtime

NAME = "elsewhere"
GENERATOR = torch.Generator()

# What reads or writes across devices on purpose.
_BETWEEN = ("aten::_to_copy", "aten::copy_")
_registered: list[bool] = []


def device() -> torch.device:
    """The device, registered with torch on first use: once in a process."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME)
        _registered.append(True)
    return torch.device(NAME, 0)


class Elsewhere(Tensor):
    """A tensor that says it is elsewhere.

    Attributes:
        inner: What is computed with.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device(),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        return (
            torch.nn.Parameter(copied, self.requires_grad)
            if getattr(self, "_is_param", False)
            else copied
        )


class _Mode(TorchDispatchMode):
    """Sees operations without tensors among their arguments."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def within() -> Iterator[torch.device]:
    """Let tensors be made on the device; yields it."""
    where = device()
    known, lift = runtime._generators, torch._C._only_lift_cpu_tensors()
    runtime._generators = lambda: [*known(), GENERATOR]
    # `torch.tensor` then makes its tensor on the CPU and copies it, which is an operation.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield where
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        runtime._generators = known


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there: list[Elsewhere] = []
    here: list[Tensor] = []

    def opened(value: Any) -> Any:
        if isinstance(value, Elsewhere):
            there.append(value)
            return value.inner
        if isinstance(value, Tensor):
            here.append(value)
        return value

    inner_args, inner_kwargs = tree_map(opened, args), tree_map(opened, kwargs)
    name, target = func._schema.name, kwargs.get("device")
    if there and any(tensor.dim() for tensor in here) and name not in _BETWEEN:
        raise RuntimeError(f"{func}: tensors on two devices, {NAME} and cpu")
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    stays = bool(there) if target is None else target.type == NAME
    result = _drawn(func, inner_args, inner_kwargs, stays)
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    return tree_map(_closed, result) if stays else result


def _drawn(func: Any, args: Any, kwargs: dict[str, Any], there: bool) -> Any:
    """The operation; where it draws random numbers, from the device's own generator."""
    if not there or torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    own = torch.default_generator.get_state()
    torch.default_generator.set_state(GENERATOR.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        GENERATOR.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(own)


def _closed(value: Any) -> Any:
    return (
        Elsewhere(value)
        if isinstance(value, Tensor) and not isinstance(value, Elsewhere)
        else value
    )

"""One precision and one device for all that a model computes, data that it closes over included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.work import Watcher

# Conversions by name, and what they ask for.
_NAMED = {
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
}
_CONVERSIONS = frozenset((*_NAMED, Tensor.to, Tensor.type, Tensor.type_as))
# A storage is converted whole, so that every view of it finds the same numbers, unless it is this much
# larger than the tensor (rows of a file mapped into memory) and takes more bytes than that.
_SURPLUS, _BYTES = 4, 2**26


class Precision(TorchFunctionMode):
    """Lets a model compute in another precision, or on another device, than it was written for.

    The default dtype does so for literals. Where the model names a dtype, it gets this one in its place.
    What it closes over is converted where operations meet it: once in a run for each storage, so that
    views share memory as the user's own tensors do, writes through one are seen through all, and none
    reaches the user's tensors. What has a gradient (parameters of modules) is cast at each use instead.

    A model that writes into its own arguments or data would, from run to run, find what it left there.
    With ``copies`` each run writes into copies.

    Args:
        dtype: The precision; None for that of the model itself.
        device: The device.
        outer: The user's default dtype, in which ``.to(outer)`` copies nothing.

    Attributes:
        copies: Whether every tensor that is older than the run is copied before it is used.
        met: Whether there was anything to convert.
        lowest: The lowest of the precisions that were met.
    """

    def __init__(
        self,
        dtype: torch.dtype | None,
        device: torch.device,
        outer: torch.dtype = torch.float32,
        *,
        copies: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.outer = outer
        self.copies = copies
        self.met = copies
        self.lowest = torch.float64
        self._depth = 0
        self.forget()

    def forget(self) -> None:
        """A run begins: what the last one wrote into its copies is gone."""
        # With the originals, whose places in memory nothing else may take meanwhile.
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._born: dict[int, StorageWeakRef] = {}
        # The precision that the user's own run has where the model named it, by storage.
        self._named: dict[int, tuple[torch.dtype, StorageWeakRef]] = {}

    @property
    def written(self) -> bool:
        """Whether the run wrote into what stands for older tensors."""
        return any(copy._version for _, copy in self._tensors.values())

    def __enter__(self) -> Any:
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self.forget()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if self.dtype is not None and func in _CONVERSIONS:
            return self._converted(func, args, kwargs)
        if func is Tensor.view and isinstance(kwargs.get("dtype", args[-1]), torch.dtype):
            return self._reinterpreted(args[0], kwargs.get("dtype", args[-1]))
        writes = _writes(name, kwargs)
        inert = writes or name in ("__get__", "__set__")
        asked = kwargs.get("dtype")
        args = tuple(self._own(value, inert) for value in args)
        kwargs = {key: self._own(value, inert) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if isinstance(asked, torch.dtype) and isinstance(result, Tensor):
            self._name(result, asked)
        return result if self.copies and _is_view(result, args) else self._registered(result)

    # -- tensors ------------------------------------------------------------------------------

    def _own(self, value: Any, inert: bool = False) -> Any:
        """What stands for an argument in this run: a tensor's copy, this dtype for another one."""
        if isinstance(value, Tensor):
            return self._tensor(value, inert)
        if type(value) in (list, tuple):
            return type(value)(self._own(part, inert) for part in value)
        if isinstance(value, torch.dtype):
            return self._dtype(value)
        return value

    def _dtype(self, asked: torch.dtype) -> torch.dtype:
        """This precision in the place of another floating one."""
        if self.dtype is None:
            return asked
        wanted = asked
        if asked.is_floating_point:
            wanted = self.dtype
        elif asked.is_complex:
            wanted = self.dtype.to_complex()
        if wanted != asked:
            self._note(asked)
        return wanted

    def _note(self, met: torch.dtype) -> None:
        self.met = True
        if met.is_floating_point and torch.finfo(met).eps > torch.finfo(self.lowest).eps:
            self.lowest = met

    def _tensor(self, tensor: Tensor, inert: bool) -> Tensor:
        with torch._C.DisableTorchFunction():
            dtype = self._dtype(tensor.dtype)
            strange = dtype != tensor.dtype or tensor.device != self.device
            if tensor.requires_grad:
                # Its properties, and what an optimiser writes into it, are its own.
                return tensor.to(self.device, dtype) if strange and not inert else tensor
            if not strange and not self.copies:
                return tensor
            if is_functorch_wrapped_tensor(tensor):
                return tensor.to(self.device, dtype)
            self.met = True
            return self._copy(tensor, dtype, strange)

    def _copy(self, tensor: Tensor, dtype: torch.dtype, strange: bool) -> Tensor:
        """The tensor of this run that stands for one, or that tensor if it was made in this run."""
        known = self._tensors.get(id(tensor))
        if known is not None:
            return known[1]
        if tensor.layout is not torch.strided:
            return tensor.to(self.device, dtype)
        storage = tensor.untyped_storage()
        if not strange and storage._cdata in self._born:
            return tensor
        size = storage.nbytes() // tensor.element_size()
        if storage.nbytes() > max(_BYTES, _SURPLUS * tensor.numel() * tensor.element_size()):
            copy = tensor.to(self.device, dtype, copy=True)
        else:
            key = storage._cdata, tensor.dtype
            if key not in self._storages:
                whole = torch.as_strided(tensor, (size,), (1,), 0)
                self._storages[key] = (tensor, whole.to(self.device, dtype, copy=True))
                self._name(self._storages[key][1], tensor.dtype)
            whole = self._storages[key][1]
            copy = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        self._tensors[id(tensor)] = (tensor, copy)
        self._tensors[id(copy)] = (copy, copy)
        self._bear(copy)
        return copy

    def _bear(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._born.setdefault(storage._cdata, StorageWeakRef(storage))

    def _registered(self, result: Any) -> Any:
        """A result; one with a gradient in this precision, and where copies are made, known as new."""
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor):
                return self._result(result)
            if self.copies and type(result) in (list, tuple):
                for leaf in result:
                    self._registered(leaf)
        return result

    def _result(self, result: Tensor) -> Tensor:
        if result.requires_grad and not result.is_leaf:
            return result.to(self.device, self._dtype(result.dtype))
        wrapped = is_functorch_wrapped_tensor(result)
        if self.copies and not wrapped and result.layout is torch.strided:
            self._bear(result)
        return result

    # -- conversions --------------------------------------------------------------------------

    def _converted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x.float()``, ``x.to(dtype)`` and the like.

        float32 and float64 are both this precision: nothing is rounded on the way. Lower ones round, as
        they are meant to. What copies in the user's own run copies here.
        """
        asked = _asked(func, args, kwargs)
        source = self._own(args[0])
        if asked is None or not (asked.is_floating_point or asked.is_complex):
            rest = tuple(self._own(value) for value in args[1:])
            if asked is not None and func is Tensor.type:
                return self._registered(source.to(asked))
            others = {key: self._own(value) for key, value in kwargs.items()}
            return self._registered(func(source, *rest, **others))
        wanted = self._dtype(asked)
        with torch._C.DisableTorchFunction():
            if asked in (torch.float16, torch.bfloat16):
                return self._registered(source.to(asked).to(wanted))
            found = source.to(self.device, wanted)
            if found is source and (kwargs.get("copy") or self._precision_of(source) != asked):
                found = source.clone()
            self._name(found, asked)
            return self._registered(found)

    def _name(self, tensor: Tensor, asked: torch.dtype) -> None:
        with torch._C.DisableTorchFunction():
            if not is_functorch_wrapped_tensor(tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._named.setdefault(storage._cdata, (asked, StorageWeakRef(storage)))

    def _precision_of(self, tensor: Tensor) -> torch.dtype:
        """What a tensor's precision is in the user's own run, as far as that is known."""
        outer = self.outer.to_complex() if tensor.is_complex() else self.outer
        if is_functorch_wrapped_tensor(tensor) or tensor.layout is not torch.strided:
            return outer
        return self._named.get(tensor.untyped_storage()._cdata, (outer,))[0]

    def _reinterpreted(self, tensor: Tensor, asked: torch.dtype) -> Tensor:
        """``x.view(dtype)``: what it is in the user's own run where that is x itself; else refused."""
        own = self._own(tensor)
        with torch._C.DisableTorchFunction():
            if self.dtype is None:
                return own.view(asked)
            if own.is_floating_point() and asked.is_floating_point:
                return own.view(own.shape)
            if not own.is_floating_point() and not asked.is_floating_point:
                return own.view(asked)
        raise ModelError(
            f"the model reads the bits of floating-point numbers, view({asked}), which are others in "
            f"the precision that it is fitted in, {self.dtype}: compute it before, and pass the result"
        )


def _asked(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a conversion asks for; None where it asks for another device, say."""
    if func in _NAMED:
        return _NAMED[func]
    values = [*args[1:], *kwargs.values()]
    for value in values:
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, Tensor):
            with torch._C.DisableTorchFunction():
                return value.dtype
        if func is Tensor.type and value is not None:
            return _of_type(value)
    return None


def _of_type(kind: Any) -> torch.dtype | None:
    """The dtype of ``torch.FloatTensor`` or its name."""
    if isinstance(kind, str):
        kind = getattr(torch, kind.removeprefix("torch."), None)
    return getattr(kind, "dtype", None)


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result has the memory of an argument with a gradient, which is never copied."""
    with torch._C.DisableTorchFunction():
        tensors = [value for value in (result, *args[:1]) if isinstance(value, Tensor)]
        if len(tensors) < 2 or not tensors[1].requires_grad:
            return False
        if any(is_functorch_wrapped_tensor(tensor) for tensor in tensors):
            return False
        return tensors[0].untyped_storage()._cdata == tensors[1].untyped_storage()._cdata


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes into an argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    special = name in ("__set__", "__setitem__") or (
        name.startswith("__i") and name != "__invert__"
    )
    return in_place or special or "out" in kwargs


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
        for target in _targets(func, args, kwargs):
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


def _targets(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation writes numbers into."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(
                args[position] if position < len(args) else kwargs.get(argument.name)
            )


def _tensors(value: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.layout is torch.strided]

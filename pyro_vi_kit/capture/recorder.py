"""Record the ATen operations of a function while it runs.

A `TorchDispatchMode` sees every operation below autograd and vmap, so a recording holds the
vectorised density, its gradient and the update that follows as one flat list. Nothing of
`torch.compile` is imported for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from pyro_vi_kit.capture.graph import Graph, Node, Noise, Ref
from pyro_vi_kit.capture.layout import Layout
from pyro_vi_kit.capture.simplify import simplified
from pyro_vi_kit.core.errors import ViError
from pyro_vi_kit.core.work import Watcher

_READ = torch.ops.aten._local_scalar_dense.default
_CHECK = torch.ops.aten._linalg_check_errors.default
_CLONE = torch.ops.aten.clone.default
_AS_STRIDED = torch.ops.aten.as_strided.default
_READERS = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__))
# Of numbers; of a tensor they are operations like others.
_MAKERS = frozenset((torch.tensor, torch.asarray, torch.as_tensor, Tensor.new_tensor))
_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class CaptureError(ViError):
    """A function that cannot be replayed, and why."""


# Beyond this many operations a replay costs as much as the model itself: the arithmetic is no longer
# hidden behind Python, and building the replay takes seconds.
MAX_NODES = 6000


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Run ``function(*inputs)`` and record what it does.

    Args:
        function: From tensors to a sequence of tensors; may use autograd and vmap inside.
        inputs: What to run it on. Shapes and dtypes are those of every replay.

    Raises:
        CaptureError: If what it does depends on the values of its inputs in a way that a recording
            cannot follow, or takes more than 6,000 operations.
    """
    recorder = _Recorder(inputs)
    with _Readings(recorder), recorder:
        results = function(*inputs)
    return recorder.graph(results)


class _Readings(TorchFunctionMode):
    """Refuses what reads the numbers of a tensor that inputs reach, past all operations."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        read = args if func in _READERS else ()
        if func in _MAKERS:
            read = [value for value in args if isinstance(value, list | tuple)]
        if read and self._recorder.reaches(read):
            raise CaptureError(
                "what depends on a latent is read by Python or NumPy (.numpy(), .tolist(), "
                "torch.tensor([latent])): use torch functions, torch.stack for vectors of latents"
            )
        return func(*args, **(kwargs or {}))


class _Recorder(Watcher):
    """Notes each operation that inputs reach, by name of the tensors that it reads.

    What inputs reach is told by storage, so that a write through one view is seen through all others.

    Args:
        inputs: The tensors that replays will be given anew.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # A storage that something refers to weakly frees its memory, but not its place: while these are
        # held no two storages of a recording have the same address, and memory is what eager code takes.
        self._weak: dict[int, StorageWeakRef] = {}
        self._layouts: dict[str, Layout] = {}
        # Names by where in which storage; autograd hands back what it saved as new objects.
        self._by_view: dict[tuple, str] = {}
        # What factorisations gave, until they have been checked.
        self._factors: dict[str, Tensor] = {}
        self._count = 0
        # How many names stand for memory of each storage.
        self._names_on: dict[int, int] = {}
        # Storages that inputs reach, and a tensor on each.
        self._reached: dict[int, str] = {}
        self._nodes: list[Node] = []
        self._constants: dict[str, Tensor] = {}
        self._noise: list[Noise] = []
        self._inputs = [f"i{position}" for position in range(len(inputs))]
        for name, tensor in zip(self._inputs, inputs, strict=True):
            self._bind(tensor, name)
            self._reached[_storage(tensor)] = name
        self._read_only = set(self._reached)
        # Storages that came to be during the recording, and so belong to one run of it.
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        args = self._counted(func, args)
        reached = any(_storage(tensor) in self._reached for tensor in _tensors((args, kwargs)))
        targets = _written(func, args, kwargs)
        if not reached:
            return self._outside(func, args, kwargs, targets)
        if len(self._nodes) >= MAX_NODES:
            raise CaptureError(
                f"it takes more than {MAX_NODES:,} operations: a long Python loop. Write observed sites "
                "of a loop as one vector site, or use dist.DiscreteHMM or dist.GaussianHMM"
            )
        if func is _READ:
            raise CaptureError(
                "what depends on a latent is turned into a Python number (if, float(), .item())"
            )
        if func is _CHECK:
            self._poison(args[0])
            return func(torch.zeros_like(args[0]), *args[1:], **kwargs)
        reshaped = _reshaped(func)
        if reshaped is not None:
            targets = []
        for target in targets:
            self._make_writable(func, target)
        references = tuple(self._reference(value) for value in args)
        keywords = {key: self._reference(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        many = isinstance(result, tuple | list)
        results = list(result) if many else [] if result is None else [result]
        _require_static(func, args, results)
        plain = self._out_of_place(func, targets)
        if plain is not None:
            self._rename(targets[0])
        func = reshaped or plain or func
        names = tuple(self._new(tensor) for tensor in results)
        if many and func._schema.name.endswith("_ex"):
            self._factors[names[0]] = results[0]
        self._nodes.append(
            Node(func, references, keywords, names, many, bool(targets) and plain is None)
        )
        return result

    def reaches(self, value: Any) -> bool:
        """Whether inputs reach a tensor, or one in a list."""
        with torch._C.DisableTorchFunction():
            plain = (t for t in _tensors(value) if not is_functorch_wrapped_tensor(t))
            return any(_storage(tensor) in self._reached for tensor in plain)

    def graph(self, results: Sequence[Tensor]) -> Graph:
        """The recording, as a function of inputs and noise."""
        outputs = [self._name(result) for result in results]
        noise = [f"n{position}" for position in range(len(self._noise))]
        graph = Graph(self._inputs + noise, outputs, self._nodes, self._constants, self._noise)
        return _pruned(simplified(graph, self._layouts))

    def _counted(self, func: Any, args: Any) -> Any:
        """``x[mask]`` by integer indices, where no input reaches the mask: its length is known then."""
        if func not in _INDEXED or not any(_is_mask(index) for index in args[1]):
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            if _is_mask(index):
                if _storage(index) in self._reached:
                    return args
                indices.extend(index.nonzero(as_tuple=True))
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    # -- what inputs do not reach -------------------------------------------------------------

    def _outside(self, func: Any, args: tuple, kwargs: Mapping[str, Any], targets: list) -> Any:
        """Run what is the same in every replay; its results become constants where they are used."""
        for target in targets:
            self._require_made(func, target)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._hold(tensor)
            self._made.add(_storage(tensor))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._note_noise(func, args, kwargs, result, targets)
            return result
        for target in targets:
            self._forget(target)
        return result

    def _require_made(self, func: Any, target: Tensor) -> None:
        """Refuse a write into what outlives the run: replays would not do it."""
        if _storage(target) not in self._made:
            raise CaptureError(
                "a tensor that outlives the step is written into (a counter, the running statistics of "
                f"a BatchNorm in training mode: call module.eval()) ({func})"
            )

    def _note_noise(
        self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any, targets: list
    ) -> None:
        """Random numbers become an input of their own."""
        if not isinstance(result, Tensor) or result.numel() != _numbers_behind(result):
            raise CaptureError(f"random numbers fill part of a tensor ({func})")
        rest, like = args, None
        if targets:
            self._forget(targets[0])
            rest, like = args[1:], _copy(args[0])
        name = f"n{len(self._noise)}"
        self._noise.append(Noise(func, tuple(rest), dict(kwargs), like))
        self._bind(result, name)
        self._reached[_storage(result)] = name

    def _forget(self, target: Tensor) -> None:
        """A constant that was written into is another one from now on."""
        storage = _storage(target)
        for view in [view for view in self._by_view if view[0] == storage]:
            del self._by_view[view]

    def _make_writable(self, func: Any, target: Tensor) -> None:
        """Before a latent is written into a constant: each replay writes into a copy of it."""
        storage = _storage(target)
        if storage in self._read_only:
            raise CaptureError(f"one of its inputs is written into ({func})")
        if storage in self._reached:
            return
        self._require_made(func, target)
        self._forget(target)
        whole = target.as_strided((_numbers_behind(target),), (1,), 0)
        constant = self._constant(whole)
        name = self._fresh()
        self._bind(whole, name)
        self._reached[storage] = name
        self._nodes.append(Node(_CLONE, (Ref(constant),), {}, (name,), False, False))

    def _out_of_place(self, func: Any, targets: list[Tensor]) -> Any:
        """The operation that gives what this one writes, where nothing else sees the written memory."""
        if len(targets) != 1 or self._names_on.get(_storage(targets[0]), 0) != 1:
            return None
        target, name = targets[0], func._schema.name.removeprefix("aten::")
        if target.numel() != _numbers_behind(target) or not name.endswith("_"):
            return None
        packet = getattr(torch.ops.aten, name[:-1], None)
        return getattr(packet, func._overloadname, None)

    def _rename(self, target: Tensor) -> None:
        """Forget the name of what a tensor was before it was written into."""
        storage = _storage(target)
        self._forget(target)
        del self._reached[storage], self._names_on[storage]

    def _poison(self, info: Tensor) -> None:
        """NaN in place of an exception where a factorisation fails, for that particle alone."""
        name = self._name(info)
        maker = next(node for node in reversed(self._nodes) if name in node.outputs)
        factor = self._factors.get(maker.outputs[0])
        if factor is None:
            raise CaptureError(f"a check of {maker.op} cannot be replayed")
        with self:
            failed = info.ne(0)
            failed = failed.reshape(*failed.shape, *(1,) * (factor.dim() - failed.dim()))
            fixed = torch.where(failed, torch.nan, factor)
        self._by_view[_view(factor)] = self._name(fixed)

    # -- names --------------------------------------------------------------------------------

    def _new(self, value: Any) -> str:
        name = self._fresh()
        if isinstance(value, Tensor):
            self._bind(value, name)
            self._reached.setdefault(_storage(value), name)
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def _hold(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage not in self._weak:
            self._weak[storage] = StorageWeakRef(tensor.untyped_storage())

    def _bind(self, tensor: Tensor, name: str) -> None:
        self._hold(tensor)
        storage = _storage(tensor)
        self._layouts[name] = Layout.of(tensor)
        self._by_view[_view(tensor)] = name
        self._names_on[storage] = self._names_on.get(storage, 0) + 1

    def _reference(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self._name(value))
        if isinstance(value, tuple | list):
            return tuple(self._reference(part) for part in value)
        return value

    def _name(self, tensor: Tensor) -> str:
        name = self._by_view.get(_view(tensor))
        if name is not None:
            return name
        base = self._reached.get(_storage(tensor))
        if base is None:
            return self._constant(tensor)
        name = self._new(tensor)
        where = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        self._nodes.append(Node(_AS_STRIDED, (Ref(base), *where), {}, (name,), False, False))
        return name

    def _constant(self, tensor: Tensor) -> str:
        name = f"c{len(self._constants)}"
        self._bind(tensor, name)
        self._constants[name] = _copy(tensor)
        return name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _reshaped(func: Any) -> Any:
    """The view that an operation on a tensor's shape alone is: no number of it is written (squeeze_)."""
    if torch.Tag.inplace_view not in func.tags:
        return None
    packet = getattr(
        torch.ops.aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None
    )
    return getattr(packet, func._overloadname, None)


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    targets = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            targets.extend(_tensors(value))
    return targets


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, so that a view of it is the same view."""
    return tensor.detach().clone(memory_format=torch.preserve_format)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _numbers_behind(tensor: Tensor) -> int:
    """How many elements a tensor's storage holds."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _view(tensor: Tensor) -> tuple:
    return (
        _storage(tensor),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )


def _require_static(func: Any, args: tuple, results: Sequence[Any]) -> None:
    """Refuse operations whose result's shape, or whose Python value, depends on their values."""
    if torch.Tag.dynamic_output_shape in func.tags and not _is_gather(func, args):
        raise CaptureError(f"the shape of a result depends on latents ({func})")
    if any(not isinstance(value, Tensor) and value is not None for value in results):
        raise CaptureError(f"a Python value depends on latents ({func})")


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _is_gather(func: Any, args: tuple) -> bool:
    """Whether this is `x[indices]`; with a mask, `x[mask]`, the result's length is the mask's."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(_is_mask(index) for index in args[1])


def _pruned(graph: Graph) -> Graph:
    """The graph without operations whose results nothing reads."""
    needed = set(graph.outputs)
    if any(node.writes for node in graph.nodes):
        # What a write reaches through views is not worth following.
        return graph
    nodes = []
    for node in reversed(graph.nodes):
        if needed.isdisjoint(node.outputs):
            continue
        needed.update(node.reads())
        nodes.append(node)
    constants = {name: value for name, value in graph.constants.items() if name in needed}
    return Graph(graph.inputs, graph.outputs, nodes[::-1], constants, graph.noise)

"""What kernels write with: the tensors of a graph as C variables, and lines of code.

A result that one other operation reads, element by element and once, is not stored: its expression
stands where it would be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vi_kit.capture.graph import Node, Ref
from pyro_vi_kit.capture.in_c.expressions import (
    CTYPES,
    Expr,
    Nest,
    RefusedError,
    Value,
    number,
    read,
)


@dataclass
class Buffer:
    """Memory that the function takes for itself.

    Attributes:
        ctype: The C type of an element.
        size: How many elements there are.
    """

    ctype: str
    size: int

    @property
    def bytes(self) -> int:
        """How much that is."""
        return self.size * (1 if self.ctype == "uint8_t" else 8)


class Writer:
    """The body of a function in C, while it is being written.

    Attributes:
        buffers: Memory that results lie in, by C name.
        lines: The body.
        inlined: Names of results that are expressions, and where they are read.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Buffer] = {}
        self.lines: list[str] = []
        self.inlined: set[str] = set()
        self._values: dict[str, Value] = {}
        self._places: dict[int, tuple[str, bool]] = {}
        self._expressions: dict[str, Expr] = {}
        self._next = 0

    def bind(self, name: str, tensor: Tensor, buffer: str = "", scalar: bool = False) -> None:
        """Say where a tensor lies.

        That is in the buffer of that name, where its storage lies already, or in new memory.
        """
        ctype = CTYPES.get(tensor.dtype)
        if ctype is None:
            raise RefusedError(f"it computes in {str(tensor.dtype).removeprefix('torch.')}")
        storage = tensor.untyped_storage()
        if storage._cdata not in self._places:
            size = storage.nbytes() // tensor.element_size()
            if not buffer:
                buffer, scalar = f"b_{name}", size == 1
                self.buffers[buffer] = Buffer(ctype, size)
            self._places[storage._cdata] = (buffer, scalar)
        buffer, scalar = self._places[storage._cdata]
        own = self.buffers.get(buffer)
        if own is not None and own.ctype != ctype:
            raise RefusedError("it looks at the bytes of one type as those of another")
        self._values[name] = Value(
            buffer,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            ctype,
            scalar,
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether its memory is known already."""
        return tensor.untyped_storage()._cdata in self._places

    def value(self, name: str) -> Value:
        """Where a tensor lies."""
        return self._values[name]

    def expression(self, name: str, shape: Sequence[int]) -> Expr:
        """A tensor's element, broadcast to a shape."""
        if name in self._expressions:
            return self._expressions[name]
        return read(self._values[name].expanded(shape))

    def keep(self, name: str, expression: Expr) -> None:
        """An expression in the place of a result; its memory is not needed."""
        self._expressions[name] = expression
        self.buffers.pop(self._values[name].buffer, None)

    def fresh(self, prefix: str) -> str:
        """A name that nothing has."""
        self._next += 1
        return f"{prefix}_{self._next}"

    def add(self, lines: Iterable[str]) -> None:
        """More of the body."""
        self.lines.extend(lines)

    def store(self, target: Value, expression: Expr) -> None:
        """Write an expression to each element of a tensor."""
        nest = Nest(target.shape, [target, *expression.leaves()])
        right = expression.cast(target.ctype).code(nest.place)
        self.add(nest.lines([f"{nest.place(target)} = {right};"]))


class Call:
    """One operation and its arguments, by the names that ATen's schema has for them.

    Args:
        node: The operation.
        writer: What it is written with.
    """

    def __init__(self, node: Node, writer: Writer) -> None:
        self.node = node
        self.writer = writer
        self._given: dict[str, Any] = dict(node.kwargs)
        for argument, value in zip(node.op._schema.arguments, node.args, strict=False):
            self._given[argument.name] = value
        self._defaults: Mapping[str, Any] = {
            argument.name: argument.default_value for argument in node.op._schema.arguments
        }

    def __getitem__(self, name: str) -> Any:
        return self._given[name] if name in self._given else self._defaults[name]

    @property
    def name(self) -> str:
        """The overload, without ``aten.``."""
        return str(self.node.op).removeprefix("aten.")

    @property
    def out(self) -> Value:
        """Where its first result lies."""
        return self.writer.value(self.node.outputs[0])

    @property
    def ctype(self) -> str:
        """The C type of its first result."""
        return self.out.ctype

    def result(self, position: int) -> Value:
        """Where another of its results lies."""
        return self.writer.value(self.node.outputs[position])

    def value(self, name: str) -> Value:
        """Where an argument lies."""
        return self.writer.value(self[name].name)

    def shape(self, name: str) -> tuple[int, ...]:
        """An argument's shape."""
        return self.writer.value(self[name].name).shape

    def expression(self, name: str, shape: Sequence[int] | None = None) -> Expr:
        """An element of an argument, tensor or number; in its own shape unless another is given."""
        argument = self[name]
        if isinstance(argument, Ref):
            own = self.writer.value(argument.name).shape if shape is None else shape
            return self.writer.expression(argument.name, own)
        if isinstance(argument, bool | int | float):
            return number(argument)
        raise RefusedError(f"{self.name} with {name}={argument!r}")

    def dims(self, name: str = "dim") -> tuple[int, ...]:
        """Dimensions of ``self`` that an argument names, from 0; all where it names none."""
        given, count = self[name], len(self.shape("self"))
        if given is None or given == () or given == []:
            return tuple(range(count))
        listed = given if isinstance(given, tuple | list) else (given,)
        return tuple(sorted(dim % max(count, 1) for dim in listed)) if count else ()


def total(buffers: Iterable[Buffer]) -> int:
    """Bytes of buffers."""
    return sum(buffer.bytes for buffer in buffers)


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    return math.prod(shape)

"""Expressions and loop nests in C, over tensors that lie in buffers with strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

# What a C variable of each dtype is.
CTYPES = {
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
}


class RefusedError(Exception):
    """A graph that is not written in C, and why."""


@dataclass(frozen=True)
class Value:
    """A tensor: a look at a buffer.

    Attributes:
        buffer: The C name of the buffer.
        shape: Its shape.
        stride: Elements between neighbours, for each dimension.
        offset: Where the first element lies.
        ctype: The C type of an element.
        scalar: Whether the buffer is a plain variable, and not an array.
    """

    buffer: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    ctype: str
    scalar: bool = False

    def expanded(self, shape: Sequence[int]) -> Value:
        """The same, broadcast to another shape."""
        missing = len(shape) - len(self.shape)
        pairs = zip(self.shape, self.stride, strict=True)
        steps = [0 if size == 1 else step for size, step in pairs]
        return replace(self, shape=tuple(shape), stride=(*[0] * missing, *steps))


@dataclass(frozen=True)
class Expr:
    """An expression of a loop's indices.

    Attributes:
        ctype: The C type of what it gives.
        text: What is written, ``{0}``, ``{1}``, ... standing for ``parts``.
        parts: What it is made of.
        value: The tensor that is read, for an expression that reads one.
    """

    ctype: str
    text: str = ""
    parts: tuple[Expr, ...] = ()
    value: Value | None = None

    def leaves(self) -> Iterator[Value]:
        """The tensors that are read."""
        if self.value is not None:
            yield self.value
        for part in self.parts:
            yield from part.leaves()

    def code(self, place: Callable[[Value], str]) -> str:
        """The expression in C, where ``place`` says how an element is reached."""
        if self.value is not None:
            return place(self.value)
        return self.text.format(*(part.code(place) for part in self.parts))

    def cast(self, ctype: str) -> Expr:
        """The same in another type; a number is a truth where it is not zero."""
        if ctype == self.ctype:
            return self
        text = "(({0}) != 0)" if ctype == "uint8_t" else f"(({ctype})({{0}}))"
        return Expr(ctype, text, (self,))


def read(value: Value) -> Expr:
    """An element of a tensor."""
    return Expr(value.ctype, value=value)


def number(value: float | bool) -> Expr:
    """A literal."""
    if isinstance(value, bool):
        return Expr("uint8_t", str(int(value)))
    if isinstance(value, int):
        return Expr("int64_t", f"INT64_C({value})" if value >= 0 else f"(-INT64_C({-value}))")
    if math.isnan(value):
        return Expr("double", "NAN")
    if math.isinf(value):
        return Expr("double", "INFINITY" if value > 0 else "(-INFINITY)")
    return Expr("double", repr(value) if value >= 0 and repr(value)[0] != "-" else f"({value!r})")


def element(value: Value, indices: Sequence[str]) -> str:
    """How an element of a tensor is reached."""
    if value.scalar:
        return value.buffer
    steps = [
        index if step == 1 else f"{index} * {step}"
        for size, step, index in zip(value.shape, value.stride, indices, strict=True)
        if step and size != 1 and index != "0"
    ]
    if value.offset or not steps:
        steps.append(str(value.offset))
    return f"{value.buffer}[{' + '.join(steps)}]"


class Nest:
    """Loops over a shape: dimensions of one are left out, and neighbours that lie in a row are one.

    Args:
        shape: What is looped over.
        values: The tensors that are reached inside, all of that shape.
        prefix: Of the names of the indices.
        whole: Whether all dimensions keep a loop of their own, in ``indices``.
    """

    def __init__(
        self, shape: Sequence[int], values: Sequence[Value], prefix: str = "i", whole: bool = False
    ) -> None:
        kept: list[list[int]] = []
        for dim, size in enumerate(shape):
            if size == 1 and not whole:
                continue
            if kept and not whole and all(_in_a_row(value, kept[-1][-1], dim) for value in values):
                kept[-1].append(dim)
            else:
                kept.append([dim])
        self.sizes = [math.prod(shape[dim] for dim in dims) for dims in kept]
        self.names = [f"{prefix}{position}" for position in range(len(kept))]
        # Where neighbours are one loop, its index steps as the last of them does.
        self.indices = ["0"] * len(shape)
        for dims, name in zip(kept, self.names, strict=True):
            self.indices[dims[-1]] = name

    def place(self, value: Value) -> str:
        """How an element is reached inside the loops."""
        return element(value, self.indices)

    def lines(self, body: Sequence[str]) -> list[str]:
        """The loops around a body."""
        opening = [
            f"for (int64_t {name} = 0; {name} < {size}; {name}++)"
            for name, size in zip(self.names, self.sizes, strict=True)
        ]
        if not opening:
            return ["{", *body, "}"]
        return [" ".join(opening) + " {", *body, "}"]


def _in_a_row(value: Value, dim: int, following: int) -> bool:
    """Whether a dimension goes on where the next one ends."""
    return value.stride[dim] == value.stride[following] * value.shape[following]

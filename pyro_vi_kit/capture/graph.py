"""What a recording is: ATen operations in the order in which they ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What ATen calls the arguments that say which elements of another are meant.
_PICKING = ("index", "indices")


@dataclass(frozen=True)
class Ref:
    """A tensor of the graph, by name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: The ATen overload.
        args: Its positional arguments, tensors as `Ref`.
        kwargs: Its keyword arguments, likewise.
        outputs: Names of what it returns.
        many: Whether it returns a tuple or list.
        writes: Whether it writes into one of its arguments.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]
    many: bool
    writes: bool

    def reads(self) -> Iterable[str]:
        """Names of the tensors among the arguments."""
        yield from _names(self.args)
        yield from _names(tuple(self.kwargs.values()))

    def run(self, values: Mapping[str, Tensor]) -> Any:
        """What it returns where names stand for these tensors."""
        args = (_filled(value, values) for value in self.args)
        return self.op(*args, **{key: _filled(value, values) for key, value in self.kwargs.items()})


@dataclass(frozen=True)
class Noise:
    """Random numbers that depend on no input: drawn before each replay, in the recorded order.

    Attributes:
        op: The ATen overload that drew them.
        args: Its arguments; for one that fills a tensor in place, without that tensor.
        kwargs: Its keyword arguments.
        like: The tensor that is filled in place, or None.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    like: Tensor | None

    def draw(self) -> Tensor:
        """Fresh numbers from torch's global random state."""
        if self.like is None:
            return self.op(*self.args, **self.kwargs)
        return self.op(torch.empty_like(self.like), *self.args, **self.kwargs)


@dataclass
class Graph:
    """A pure function of tensors.

    Attributes:
        inputs: Names of the inputs, then of the noise.
        outputs: Names of the outputs.
        nodes: The operations.
        constants: Tensors that no input reaches, by name; copies, so that nothing can change them.
        noise: Where the last inputs come from, one for each.
    """

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Tensor]
    noise: list[Noise] = field(default_factory=list)

    def draw_noise(self) -> list[Tensor]:
        """The last inputs, drawn anew from torch's global random state."""
        return [source.draw() for source in self.noise]

    def source(self, name: str = "replay") -> tuple[str, dict[str, Any]]:
        """The graph as Python source, and the names that the source refers to."""
        writer = _Writer(dict(self.constants))
        lines = [f"def {name}({', '.join(self.inputs)}):"]
        last = _last_uses(self)
        for position, node in enumerate(self.nodes):
            lines.append(f"    {writer.statement(node)}")
            if dead := last.get(position):
                # As in eager code, memory is given back as soon as nothing needs it.
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return ({', '.join(self.outputs)},)")
        return "\n".join(lines), writer.names


def computes_indices(graph: Graph) -> bool:
    """Whether it picks by numbers that it makes of floating-point ones, which may be out of range."""
    made: set[str] = set()
    for node in graph.nodes:
        if node.kwargs.get("dtype") in _WHOLE or not made.isdisjoint(node.reads()):
            made.update(node.outputs)
        named = zip(
            (argument.name for argument in node.op._schema.arguments), node.args, strict=False
        )
        picks = [name for key, value in named if key in _PICKING for name in _names(value)]
        if not made.isdisjoint(picks):
            return True
    return False


def _names(value: Any) -> Iterable[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _names(part)


def _filled(value: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, tuple | list):
        return [_filled(part, values) for part in value]
    return value


def _last_uses(graph: Graph) -> dict[int, list[str]]:
    """Which intermediate tensors nothing needs any more behind each node, by its position."""
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for name in (*node.outputs, *node.reads()):
            last[name] = position
    kept = {*graph.inputs, *graph.outputs, *graph.constants}
    dead: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in kept:
            dead.setdefault(position, []).append(name)
    return dead


class _Writer:
    """Writes nodes as Python statements."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self._ops: dict[Any, str] = {}

    def statement(self, node: Node) -> str:
        arguments = [
            self.value(_for_schema(node.op, position, argument))
            for position, argument in enumerate(node.args)
        ]
        arguments += [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        call = f"{self._op(node.op)}({', '.join(arguments)})"
        if not node.outputs:
            return call
        comma = "," if node.many else ""
        return f"{', '.join(node.outputs)}{comma} = {call}"

    def value(self, value: Any) -> str:
        if isinstance(value, Ref):
            return value.name
        if isinstance(value, tuple | list):
            return f"[{', '.join(self.value(part) for part in value)}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        return self._name("k", value)  # a dtype, device, layout or memory format

    def _op(self, op: Any) -> str:
        if op not in self._ops:
            self._ops[op] = self._name("f", op)
        return self._ops[op]

    def _name(self, prefix: str, value: Any) -> str:
        name = f"{prefix}_{len(self.names)}"
        self.names[name] = value
        return name


def _for_schema(op: Any, position: int, value: Any) -> Any:
    """TorchScript takes no bool where a number is declared, as in `full_like(x, True)`."""
    if isinstance(value, bool) and str(op._schema.arguments[position].type) == "number":
        return int(value)
    return value

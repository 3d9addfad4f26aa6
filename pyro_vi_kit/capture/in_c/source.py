"""A graph as a function in C.

Shapes and strides are those of one run, so a look at a tensor (a slice, a transpose) is nothing but
other strides of the same memory. What has no kernel here is refused by name, and so is large work, which
libraries do better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph, Node
from pyro_vi_kit.capture.in_c import algebra, density, moves, reductions
from pyro_vi_kit.capture.in_c.expressions import Expr, Nest, RefusedError, Value
from pyro_vi_kit.capture.in_c.pointwise import TEMPLATES, casts
from pyro_vi_kit.capture.in_c.prelude import PRELUDE
from pyro_vi_kit.capture.in_c.writer import Call, Writer, numel, total

# Compilers take longer than in proportion.
MAX_NODES = 3000
# Elements of all results: beyond, time goes into arithmetic that torch does with wider instructions.
MAX_ELEMENTS = 2**17
_STACK = 2**17
# Longer expressions are stored on their way.
_MAX_PARTS = 40

_KERNELS: Mapping[str, Callable[[Call], None]] = (
    reductions.KERNELS | moves.KERNELS | algebra.KERNELS
)
_HEAD = """static int64_t run(const void *const *tensors, void *const *results) {
int64_t outside = 0;"""
_END = """}
int64_t replay(const void *const *tensors, void *const *results) { return run(tensors, results); }
"""
_NOTHING = {"new_empty_strided.default", "empty_like.default", "new_empty.default"}
# They read `self` or their parts once, element by element.
_READ_ONCE = {
    *(name for name, kernel in reductions.KERNELS.items() if kernel is reductions.reduced),
    *("cat.default", "stack.default", "select_backward.default", "slice_backward.default"),
}


class Layout(NamedTuple):
    """How a result lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Source(NamedTuple):
    """A function in C: ``int64_t run(const void *const *tensors, void *const *results)``.

    It returns 0; or 1 where an index was out of range, and then the results mean nothing; or -1 where
    there was no memory.

    Attributes:
        text: The source, with all that it needs.
        results: How its results are to lie.
        entries: Names of functions in it beside ``replay``.
    """

    text: str
    results: list[Layout]
    entries: tuple[str, ...]


def source_of(graph: Graph, inputs: Sequence[Tensor]) -> Source:
    """Write a graph in C.

    Args:
        graph: The recording. Its constants come behind its inputs in ``tensors``.
        inputs: An example of its inputs, noise included; those of every call have their shapes, and
            lie in memory without gaps.

    Raises:
        RefusedError: If it is not written in C, with the reason.
    """
    if len(graph.nodes) > MAX_NODES:
        raise RefusedError(f"{len(graph.nodes):,} operations, more than {MAX_NODES:,}")
    with torch.no_grad():
        return _Translation(graph, inputs).source()


class _Translation:
    """Runs a graph node by node, then writes down each."""

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        self._graph = graph
        self._writer = Writer()
        self._opening: list[str] = []
        self._inputs = [_own(tensor) for tensor in inputs]
        named = dict(zip(graph.inputs, self._inputs, strict=True)) | graph.constants
        # All of them are held, so that no two storages have one address.
        self._values = _run(graph, named)
        for position, name in enumerate(named):
            self._take(position, name, named[name])
        self._pure = not any(node.op._schema.is_mutable for node in graph.nodes)
        self._reads = Counter(name for node in graph.nodes for name in node.reads())
        self._readers = {name: node for node in graph.nodes for name in node.reads()}

    def _take(self, position: int, name: str, tensor: Tensor) -> None:
        """An argument of the function."""
        buffer = f"a{position}"
        scalar = tensor.untyped_storage().nbytes() == tensor.element_size()
        self._writer.bind(name, tensor, buffer, scalar)
        ctype = self._writer.value(name).ctype
        star, get = ("", "*") if scalar else ("*restrict ", "")
        self._opening.append(
            f"const {ctype} {star}{buffer} = {get}(const {ctype} *)tensors[{position}];"
        )

    def source(self) -> Source:
        for node in self._graph.nodes:
            self._translate(node)
        layouts = [self._result(k, name) for k, name in enumerate(self._graph.outputs)]
        memory, closing = _memory(self._writer)
        body = [*self._opening, *memory, *self._writer.lines, *closing, "return outside;"]
        results = [self._values[name] for name in self._graph.outputs]
        last = density.entry(self._inputs, results, len(self._opening))
        text = "\n".join([PRELUDE, _HEAD, *body, _END, last])
        return Source(text, layouts, density.ENTRIES if last else ())

    def _translate(self, node: Node) -> None:
        """The lines of one operation; none for one that only looks at what is there."""
        named = [(name, self._values[name]) for name in node.outputs if name in self._values]
        looks = all(self._writer.holds(tensor) for _, tensor in named)
        for name, tensor in named:
            self._writer.bind(name, tensor)
        if node.op._schema.is_mutable:
            self._write_into(node)
        elif not looks:
            self._compute(node)

    def _compute(self, node: Node) -> None:
        call = Call(node, self._writer)
        if call.name in TEMPLATES:
            expression = _expression(call)
            if self._inlines(node, call, expression):
                self._writer.keep(node.outputs[0], expression)
            else:
                self._writer.store(call.out, expression)
        elif call.name in _KERNELS:
            _KERNELS[call.name](call)
        elif call.name not in _NOTHING:
            raise RefusedError(f"no C for {node.op}")

    def _write_into(self, node: Node) -> None:
        """An operation that writes into its first argument: the one of the same name that does not."""
        packet, _, overload = str(node.op).removeprefix("aten.").partition(".")
        name = f"{packet.removesuffix('_')}.{overload}"
        target, *others = [self._writer.value(read) for read in node.reads()]
        if not packet.endswith("_") or len(node.outputs) != 1:
            raise RefusedError(f"no C for {node.op}")
        call = _InPlace(node, self._writer, name)
        apart = all(value.buffer != target.buffer for value in others)
        alike = all(value.buffer != target.buffer or _same(value, target) for value in others)
        if name in TEMPLATES and alike:
            self._writer.store(call.out, _expression(call))
        elif name == "index_put.default" and apart:
            _KERNELS[name](call)
        else:
            raise RefusedError(f"no C for {node.op}")

    def _inlines(self, node: Node, call: Call, expression: Expr) -> bool:
        """Whether a result is written where it is read, and not stored."""
        name = node.outputs[0]
        reader = self._readers.get(name)
        if not self._pure or reader is None or self._reads[name] != 1:
            return False
        if name in self._graph.outputs or numel(call.out.shape) == 1:
            return False
        if sum(1 for _ in _parts(expression)) > _MAX_PARTS:
            return False
        own = str(reader.op).removeprefix("aten.")
        shape = self._values[reader.outputs[0]].shape
        return own in _READ_ONCE or (own in TEMPLATES and shape == call.out.shape)

    def _result(self, position: int, name: str) -> Layout:
        """Copy a result to where the caller wants it."""
        tensor, value = self._values[name], self._writer.value(name)
        stride = torch.empty_like(tensor).stride()  # dense, in the order of its own
        out = f"o{position}"
        target = Value(out, value.shape, stride, 0, value.ctype)
        nest = Nest(value.shape, [value, target])
        opening = f"{{ {value.ctype} *restrict {out} = ({value.ctype} *)results[{position}];"
        step = f"{nest.place(target)} = {nest.place(value)};"
        self._writer.add([opening, *nest.lines([step]), "}"])
        return Layout(tuple(tensor.shape), stride, tensor.dtype)


def _run(graph: Graph, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that a graph computes, by name."""
    values, elements = dict(named), 0
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in node.op.tags:
            raise RefusedError(f"it draws random numbers ({node.op})")
        result = node.run(values)
        results = list(result) if node.many else [] if result is None else [result]
        values.update(zip(node.outputs, results, strict=True))
        elements += sum(tensor.numel() for tensor in results)
        if elements > MAX_ELEMENTS:
            raise RefusedError(f"its results have more than {MAX_ELEMENTS:,} elements")
    return values


class _InPlace(Call):
    """A call under the name of the operation that writes nowhere."""

    def __init__(self, node: Node, writer: Writer, name: str) -> None:
        super().__init__(node, writer)
        self._name = name

    @property
    def name(self) -> str:
        return self._name


def _own(tensor: Tensor) -> Tensor:
    """The tensor without gaps, in memory of its own."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _same(one: Value, other: Value) -> bool:
    return (one.offset, one.shape, one.stride) == (other.offset, other.shape, other.stride)


def _parts(expression: Expr) -> Any:
    yield expression
    for part in expression.parts:
        yield from _parts(part)


def _expression(call: Call) -> Expr:
    """An element of what a pointwise operation gives."""
    template = TEMPLATES[call.name]
    text = template if isinstance(template, str) else template(call)
    if not text:
        raise RefusedError(f"no C for {call.node.op} with these options")
    parts: list[Expr] = []
    for argument in call.node.op._schema.arguments:
        mark = f"{{{argument.name}}}"
        if mark in text:
            part = call.expression(argument.name, call.out.shape)
            if casts(call.name, argument.name, call.ctype):
                part = part.cast(call.ctype)
            text = text.replace(mark, f"{{{len(parts)}}}")
            parts.append(part)
    if call.ctype != "double":
        text = f"(({call.ctype})({text}))"
    return Expr(call.ctype, text, tuple(parts))


def _memory(writer: Writer) -> tuple[list[str], list[str]]:
    """Variables for all results, and what gives their memory back."""
    arrays = {name: buffer for name, buffer in writer.buffers.items() if buffer.size != 1}
    lines = [f"{b.ctype} {name};" for name, b in writer.buffers.items() if b.size == 1]
    if total(arrays.values()) <= _STACK:
        return [*lines, *(f"{b.ctype} {n}[{max(b.size, 1)}];" for n, b in arrays.items())], []
    place = 0
    named = []
    for name, buffer in arrays.items():
        named.append(f"{buffer.ctype} *restrict {name} = ({buffer.ctype} *)(arena + {place});")
        place += -(-buffer.bytes // 64) * 64
    return [*lines, f"char *arena = malloc({place});", "if (!arena) return -1;", *named], [
        "free(arena);"
    ]

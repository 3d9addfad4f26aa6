"""Leave out of a recording what changes nothing: a replay takes as long as it has operations.

Autograd and distributions leave many: a detach, an expansion to the shape that is there, a factor of
one, the first power, a value that is computed twice. What remains gives the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph, Node, Ref

_ATEN = torch.ops.aten
_ALIASES = {_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default}
_RESHAPES = {
    _ATEN.expand.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.reshape.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
}
_PRODUCTS = {_ATEN.mul.Tensor, _ATEN.mul.Scalar}
_QUOTIENTS = {_ATEN.div.Tensor, _ATEN.div.Scalar}
_POWERS = {_ATEN.pow.Tensor_Scalar}
_NEGATIONS = {_ATEN.neg.default}
# Results that depend on a tensor's shape alone.
_FILLS = {
    _ATEN.zeros_like.default: 0.0,
    _ATEN.ones_like.default: 1.0,
    _ATEN.new_zeros.default: 0.0,
    _ATEN.new_ones.default: 1.0,
}
_FULL = {_ATEN.full_like.default: 1, _ATEN.new_full.default: 2}  # and where they have the number
_LARGEST_CONSTANT = 2**16


class Layout(NamedTuple):
    """How a tensor lay in memory when it came to be; `squeeze_` and its like change that later."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """A tensor's layout now."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def simplified(graph: Graph, layouts: Mapping[str, Layout]) -> Graph:
    """The same function in fewer operations; as it is where something is written in place.

    Args:
        graph: A recording.
        layouts: Of what its names stand for.
    """
    if any(node.writes for node in graph.nodes):
        return graph
    return _Simplifier(graph, layouts).graph()


class _Simplifier:
    """Walks a graph once, renaming results that are other results."""

    def __init__(self, graph: Graph, layouts: Mapping[str, Layout]) -> None:
        self._graph = graph
        self._layouts = layouts
        self._constants = dict(graph.constants)
        self._same: dict[str, str] = {}
        self._known: dict[Any, tuple[str, ...]] = {}
        self._makers: dict[str, Node] = {}

    def graph(self) -> Graph:
        """What is left."""
        nodes = []
        for node in self._graph.nodes:
            kept = self._kept(node)
            if kept is not None:
                nodes.append(kept)
        outputs = [self._same.get(name, name) for name in self._graph.outputs]
        return Graph(self._graph.inputs, outputs, nodes, self._constants, self._graph.noise)

    def _kept(self, node: Node) -> Node | None:
        """The node with its arguments renamed, or None where its result is known already."""
        args = tuple(self._renamed(value) for value in node.args)
        kwargs = {key: self._renamed(value) for key, value in node.kwargs.items()}
        node = Node(node.op, args, kwargs, node.outputs, node.many, node.writes)
        if len(node.outputs) != 1 or torch.Tag.nondeterministic_seeded in node.op.tags:
            return node
        (name,) = node.outputs
        other = self._identity(node)
        if other is not None:
            self._same[name] = other
            return None
        value = _filled_with(node)
        if value is not None and self._fill(name, value):
            return None
        key = _key(node)
        if key in self._known:
            self._same[name] = self._known[key][0]
            return None
        self._known[key] = node.outputs
        self._makers[name] = node
        return node

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(self._same.get(value.name, value.name))
        if isinstance(value, tuple | list):
            return tuple(self._renamed(part) for part in value)
        return value

    def _identity(self, node: Node) -> str | None:
        """The tensor that the node's result is equal to, if it is one of its arguments."""
        first = node.args[0] if node.args else None
        if not isinstance(first, Ref) or (node.kwargs and node.op not in _ALIASES):
            return None
        if node.op in _ALIASES:
            return first.name
        maker = self._makers.get(first.name)
        if maker is not None and _undoes(node, maker):
            original = maker.args[0].name
            return original if self._alike(original, node.outputs[0]) else None
        if not self._alike(first.name, node.outputs[0]):
            return self._other_factor(node)
        second = node.args[1] if len(node.args) > 1 else None
        if node.op in _RESHAPES:
            return first.name
        if node.op in _PRODUCTS | _QUOTIENTS | _POWERS and self._is_one(second):
            return first.name
        return self._other_factor(node)

    def _other_factor(self, node: Node) -> str | None:
        """The second factor of a product whose first is one."""
        if node.op is not _ATEN.mul.Tensor or not isinstance(node.args[1], Ref):
            return None
        other = node.args[1].name
        alike = self._alike(other, node.outputs[0])
        return other if alike and self._is_one(node.args[0]) else None

    def _is_one(self, value: Any) -> bool:
        if isinstance(value, Ref):
            constant = self._constants.get(value.name)
            return (
                constant is not None and constant.numel() <= _LARGEST_CONSTANT and _ones(constant)
            )
        return isinstance(value, int | float) and value == 1

    def _alike(self, one: str, other: str) -> bool:
        """Whether two names stand for tensors of the same layout.

        Strides matter too: what comes next may be a view that only one of them allows.
        """
        layout = self._layouts.get(one)
        return layout is not None and layout == self._layouts.get(other)

    def _fill(self, name: str, value: float) -> bool:
        """Make a result a constant of one number; whether that was possible."""
        made = self._layouts.get(name)
        if made is None or prod(made.shape) > _LARGEST_CONSTANT:
            return False
        filled = torch.full(made.shape, value, dtype=made.dtype, device=made.device)
        if filled.stride() != made.stride:
            return False
        self._constants[name] = filled
        return True


def _filled_with(node: Node) -> float | None:
    """The number that all elements of the node's result are, whatever its arguments hold."""
    if node.op in _FILLS:
        return _FILLS[node.op]
    value = node.args[_FULL[node.op]] if node.op in _FULL else None
    return value if isinstance(value, int | float) else None


def _undoes(node: Node, maker: Node) -> bool:
    """Whether one takes back what the other did: two transpositions, or two changes of sign."""
    if node.op in _NEGATIONS:
        return maker.op in _NEGATIONS
    return _transposes(node) and _transposes(maker)


def _transposes(node: Node) -> bool:
    if node.op is _ATEN.permute.default:
        return tuple(node.args[1]) == (1, 0)
    return node.op is _ATEN.t.default


def _ones(constant: Tensor) -> bool:
    return bool((constant == 1).all())


def _key(node: Node) -> Any:
    """Equal for nodes that compute the same."""
    return node.op, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_hashable(part) for part in value)
    # 1, 1.0 and True are equal, and not the same argument.
    return type(value).__name__, value

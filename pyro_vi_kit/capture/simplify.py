"""Leave out of a recording what changes nothing: a replay takes as long as it has operations.

Autograd and distributions leave many: a detach, a view of a view, a factor of one, a term of zero, all
rows by their indices, a value that is computed twice or from constants. What remains gives the same
numbers, bit for bit but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph, Node, Ref
from pyro_vi_kit.capture.joins import Joins
from pyro_vi_kit.capture.layout import Layout, looks_at

_ATEN = torch.ops.aten
_ALIASES = {_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default}
_PRODUCTS = {_ATEN.mul.Tensor, _ATEN.mul.Scalar}
_QUOTIENTS = {_ATEN.div.Tensor, _ATEN.div.Scalar}
_SUMS = {_ATEN.add.Tensor, _ATEN.add.Scalar}
_DIFFERENCES = {_ATEN.sub.Tensor, _ATEN.sub.Scalar}
_POWERS = {_ATEN.pow.Tensor_Scalar}
_NEGATIONS = {_ATEN.neg.default}
_VIEW = _ATEN.view.default
# Results that depend on a tensor's shape alone.
_FILLS = {
    _ATEN.zeros_like.default: 0.0,
    _ATEN.ones_like.default: 1.0,
    _ATEN.new_zeros.default: 0.0,
    _ATEN.new_ones.default: 1.0,
}
# And where they have the number.
_FULL = {_ATEN.full_like.default: 1, _ATEN.new_full.default: 2, _ATEN.fill.Scalar: 1}
_LARGEST_CONSTANT = 2**16


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
        # What views look at, through other views.
        self._roots: dict[str, str] = {}
        self._known: dict[Any, tuple[str, ...]] = {}
        self._makers: dict[str, Node] = {}
        self._joins = Joins(layouts)

    def graph(self) -> Graph:
        """What is left."""
        nodes = []
        for node in self._graph.nodes:
            kept = self._kept(node)
            if kept is not None:
                nodes.extend(self._joins.replaced(kept))
        outputs = [self._same.get(name, name) for name in self._graph.outputs]
        return Graph(self._graph.inputs, outputs, nodes, self._constants, self._graph.noise)

    def _kept(self, node: Node) -> Node | None:
        """The node with its arguments renamed, or None where its result is known already."""
        args = tuple(self._renamed(value) for value in node.args)
        kwargs = {key: self._renamed(value) for key, value in node.kwargs.items()}
        node = Node(node.op, args, kwargs, node.outputs, node.many, node.writes)
        if len(node.outputs) != 1 or node.many or _draws(node):
            return node
        (name,) = node.outputs
        other = self._identity(node)
        if other is not None:
            self._same[name] = other
            return None
        value = _filled_with(node)
        if value is not None and self._fill(name, value):
            return None
        if self._fold(node):
            return None
        node = self._shorter(node)
        key = _key(node)
        if key in self._known:
            self._same[name] = self._known[key][0]
            return None
        self._known[key] = node.outputs
        self._makers[name] = node
        return node

    def _shorter(self, node: Node) -> Node:
        """A node of the same result that is cheaper or better known."""
        (name,) = node.outputs
        root = looks_at(node, self._layouts)
        if root is not None:
            root = self._roots[name] = self._roots.get(root, root)
            shape = self._layouts[name].shape
            return Node(_VIEW, (Ref(root), shape), {}, (name,), False, False)
        if node.op is _ATEN.fill.Scalar:
            # TorchScript makes one of it, wrongly, where what is filled is empty.
            return Node(_ATEN.full_like.default, node.args, {}, (name,), False, False)
        if node.op is _ATEN.mul.Tensor:
            for factor, other in (node.args, node.args[::-1]):
                alike = isinstance(other, Ref) and self._alike(other.name, name)
                if alike and self._is(factor, -1):
                    return Node(_ATEN.neg.default, (other,), {}, (name,), False, False)
        return node

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(self._same.get(value.name, value.name))
        if isinstance(value, tuple | list):
            return tuple(self._renamed(part) for part in value)
        return value

    def _identity(self, node: Node) -> str | None:
        """The tensor that the node's result is equal to, if it is one of its arguments."""
        if node.op in _ALIASES:
            return node.args[0].name
        (name,) = node.outputs
        looked_at = looks_at(node, self._layouts)
        if looked_at is not None:
            root = self._roots.get(looked_at, looked_at)
            return next((same for same in (looked_at, root) if self._alike(same, name)), None)
        first = node.args[0] if node.args else None
        if not isinstance(first, Ref) or node.kwargs:
            return None
        maker = self._makers.get(first.name)
        if maker is not None and _undoes(node, maker):
            original = maker.args[0].name
            return original if self._alike(original, name) else None
        if self._alike(first.name, name) and self._leaves(node):
            return first.name
        return self._other_operand(node)

    def _leaves(self, node: Node) -> bool:
        """Whether what stands behind the first argument changes nothing."""
        if node.op is _ATEN.expand.default:
            return True
        if node.op is _ATEN.index.Tensor:
            return self._takes_all(node)
        second = node.args[1] if len(node.args) > 1 else None
        if node.op in _PRODUCTS | _QUOTIENTS | _POWERS:
            return self._is(second, 1)
        return node.op in _SUMS | _DIFFERENCES and self._is(second, 0)

    def _takes_all(self, node: Node) -> bool:
        """Whether rows are picked by 0, 1, 2, ..., as plates do that are not subsampled."""
        picked = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]
        if len(picked) != 1:
            return False
        ((dim, index),) = picked
        rows = self._constants.get(index.name)
        size = self._layouts[node.args[0].name].shape[dim]
        if rows is None or rows.dtype != torch.int64 or rows.shape != (size,):
            return False
        return torch.equal(rows, torch.arange(size, device=rows.device))

    def _other_operand(self, node: Node) -> str | None:
        """The second factor where the first is one, or the second term where the first is zero."""
        if node.op not in (_ATEN.mul.Tensor, _ATEN.add.Tensor):
            return None
        first, second = node.args
        if not isinstance(second, Ref) or not self._alike(second.name, node.outputs[0]):
            return None
        return second.name if self._is(first, 1 if node.op is _ATEN.mul.Tensor else 0) else None

    def _is(self, value: Any, number: int) -> bool:
        """Whether an argument is this number, or a constant that holds nothing else."""
        if isinstance(value, Ref):
            constant = self._constants.get(value.name)
            small = constant is not None and constant.numel() <= _LARGEST_CONSTANT
            return small and bool((constant == number).all())
        return isinstance(value, int | float) and value == number

    def _alike(self, one: str, other: str) -> bool:
        """Whether two names stand for tensors of the same layout.

        Strides matter too: what comes next may be a view that only one of them allows.
        """
        layout = self._layouts.get(one)
        return layout is not None and layout == self._layouts.get(other)

    def _fill(self, name: str, value: float) -> bool:
        """Make a result a constant of one number; whether that was possible."""
        made = self._layouts.get(name)
        if made is None or made.numel > _LARGEST_CONSTANT:
            return False
        filled = torch.full(made.shape, value, dtype=made.dtype, device=made.device)
        return self._keep(name, filled)

    def _fold(self, node: Node) -> bool:
        """Compute what depends on constants alone; whether it does."""
        (name,) = node.outputs
        read = set(node.reads())
        made = self._layouts.get(name)
        if not read or not self._constants.keys() >= read:
            return False
        if made is None or made.numel > _LARGEST_CONSTANT:
            return False
        return self._keep(name, node.run(self._constants))

    def _keep(self, name: str, value: Tensor) -> bool:
        """Make a result a constant, unless it lies in memory otherwise."""
        if Layout.of(value) != self._layouts[name]:
            return False
        self._constants[name] = value
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


def _draws(node: Node) -> bool:
    """Whether it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in node.op.tags


def _key(node: Node) -> Any:
    """Equal for nodes that compute the same."""
    return node.op, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_hashable(part) for part in value)
    # 1, 1.0 and True are equal, and not the same argument.
    return type(value).__name__, value

"""Sums of parts that do not overlap, as autograd leaves them behind slices: one chain of the parts.

The gradient of a vector that was cut into sites is a sum of vectors, each zero but for one site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pyro_vi_kit.capture.graph import Node, Ref
from pyro_vi_kit.capture.layout import Layout

_ATEN = torch.ops.aten
_SLICE, _SELECT = _ATEN.slice_backward.default, _ATEN.select_backward.default
_ADD, _CAT, _UNSQUEEZE = _ATEN.add.Tensor, _ATEN.cat.default, _ATEN.unsqueeze.default


class _Piece(NamedTuple):
    """A part: where it begins and ends, its tensor, and whether that lacks the dimension."""

    start: int
    end: int
    name: str
    flat: bool


class _Padded(NamedTuple):
    """A tensor that is zero beside its pieces."""

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[_Piece, ...]


class Joins:
    """Notes the parts of a graph, node by node.

    Args:
        layouts: Of what the graph's names stand for.
    """

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        self._layouts = layouts
        self._padded: dict[str, _Padded] = {}

    def replaced(self, node: Node) -> list[Node]:
        """The nodes that compute what this one does, with the same last output; itself mostly."""
        found = self._part(node) if node.op in (_SLICE, _SELECT) else self._sum(node)
        if found is None:
            return [node]
        (name,) = node.outputs
        self._padded[name] = found
        whole = self._layouts.get(name)
        if node.op is not _ADD or whole is None or not whole.contiguous or not _covered(found):
            return [node]
        return list(self._chain(found, name))

    def _part(self, node: Node) -> _Padded | None:
        source, shape, dim, *where = node.args
        if not isinstance(source, Ref) or node.kwargs:
            return None
        dim = dim % len(shape)
        size = shape[dim]
        if node.op is _SELECT:
            start, end = where[0] % size, where[0] % size + 1
        else:
            start, end, step = where
            start, end = (min(at + size if at < 0 else at, size) for at in (start, end))
            if step != 1:
                return None
        return _Padded(tuple(shape), dim, (_Piece(start, end, source.name, node.op is _SELECT),))

    def _sum(self, node: Node) -> _Padded | None:
        if node.op is not _ADD or node.kwargs:
            return None
        first, second = (self._known(value) for value in node.args)
        if first is None or second is None or first[:2] != second[:2]:
            return None
        pieces = tuple(sorted(first.pieces + second.pieces))
        apart = all(a.end <= b.start for a, b in pairwise(pieces))
        return _Padded(first.shape, first.dim, pieces) if apart else None

    def _known(self, value: Any) -> _Padded | None:
        return self._padded.get(value.name) if isinstance(value, Ref) else None

    def _chain(self, padded: _Padded, name: str) -> Iterator[Node]:
        parts = []
        for position, piece in enumerate(padded.pieces):
            part = piece.name
            if piece.flat:
                part = f"{name}p{position}"
                yield Node(_UNSQUEEZE, (Ref(piece.name), padded.dim), {}, (part,), False, False)
            parts.append(Ref(part))
        yield Node(_CAT, (tuple(parts), padded.dim), {}, (name,), False, False)


def _covered(padded: _Padded) -> bool:
    """Whether the pieces leave no gap."""
    return sum(p.end - p.start for p in padded.pieces) == padded.shape[padded.dim]

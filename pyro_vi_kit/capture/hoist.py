"""Compute once what depends on held inputs alone: `lgamma(y + 1)`, a transposed design matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph, Node

# Bytes that are kept for as long as the graph is.
_LARGEST = 2**26


def hoisted(graph: Graph, changing: int, held: Sequence[Tensor]) -> tuple[Graph, list[Tensor]]:
    """The graph without what is the same in every call, and the tensors that take its place.

    Args:
        graph: A recording whose inputs are ``changing`` ones, then ``held``, then noise.
        changing: How many inputs are others in each call.
        held: The inputs that are not.

    Returns:
        A graph whose held inputs are other ones, and what these are: those of ``held`` that are still
        read, then results of what was taken out. They are inputs, so that graphs of other data are
        equal.
    """
    names = graph.inputs[changing : changing + len(held)]
    if not held or any(node.writes for node in graph.nodes):
        return graph, list(held)
    known = dict(zip(names, held, strict=True)) | graph.constants
    late = _late(graph, known)
    read = {name for node in late for name in node.reads()} | set(graph.outputs)
    rest = [name for name in known if name in read and name not in graph.constants]
    first, noise = graph.inputs[:changing], graph.inputs[changing + len(held) :]
    constants = {name: value for name, value in graph.constants.items() if name in read}
    whole = Graph(first + rest + noise, graph.outputs, late, constants, graph.noise)
    return whole, [known[name] for name in rest]


def _late(graph: Graph, known: dict[str, Tensor]) -> list[Node]:
    """The nodes that are left when those that known tensors suffice for have run; adds their results."""
    late = []
    outputs = set(graph.outputs)
    for node in graph.nodes:
        free = torch.Tag.nondeterministic_seeded not in node.op.tags
        # A result that is handed out belongs to whoever gets it.
        if free and known.keys() >= set(node.reads()) and outputs.isdisjoint(node.outputs):
            with torch.no_grad():
                result = node.run(known)
            results = list(result) if node.many else [result]
            if sum(tensor.untyped_storage().nbytes() for tensor in results) <= _LARGEST:
                known.update(zip(node.outputs, results, strict=True))
                continue
        late.append(node)
    return late

"""How tensors of a recording lie in memory, and which operations only look at them otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Node, Ref

_ATEN = torch.ops.aten
# Where they leave the number of elements as it is, these leave the elements as they are.
_LOOKS = {
    _ATEN.expand.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.reshape.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.select.int,
    _ATEN.slice.Tensor,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.t.default,
    _ATEN.stack.default,
    _ATEN.cat.default,
    _ATEN.sum.default,
    _ATEN.sum.dim_IntList,
    _ATEN.select_backward.default,
    _ATEN.slice_backward.default,
}


class Layout(NamedTuple):
    """How a tensor lay in memory when it came to be; `squeeze_` and its like change that later.

    A dimension of one element has no stride to speak of: 1 here.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """A tensor's layout now."""
        shape = tuple(tensor.shape)
        stride = tuple(
            1 if size == 1 else step for size, step in zip(shape, tensor.stride(), strict=True)
        )
        return cls(shape, stride, tensor.dtype, tensor.device)

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether elements lie one behind another."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def looks_at(node: Node, layouts: Mapping[str, Layout]) -> str | None:
    """The tensor whose elements, in their order, are the node's result in another shape, if any."""
    if node.op not in _LOOKS or not node.args:
        return None
    first = node.args[0]
    if isinstance(first, tuple) and len(first) == 1:
        first = first[0]  # a stack or a chain of one
    if not isinstance(first, Ref):
        return None
    before, after = layouts.get(first.name), layouts.get(node.outputs[0])
    if before is None or after is None or not (before.contiguous and after.contiguous):
        return None
    same = (before.numel, before.dtype, before.device) == (after.numel, after.dtype, after.device)
    return first.name if same and before.numel else None

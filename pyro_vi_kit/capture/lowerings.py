"""How the compiler writes small matrix products, and numbers that all elements share.

Loaded by `worker`, into a process that compiles one graph and ends; imports nothing of this package.

A product of small matrices takes longer to call (two microseconds) than to compute, and one call keeps
the compiler from laying intermediate tensors on the stack. Here such a product becomes plain loops, over
operands that are in memory: computed inside of the loops, they would be computed again for each element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.virtualized import ops

_ATEN = torch.ops.aten
# Multiplications in one product. Beyond, a library that blocks and prefetches is faster.
_LARGEST = 2**14
# The inner sum is written out, term by term.
_LONGEST = 64
# Functions that take long. Of one number, they are called once, not again for each element of what
# the number goes into.
_COSTLY = (
    _ATEN.pow.Scalar,
    _ATEN.pow.Tensor_Scalar,
    _ATEN.pow.Tensor_Tensor,
    _ATEN.exp.default,
    _ATEN.log.default,
)


def install() -> None:
    """Have the compiler use them, in this process."""
    for op in (_ATEN.mm.default, _ATEN.bmm.default):
        lowering.lowerings[op] = _product_or(lowering.lowerings[op])
    addmm = _ATEN.addmm.default
    lowering.lowerings[addmm] = _sum_and_product_or(lowering.lowerings[addmm])
    for op in _COSTLY:
        lowering.lowerings[op] = _once(lowering.lowerings[op])


def _product_or(usual: Any) -> Any:
    def lowered(a: Any, b: Any, **options: Any) -> Any:
        if options or not _small(a, b):
            return usual(a, b, **options)
        return _product(a, b)

    return lowered


def _sum_and_product_or(usual: Any) -> Any:
    def lowered(c: Any, a: Any, b: Any, *, alpha: Any = 1, beta: Any = 1, **options: Any) -> Any:
        if options or beta != 1 or alpha not in (1, -1) or not _small(a, b):
            return usual(c, a, b, alpha=alpha, beta=beta, **options)
        combine = _ATEN.add.Tensor if alpha == 1 else _ATEN.sub.Tensor
        return lowering.lowerings[combine](c, _product(a, b))

    return lowered


def _once(usual: Any) -> Any:
    def lowered(*args: Any, **options: Any) -> Any:
        result = usual(*args, **options)
        if all(size == 1 for size in result.get_size()):
            result.realize()
        return result

    return lowered


def _small(a: Any, b: Any) -> bool:
    """Whether a product `[..., M, K] [..., K, N]` is worth writing out."""
    rows, inner, columns = (int(size) for size in (*a.get_size()[-2:], b.get_size()[-1]))
    floating = a.get_dtype() in (torch.float32, torch.float64)
    return floating and 0 < inner <= _LONGEST and 0 < rows * inner * columns <= _LARGEST


def _product(a: Any, b: Any) -> Any:
    """Loops over rows and columns; along a row of ``b`` and of the result they are vectorised."""
    a.realize()
    b = ir.ExternKernel.realize_input(b)
    if int(b.get_stride()[-1]) != 1:
        b = ir.ExternKernel.require_contiguous(b)
    inner = int(a.get_size()[-1])
    left, right = a.make_loader(), b.make_loader()

    def element(index: Any) -> Any:
        *batch, row, column = index
        total = None
        for k in range(inner):
            term = ops.mul(left([*batch, row, k]), right([*batch, k, column]))
            total = term if total is None else ops.add(total, term)
        return total

    return ir.Pointwise.create(
        device=a.get_device(),
        dtype=a.get_dtype(),
        inner_fn=element,
        ranges=[*a.get_size()[:-1], b.get_size()[-1]],
    )

"""What Pyro's and torch's own code does that vectorised or captured runs cannot, and what it means.

Nothing is changed at import: these are contexts around our own runs, and their results are compared
with a plain loop before they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.ops import special
from torch import Tensor
from torch.distributions import Distribution, transforms

from pyro_vi_kit.core.runtime import if_forked
from pyro_vi_kit.model.log_density import supports

_NO_DIMS = torch.Size()
_original_triangle = transforms.vec_to_tril_matrix


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Run without what neither vmap nor a capture can follow, and what it does not need.

    An explicit ``validate_args=True`` is ignored, whose checks branch on values. Pyro's safe logarithm
    (behind `DiscreteHMM`) is written with torch functions; its own is an autograd function of the old
    kind. Triangular matrices (behind `LKJCholesky`) are filled and read by integer indices; torch's
    boolean ones have a number of results that no graph can know. Call it under the lock of `runtime`;
    the first runs of a model do without.
    """
    swaps = [
        (Distribution, "__init__", _unvalidated(Distribution.__init__)),
        (special, "_SafeLog", _SafeLog),
        (transforms, "tril_matrix_to_vec", _below_diagonal),
        (transforms, "vec_to_tril_matrix", _triangular),
    ]
    before = [getattr(owner, name) for owner, name, _ in swaps]

    def give_back() -> None:
        for (owner, name, _), old in zip(swaps, before, strict=True):
            setattr(owner, name, old)

    with if_forked(give_back):
        for owner, name, new in swaps:
            setattr(owner, name, new)
        try:
            yield
        finally:
            give_back()


def _unvalidated(init: Callable[..., None]) -> Callable[..., None]:
    """A distribution's constructor that leaves validation to the global switch, and to `supports`."""

    def unvalidated(
        self: Any,
        batch_shape: torch.Size = _NO_DIMS,
        event_shape: torch.Size = _NO_DIMS,
        validate_args: bool | None = None,
    ) -> None:
        init(self, batch_shape, event_shape)
        if validate_args is not False:
            supports.note(self)

    return unvalidated


def _below_diagonal(mat: Tensor, diag: int = 0) -> Tensor:
    """The entries on and below a diagonal, row by row: `[..., n, n] -> [..., m]`."""
    row, column = torch.tril_indices(mat.shape[-1], mat.shape[-1], diag, device=mat.device)
    return mat[..., row, column]


def _triangular(vec: Tensor, diag: int = 0) -> Tensor:
    """The inverse of `_below_diagonal`, zero above."""
    below = _original_triangle(torch.ones(vec.shape[-1], device=vec.device), diag) > 0
    if vec.shape[-1] == 0:
        return vec.new_zeros(*vec.shape[:-1], *below.shape)
    place = (below.flatten().cumsum(0) - 1).clamp(min=0)
    matrix = vec[..., place].reshape(*vec.shape[:-1], *below.shape)
    return torch.where(below, matrix, torch.zeros_like(matrix))


class _SafeLog:
    """The logarithm, -inf at 0 without an infinite gradient there."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        tiny = torch.finfo(x.dtype).tiny
        return torch.where(x < tiny, x.detach().log(), x.clamp(min=tiny).log())

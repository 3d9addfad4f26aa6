"""What Pyro's and torch's own code does that vectorised or captured runs cannot, and what it means.

Nothing is changed at import: these are contexts around our own runs, and their results are compared
with a plain loop before they are used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.ops import special
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.distributions import Distribution, transforms
from torch.overrides import TorchFunctionMode

from pyro_vi_kit.core.runtime import if_forked
from pyro_vi_kit.model.log_density import domain

_FACTORIES = (
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.tensor,
    torch.eye,
    torch.arange,
    torch.linspace,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
    Tensor.new_tensor,
)
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
    """A distribution's constructor that leaves validation to the global switch, and to `domain`."""

    def unvalidated(
        self: Any,
        batch_shape: torch.Size = _NO_DIMS,
        event_shape: torch.Size = _NO_DIMS,
        validate_args: bool | None = None,
    ) -> None:
        init(self, batch_shape, event_shape)
        if validate_args is not False:
            domain.note(self)

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


class Mended(TorchFunctionMode):
    """Lets `torch.func.vmap` run models, and parts of Pyro, that write in place.

    New floating tensors depend on the particle, so that particles can be written into them; ``.data``
    is a detached view; a value written where a mask holds is a `torch.where`; and in-place clamps and
    scattering by a mask, for which vmap has no rule, write what these give.

    Args:
        zero: A zero that vmap sees as batched.
        everything: Whether that holds for what is computed from data too, copies of them among it. It
            takes memory and time for each particle.
    """

    def __init__(self, zero: Tensor, everything: bool = False) -> None:
        super().__init__()
        self.zero = zero
        self.everything = everything

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        mend = _MENDS.get(func)
        result = NotImplemented if mend is None else mend(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        new = func in _FACTORIES or (self.everything and _is_new(result, args))
        return result + self.zero.to(result.dtype) if new else result


def _is_new(result: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a result has memory of its own that no particle is in."""
    with torch._C.DisableTorchFunction():
        if is_batchedtensor(result) or any(result is value for value in args):
            return False
        return not result._is_view()


def _write_where(target: Tensor, mask: Any, value: Any) -> Any:
    """``target[mask] = value`` for one value and a mask of the same shape, or of leading dims."""
    plain = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    if not (plain and isinstance(mask, Tensor) and mask.dtype == torch.bool):
        return NotImplemented
    while mask.dim() < target.dim():
        mask = mask.unsqueeze(-1)
    target.copy_(torch.where(mask, torch.as_tensor(value, dtype=target.dtype), target))
    return None


def _clamp(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return target.copy_(target.clamp(*args, **kwargs))


def _scatter(source: Tensor, mask: Any, values: Tensor) -> Any:
    """``masked_scatter`` by integer indices, where the mask is the same for all particles."""
    if is_batchedtensor(mask) or mask.shape != source.shape:
        return NotImplemented
    place = mask.nonzero(as_tuple=True)
    return source.index_put(place, values.reshape(-1)[: len(place[0])])


def _scatter_in_place(target: Tensor, mask: Any, values: Tensor) -> Any:
    found = _scatter(target, mask, values)
    return found if found is NotImplemented else target.copy_(found)


_MENDS: dict[Any, Callable[..., Any]] = {
    torch.masked_scatter: _scatter,
    Tensor.masked_scatter: _scatter,
    Tensor.masked_scatter_: _scatter_in_place,
    Tensor.data.__get__: lambda tensor: tensor.detach(),  # type: ignore[attr-defined]
    Tensor.__setitem__: _write_where,
    Tensor.clamp_: _clamp,
}


class VectorisedCauchy(TorchFunctionMode):
    """`Tensor.cauchy_`, for which vmap has no rule, by the inverse of the distribution function.

    Half-Cauchy priors are common, and a point-by-point draw of hundreds takes longer than NUTS.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _cauchy if func is Tensor.cauchy_ else func
        return found(*args, **(kwargs or {}))


def _cauchy(like: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(math.pi * (torch.rand_like(like) - 0.5))

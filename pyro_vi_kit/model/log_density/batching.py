"""Evaluate a single-point function for K particles: in one vectorised pass, or point by point."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pyro_vi_kit.core.errors import in_words

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

Batching = Literal["vmap", "lift", "lift_all", "loop"]


def batched(
    single: Callable[[dict[str, Tensor]], Any], z: Mapping[str, Tensor], mode: Batching
) -> Any:
    """Apply ``single`` to each of K points and stack what it returns.

    Args:
        single: From one point, by site name, to any nest of tensors.
        z: Points, each entry `[K, ...]`.
        mode: ``vmap``; ``lift``, vmap for models that write into tensors, with `Mended`;
            ``lift_all``, the same for models that write into copies of data; ``loop``, one point after
            another: always right, and the oracle for the others.
    """
    points = dict(z)
    if mode == "loop":
        size = next(iter(points.values())).shape[0]
        results = [single({name: value[k] for name, value in points.items()}) for k in range(size)]
        return _stack(results)
    if mode in ("lift", "lift_all"):
        lifted = _lifted(single, everything=mode == "lift_all")
        return torch.func.vmap(lifted, randomness="different")(points)
    return torch.func.vmap(single, randomness="different")(points)


def first_that_agrees(
    found: Callable[[Batching], tuple[Tensor, ...]], exact: tuple[Tensor, ...]
) -> tuple[Batching, str]:
    """The first vectorised way that gives what the loop gives; the loop where none does.

    Args:
        found: Evaluates values and gradients in one way.
        exact: What the loop gave.

    Returns:
        The way, and why it is the loop, in words: what the plainest way failed by.
    """
    reasons = []
    modes: tuple[Batching, ...] = ("vmap", "lift", "lift_all")
    for mode in modes:
        try:
            with warnings.catch_warnings():
                # Where vmap has a slow rule only, the next way may have a fast one.
                warnings.filterwarnings("error", message="There is a performance drop")
                results = found(mode)
        except Exception as error:  # noqa: BLE001  whatever vmap cannot do, the loop can
            reasons.append(in_words(error))
            continue
        if all(agree(a, b, 1e-7, 1e-3) for a, b in zip(results, exact, strict=True)):
            return mode, ""
        reasons.append("all points at once, the model gives other numbers")
    return "loop", reasons[0]


def agree(one: Tensor, other: Tensor, double: float, single: float) -> bool:
    """Whether two results are the same up to rounding, NaN in the same places.

    Args:
        one: A result.
        other: Another one.
        double: What may differ in float64, relative and absolute.
        single: The same in float32.
    """
    tolerance = double if one.dtype == torch.float64 else single
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _lifted(
    single: Callable[[dict[str, Tensor]], Any], everything: bool
) -> Callable[[dict[str, Tensor]], Any]:
    def run(point: dict[str, Tensor]) -> Any:
        zero = sum(value.reshape(-1)[:1].sum() for value in point.values()) * 0.0
        with Mended(zero, everything):  # type: ignore[arg-type]
            return single(point)

    return run


def _stack(results: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), results[0], *results[1:])


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

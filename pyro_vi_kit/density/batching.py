"""Evaluate a single-point function for K particles: in one vectorised pass, or point by point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Batching = Literal["vmap", "lift", "loop"]

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


class _Lift(TorchFunctionMode):
    """Makes new floating tensors depend on the particle: vmap then lets the model write into them.

    Args:
        zero: A zero that vmap sees as batched.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES and isinstance(result, Tensor) and result.is_floating_point():
            return result + self.zero.to(result.dtype)
        return result


def batched(
    single: Callable[[dict[str, Tensor]], Any], z: Mapping[str, Tensor], mode: Batching
) -> Any:
    """Apply ``single`` to each of K points and stack what it returns.

    Args:
        single: From one point, by site name, to any nest of tensors.
        z: Points, each entry `[K, ...]`.
        mode: ``vmap``; ``lift``, vmap for models that write into tensors they make; ``loop``, one
            point after another: always right, and the oracle for the others.
    """
    points = dict(z)
    if mode == "loop":
        size = next(iter(points.values())).shape[0]
        results = [single({name: value[k] for name, value in points.items()}) for k in range(size)]
        return _stack(results)
    if mode == "lift":
        return torch.func.vmap(_lifted(single), randomness="different")(points)
    return torch.func.vmap(single, randomness="different")(points)


def _lifted(single: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Tensor]], Any]:
    def run(point: dict[str, Tensor]) -> Any:
        zero = sum(value.reshape(-1)[:1].sum() for value in point.values()) * 0.0
        with _Lift(zero):  # type: ignore[arg-type]
            return single(point)

    return run


def _stack(results: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), results[0], *results[1:])

"""Evaluate a single-point function for K particles: in one vectorised pass, or point by point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_vi_kit.core.errors import in_words
from pyro_vi_kit.model.log_density.compat import Mended

Batching = Literal["vmap", "lift", "lift_all", "loop"]


def batched(
    single: Callable[[dict[str, Tensor]], Any], z: Mapping[str, Tensor], mode: Batching
) -> Any:
    """Apply ``single`` to each of K points and stack what it returns.

    Args:
        single: From one point, by site name, to any nest of tensors.
        z: Points, each entry `[K, ...]`.
        mode: ``vmap``; ``lift``, vmap for models that write into tensors, with `compat.Mended`;
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
    tolerance = 1e-7 if exact[0].dtype == torch.float64 else 1e-3
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
        if all(
            torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
            for a, b in zip(results, exact, strict=True)
        ):
            return mode, ""
        reasons.append("all points at once, the model gives other numbers")
    return "loop", reasons[0]


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

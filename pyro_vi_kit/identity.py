"""What a fit is, in plain words and numbers: only the same one may go on from a checkpoint."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.density import Density
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.request import Request
from pyro_vi_kit.storage import latents_of


def of(
    request: Request,
    guide: object,
    trainee: Guide | Callable[..., Any],
    density: Density | None,
    earlier: Posterior | None,
) -> dict[str, Any]:
    """All that the numbers of a fit depend on, but for the time it is given.

    Args:
        request: Its options.
        guide: What ``guide=`` stands for.
        trainee: The guide itself.
        density: The model's Density, where it has one.
        earlier: The fit it goes on from with ``resume=``.
    """
    return {
        "model": request.model.name,
        "latents": None if density is None else latents_of(density),
        "data": None if density is None else digest(density.data),
        "guide": _guide(guide),
        "parameters": _shapes(trainee),
        "objective": [request.objective.name, _plain(request.objective)],
        "engine": _engine(request.engine),
        "estimator": request.estimator,
        "dtype": None if density is None else str(density.dtype),
        "device": str(request.device if density is None else density.device),
        "seed": request.seed,
        "tol": request.tolerance if request.own_tolerance else None,
        "steps": request.steps,
        "init": repr(sorted(request.init.items()))
        if isinstance(request.init, Mapping)
        else request.init,
        "optimizer": None if request.optimizer is None else _callable(request.optimizer),
        "batch_size": _described(request.batch_size),
        "epochs": None if request.epochs is None else request.epochs.described(),
        "resume": None if earlier is None else [earlier.record.seed, len(earlier.losses)],
    }


def digest(tensors: list[Tensor]) -> str:
    """A checksum of data, with their shapes."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(repr((tuple(tensor.shape), str(tensor.dtype))).encode(), found)
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(flat.numpy().data, found)
    return f"{found:08x}"


def _engine(name: str) -> str:
    """How steps are executed: captured is what ``auto`` stands for."""
    return "captured" if name == "auto" else name


def _guide(guide: object) -> list[Any]:
    if isinstance(guide, GuideSpec):
        return [guide.name, _plain(guide)]
    return [guide.name if isinstance(guide, Guide) else _callable(guide), {}]


def _plain(options: Any) -> dict[str, Any]:
    """A dataclass's options, those that are no plain values by their type."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return {name: _described(value) for name, value in values.items()}


def _described(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_described(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _described(part) for key, part in value.items()}
    if dataclasses.is_dataclass(value):
        return [type(value).__qualname__, _plain(value)]
    return type(value).__qualname__


def _callable(function: Any) -> str:
    """A function's name, of a partial its options too."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    options: Mapping[str, Any] = getattr(function, "keywords", {})
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in sorted(options.items()))})"


def _shapes(trainee: object) -> list[list[Any]]:
    if not isinstance(trainee, Guide):
        return []
    return [[name, list(value.shape)] for name, value in trainee.state_dict().items()]

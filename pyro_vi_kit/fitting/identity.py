"""What a fit is, in plain words and numbers: only the same one may go on from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_vi_kit.core.errors import FileError, OptionError
from pyro_vi_kit.fitting.request import Request
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.model import fingerprint
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.posterior.storage import latents_of


def of(
    request: Request,
    guide: object,
    trainee: Guide | Callable[..., Any],
    density: Density | None,
    model_print: fingerprint.Fingerprint,
    earlier: Posterior | None,
) -> dict[str, Any]:
    """All that the numbers of a fit depend on, but for the time it is given.

    Args:
        request: Its options.
        guide: What ``guide=`` stands for.
        trainee: The guide itself.
        density: The model's Density, where it has one.
        model_print: What that computes.
        earlier: The fit it goes on from with ``resume=``.
    """
    return {
        "model": request.model.name,
        "latents": None if density is None else latents_of(density),
        "fingerprint": model_print,
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


def require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another fit.

    Args:
        path: The file.
        before: The fit that it is of.
        now: The one that is asked for.

    Raises:
        OptionError: If they differ; names what does.
        FileError: If what the file says of its fit cannot be read.
    """
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [f"{k} {before.get(k)!r}, now {now.get(k)!r}" for k in keys if k != "fingerprint"]
    remedy = " To change a fit that has ended, use resume="
    if "fingerprint" in keys and "latents" not in keys:
        found = _changed(path, before.get("fingerprint"), now["fingerprint"])
        if found is not None:
            told, remedy = [*told, found.words], ""
    if told:
        raise OptionError(
            f"checkpoint= {path} is of another fit ({'; '.join(told)}): ask for the same, name another "
            f"file, or delete it to begin anew.{remedy}"
        )


def _changed(
    path: Path, before: Any, now: fingerprint.Fingerprint
) -> fingerprint.Difference | None:
    try:
        return fingerprint.difference(before, now)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{path} is damaged: what it says of its model cannot be read; delete it to begin anew"
        ) from error


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

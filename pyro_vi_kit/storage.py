"""Saving a posterior as ArviZ netCDF that also holds the guide's tensors, and reading it back.

Numbers are stored as arrays and options as JSON. Nothing is ever pickled: a file from a stranger can
be wrong, and is refused then, but it cannot run code.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit import export, guides, objectives
from pyro_vi_kit.approximation import Approximation, GuideApproximation, TraceApproximation
from pyro_vi_kit.density import Density
from pyro_vi_kit.errors import FileError, ModelError, OptionError
from pyro_vi_kit.groups import coords_of
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model import Model
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.record import Record
from pyro_vi_kit.runtime import private_params
from pyro_vi_kit.types import Status

GROUP = "vi_guide"
_FORMAT = 1


def save(posterior: Posterior, path: str | Path, draws: int = 1000) -> Path:
    """Write a posterior; see `Posterior.save`."""
    target = export.check_writable(path)
    groups = posterior.groups(draws, seed=0)
    groups[GROUP] = _guide_group(posterior)
    coords = coords_of(posterior.model, groups)
    return export.write(export.to_arviz(groups, coords, posterior.attrs(0)), target)


def load(
    path: str | Path, model: Model, *, guide: GuideSpec | Callable[..., Any] | None = None
) -> Posterior:
    """Read a posterior that `Posterior.save` wrote.

    Args:
        path: The file.
        model: The model it is a posterior of, with its data.
        guide: The configured guide or Pyro guide, where the file cannot name it: one with an encoder
            of the user's, or a Pyro guide callable.

    Raises:
        FileError: If the file cannot be read or holds no posterior of this package.
        ModelError: If the model's latents are not those of the file.
        OptionError: If ``guide=`` is needed.
    """
    if not isinstance(model, Model):
        raise OptionError(f"load takes the vi.Model of the posterior, got {type(model).__name__}")
    datasets = export.datasets(export.read(path))
    if GROUP not in datasets:
        raise FileError(f"{path} holds no guide: it was not written by Posterior.save")
    dataset = datasets[GROUP]
    header = json.loads(dataset.attrs["header"])
    if header["format"] != _FORMAT:
        raise FileError(
            f"{path} has format {header['format']}, this version reads {_FORMAT}: upgrade pyro_vi_kit"
        )
    tensors = {
        name: torch.from_numpy(np.array(dataset[f"tensor_{i}"].values, dtype=dtype))
        for i, (name, dtype) in enumerate(header["tensors"])
    }
    record = _record(header, dataset["losses"].values)
    dtype = getattr(torch, header["dtype"])
    if header["guide"] is None:
        return _load_traced(path, model, guide, tensors, record, dtype)
    density = Density(model, dtype=dtype)
    _require_same_latents(path, header["latents"], density)
    spec = guide if isinstance(guide, GuideSpec) else _spec(path, header)
    built = guides.make(spec, density)
    state = {k.removeprefix("guide."): v for k, v in tensors.items() if k.startswith("guide.")}
    try:
        built.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the guide in {path} does not fit this model: {error}") from error
    params = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    approximation = GuideApproximation(header["guide"], built, params)
    return Posterior(model, approximation, record, density, spec)


def _guide_group(posterior: Posterior) -> export.Group:
    approximation = posterior.approximation
    tensors = _tensors(approximation)
    record, status = posterior.record, posterior.record.status
    header = {
        "format": _FORMAT,
        "guide": None,
        "options": None,
        "tensors": [(name, str(t.numpy().dtype)) for name, t in tensors.items()],
        "dtype": str(_dtype(posterior)).removeprefix("torch."),
        "objective": [record.objective.name, dataclasses.asdict(record.objective)],  # type: ignore[call-overload]
        "status": dataclasses.asdict(status),
        "record": {
            key: getattr(record, key)
            for key in ("method", "engine", "evaluations", "seconds", "seed", "bound", "skipped")
        },
    }
    if isinstance(approximation, GuideApproximation):
        header["guide"] = approximation.name
        header["options"] = _options(posterior.spec)
        header["latents"] = [
            [site.name, list(site.unconstrained_shape)] for site in approximation.density.latents
        ]
    variables = {f"tensor_{i}": t.numpy() for i, t in enumerate(tensors.values())}
    variables["losses"] = record.losses
    return export.Group(variables, sampled=False, attrs={"header": json.dumps(header)})


def _tensors(approximation: Approximation) -> dict[str, Tensor]:
    if isinstance(approximation, GuideApproximation):
        guide = {f"guide.{k}": v for k, v in approximation.guide.state_dict().items()}
        return guide | {f"model.{k}": v.detach() for k, v in approximation.params.items()}
    if isinstance(approximation, TraceApproximation):
        return {k: v.detach() for k, v in approximation.state["params"].items()}
    raise OptionError(f"{type(approximation).__name__} cannot be saved")


def _dtype(posterior: Posterior) -> torch.dtype:
    approximation = posterior.approximation
    if isinstance(approximation, GuideApproximation):
        return approximation.density.dtype
    return getattr(approximation, "dtype", torch.get_default_dtype())


def _options(spec: GuideSpec | None) -> dict[str, Any] | None:
    """The guide's options where JSON can hold them, else None."""
    if spec is None:
        return None
    options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}  # type: ignore[arg-type]
    try:
        json.dumps(options)
    except TypeError:
        return None
    return options


def _spec(path: str | Path, header: Mapping[str, Any]) -> GuideSpec:
    if header["options"] is None:
        raise OptionError(
            f"the guide in {path} has an option that a file cannot hold (an encoder module): pass the "
            f"configured guide, vi.load(path, model, guide=...) of kind {header['guide']!r}"
        )
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in header["options"].items()
    }
    return guides.specify(header["guide"], **options)


def _record(header: Mapping[str, Any], losses: np.ndarray) -> Record:
    name, options = header["objective"]
    return Record(
        objective=objectives.make(name, **options),
        status=Status(**header["status"]),
        losses=np.asarray(losses),
        **header["record"],
    )


def _require_same_latents(path: str | Path, saved: list[list[Any]], density: Density) -> None:
    here = [[site.name, list(site.unconstrained_shape)] for site in density.latents]
    if saved != here:
        raise ModelError(
            f"{path} is a posterior of latents {_words(saved)}; this model has {_words(here)}: load it "
            "with the model and data that it was fitted to"
        )


def _words(latents: list[list[Any]]) -> str:
    return ", ".join(f"{name}{tuple(shape)}" for name, shape in latents)


def _load_traced(
    path: str | Path,
    model: Model,
    guide: object,
    tensors: dict[str, Tensor],
    record: Record,
    dtype: torch.dtype,
) -> Posterior:
    """A user's Pyro guide: run once to declare its parameters, then given the stored values."""
    if guide is None or not callable(guide):
        raise OptionError(f"{path} holds the parameters of a Pyro guide: pass it, guide=my_guide")
    with private_params() as state:
        guide(*model.args, **model.kwargs)
    if set(state["params"]) != set(tensors):
        raise ModelError(
            f"{path} holds parameters {', '.join(tensors)}; this guide declares "
            f"{', '.join(state['params'])}"
        )
    for name, parameter in state["params"].items():
        parameter.data.copy_(tensors[name])
    return Posterior(model, TraceApproximation(model, guide, state, dtype, None), record, None)

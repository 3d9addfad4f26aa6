"""Saving a posterior as ArviZ netCDF that also holds the guide's tensors, and reading it back.

Numbers are stored as arrays and options as JSON. Nothing is ever pickled: a file from a stranger can
be wrong, and is refused then, but it cannot run code. The guide has a checksum of its own beside that of
the whole file, which is lost where ArviZ writes the file anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core import export
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.device import Device, checked, device_of
from pyro_vi_kit.core.errors import (
    FileError,
    ModelError,
    OptionError,
    OtherDataWarning,
    ViError,
    first_line,
)
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.user_guides import GuideSites, look_over
from pyro_vi_kit.model import fingerprint
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.runner import placed
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.optimize.engines.pyro import own_params
from pyro_vi_kit.posterior.approximation import (
    Approximation,
    GuideApproximation,
    SummedApproximation,
    TraceApproximation,
    TrainedGuide,
    approximation_of,
    marginal_of,
)
from pyro_vi_kit.posterior.record import Record, Rung

GROUP = "vi_guide"
_FORMAT = 3
_HISTORY = "history_"
# What of a record has a place of its own in a file.
_APART = ("objective", "status", "losses", "history", "ladder")


class Restored(NamedTuple):
    """What a file holds, over the user's model."""

    approximation: Approximation
    record: Record
    density: Density | None
    spec: GuideSpec | None


def guide_group(
    approximation: Approximation, record: Record, spec: GuideSpec | None
) -> export.Group:
    """Everything that `restore` needs, as arrays and a JSON header.

    Raises:
        OptionError: If the approximation is of a kind that cannot be saved.
    """
    tensors = {name: value.cpu().numpy() for name, value in _tensors(approximation).items()}
    header: dict[str, Any] = {
        "format": _FORMAT,
        "guide": None,
        "options": _options(spec),
        "tensors": [(name, str(array.dtype)) for name, array in tensors.items()],
        "dtype": str(approximation.dtype).removeprefix("torch."),
        "objective": [record.objective.name, dataclasses.asdict(record.objective)],  # type: ignore[call-overload]
        "status": dataclasses.asdict(record.status),
        "record": {
            field.name: getattr(record, field.name)
            for field in dataclasses.fields(record)
            if field.name not in _APART
        },
        "ladder": [dataclasses.asdict(rung) for rung in record.ladder],
    }
    if isinstance(approximation, GuideApproximation):
        header["guide"] = approximation.name
        header["latents"] = latents_of(approximation.density)
        header["tables"] = tables_of(approximation.guide)
        initial = approximation.density.initial()
        header["init"] = initial and {name: value.tolist() for name, value in initial.items()}
    variables = {f"tensor_{i}": array for i, array in enumerate(tensors.values())}
    variables["losses"] = record.losses
    variables |= {f"{_HISTORY}{name}": column for name, column in record.history.items()}
    text = json.dumps(header)
    attrs = {"header": text, "checksum": _checksum(text, variables)}
    return export.Group(variables, sampled=False, attrs=attrs, numbered=False)


def restore(
    path: str | Path,
    model: Model,
    guide: GuideSpec | Callable[..., Any] | None,
    device: Device | None = None,
) -> Restored:
    """Read what `guide_group` stored; see `load`.

    Warns:
        OtherDataWarning: If the model has other data.
    """
    with _telling_of_damage(path):
        header, tensors, record = _read(path)
        restored = _restored(path, model, guide, device, header, tensors, record)
        _require_same_model(path, model, restored)
    return restored


def _restored(
    path: str | Path,
    model: Model,
    guide: GuideSpec | Callable[..., Any] | None,
    device: Device | None,
    header: Mapping[str, Any],
    tensors: dict[str, Tensor],
    record: Record,
) -> Restored:
    dtype = getattr(torch, header["dtype"])
    if header["guide"] is None:
        where = checked(device) or device_of((model.args, dict(model.kwargs)))
        approximation, known = _traced(path, model, guide, tensors, dtype, where)
        return Restored(approximation, record, known, None)
    spec = guide if isinstance(guide, GuideSpec) else _spec(path, header)
    drawn, init = guides.drawn_of(spec), header.get("init")
    density = Density(model, dtype=dtype, device=device, drawn=drawn, init=init)
    before, now = header["latents"], latents_of(density)
    if before != now:
        raise ModelError(
            f"{path} is a posterior of latents {latents_in_words(before)}; this model has "
            f"{latents_in_words(now)}: load it with the model and data that it was fitted to"
        )
    built = _built(spec, density, header["tables"])
    try:
        built.load_state_dict(_part("guide.", tensors))
    except RuntimeError as error:
        raise ModelError(f"the guide in {path} does not fit this model: {error}") from error
    approximation = GuideApproximation(header["guide"], built, _part("model.", tensors))
    return Restored(approximation, record, density, spec)


def tables_of(guide: Guide) -> list[str]:
    """The plates whose rows have numbers of their own, other than tables that `build` makes itself."""
    spec = guides.REGISTRY.get(guide.name)
    encodes = spec is not None and spec.encodes
    return [
        plate.name
        for block, plate in guide.local_blocks
        if guide.table(block) is not None
        and (encodes or not all(site.states for site in block.sites))
    ]


def _built(spec: GuideSpec, density: Density, tables: Sequence[str]) -> Guide:
    """The guide of these options, untrained, with tables for these plates."""
    plates = [density.structure.plates[name] for name in tables]
    with RandomStream(0):
        if not plates:
            return spec.build(density)
        if spec.encodes:
            return guides.tabulated(spec.build(density), plates)
        return guides.per_datum(spec, density, plates)


def _require_same_model(path: str | Path, model: Model, restored: Restored) -> None:
    """Refuse another model than the file's, and say so where it has other data."""
    before = restored.record.fingerprint
    if before is None:
        return
    density = restored.density
    if density is None and before["sites"] is not None:
        with contextlib.suppress(ModelError):  # it may have been one that Pyro alone can run
            density = Density(model, dtype=getattr(torch, before["dtype"]))
    now = fingerprint.of_data(model) if density is None else fingerprint.of(density)
    found = fingerprint.difference(before, now)
    if found is None:
        return
    if not found.data:
        raise ModelError(
            f"{path} is a posterior of another model: {found.words}. Load it with the model as it was "
            "when it was fitted, or fit this one anew"
        )
    warnings.warn(
        f"{path} is a posterior of other data than this model has ({found.words}): draws and "
        "predictions are of the data that it was fitted to, while ELBO, k-hat and verdict hold it "
        "against those of this model. Load it with the data that it was fitted to, or fit these anew",
        OtherDataWarning,
        stacklevel=4,
    )


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], Record]:
    """Header, tensors by name, and how it was fitted."""
    datasets = export.datasets(export.read(path))
    if GROUP not in datasets:
        raise FileError(f"{path} holds no guide: it was not written by Posterior.save")
    dataset = datasets[GROUP]
    text = dataset.attrs["header"]
    header = json.loads(text)
    form = header["format"]
    if form != _FORMAT:
        raise FileError(
            f"{path} has format {form}, this version reads {_FORMAT}: load it with the version of "
            "pyro_vi_kit that wrote it, or fit and save it anew"
        )
    arrays = {
        f"tensor_{i}": np.array(dataset[f"tensor_{i}"].values, dtype=dtype)
        for i, (_, dtype) in enumerate(header["tensors"])
    }
    others = [name for name in map(str, dataset.data_vars) if name not in arrays]
    columns = {name: np.array(dataset[name].values) for name in others}
    if dataset.attrs["checksum"] != _checksum(text, arrays | columns):
        raise FileError(
            f"{path} is damaged: its guide's checksum is not that of what it holds. Restore it from "
            "a copy, or fit and save it anew"
        )
    losses = columns.pop("losses")
    history = {name.removeprefix(_HISTORY): column for name, column in columns.items()}
    names = [name for name, _ in header["tensors"]]
    tensors = dict(zip(names, map(torch.from_numpy, arrays.values()), strict=True))
    return header, tensors, _record(path, header, losses, history)


@contextlib.contextmanager
def _telling_of_damage(path: str | Path) -> Iterator[None]:
    """Tell whatever is raised by what is not as it was written as that."""
    try:
        yield
    except ViError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise FileError(
            f"{path} is damaged, or not of this version: its guide cannot be read "
            f"({type(error).__name__}: {first_line(error)}). Restore it from a copy, or fit and save it "
            "anew"
        ) from error


def _checksum(header: str, variables: Mapping[str, np.ndarray]) -> str:
    """Of the header and of all numbers, in whatever order they come."""
    found = hashlib.sha256(header.encode())
    for name in sorted(variables):
        array = np.ascontiguousarray(variables[name])
        if array.dtype.kind == "f":
            # Files keep that a number is NaN, but not which of many.
            array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def latents_of(density: Density) -> list[list[Any]]:
    """Name and unconstrained shape of each latent, as JSON holds them."""
    return [[site.name, list(site.unconstrained_shape)] for site in density.latents]


def _tensors(approximation: Approximation) -> dict[str, Tensor]:
    if isinstance(approximation, GuideApproximation):
        guide = {f"guide.{k}": v for k, v in approximation.guide.state_dict().items()}
        return guide | {f"model.{k}": v.detach() for k, v in approximation.params.items()}
    if isinstance(approximation, TraceApproximation | SummedApproximation):
        return {k: v.detach() for k, v in approximation.state["params"].items()}
    raise OptionError(f"{type(approximation).__name__} cannot be saved")


def _options(spec: GuideSpec | None) -> dict[str, Any] | None:
    """The guide's options where JSON can hold them, else None."""
    if spec is None:
        return None
    options = {f.name: _plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}  # type: ignore[arg-type]
    try:
        json.dumps(options)
    except TypeError:
        return None
    return options


def _plain(value: Any) -> Any:
    """An option as JSON has it: a part with options of its own by its class and them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__, "options": dataclasses.asdict(value)}
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _from_plain(value: Any) -> Any:
    """What `_plain` wrote."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict) and "class" in value:
        # By name from these alone: a file cannot say what is called.
        parts = (*guides.REGISTRY.values(), guides.LocalMixture, guides.LocalFlow, guides.Relaxed)
        known = {cls.__name__: cls for cls in parts}
        if value["class"] not in known:
            raise OptionError(
                f"an option of the guide is a {value['class']}, which is not registered: import "
                "the file that defines it, or pass the guide configured, vi.load(path, model, guide=...)"
            )
        options = {key: _from_plain(part) for key, part in value["options"].items()}
        return known[value["class"]](**options)
    if isinstance(value, dict):
        return {key: _from_plain(part) for key, part in value.items()}
    return value


def _spec(path: str | Path, header: Mapping[str, Any]) -> GuideSpec:
    if header["options"] is None:
        raise OptionError(
            f"the guide in {path} has an option that a file cannot hold (an encoder module): pass the "
            f"configured guide, vi.load(path, model, guide=...) of kind {header['guide']!r}"
        )
    _require_registered("guide", header["guide"], guides.REGISTRY, path)
    options = {key: _from_plain(value) for key, value in header["options"].items()}
    return guides.specify(header["guide"], **options)


def _require_registered(
    kind: str, name: str, registry: Mapping[str, Any], path: str | Path
) -> None:
    """Refuse a file whose guide or objective nobody knows here."""
    if name not in registry:
        remedy = (
            ", or pass it configured, vi.load(path, model, guide=...)" if kind == "guide" else ""
        )
        raise OptionError(
            f"{path} has {kind} {name!r}, which is not registered: import the file that defines it, "
            f"with @vi.{kind}s.register (vi-kit: --import FILE.py){remedy}"
        )


def _record(
    path: str | Path,
    header: Mapping[str, Any],
    losses: np.ndarray,
    history: Mapping[str, np.ndarray],
) -> Record:
    name, options = header["objective"]
    _require_registered("objective", name, objectives.REGISTRY, path)
    return Record(
        objective=objectives.make(name, **options),
        status=Status.of(header["status"]),
        losses=np.asarray(losses),
        history=history,
        ladder=tuple(Rung(**rung) for rung in header.get("ladder", ())),
        **header["record"],
    )


def latents_in_words(latents: list[list[Any]]) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{name}{tuple(shape)}" for name, shape in latents)


def _traced(
    path: str | Path,
    model: Model,
    guide: object,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[TraceApproximation | SummedApproximation, Density | None]:
    """A user's Pyro guide: run once to declare its parameters, then given the stored values."""
    if guide is None or not callable(guide):
        raise OptionError(f"{path} holds the parameters of a Pyro guide: pass it, guide=my_guide")
    model = placed(model, device)
    try:
        density = Density(model, dtype=dtype, device=device)
    except ModelError:
        density = None
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    params = {} if density is None else own_params(density, state)
    blank = TrainedGuide(model, guide, GuideSites(), state, params, dtype, density, device)
    with blank.running(0, "first run"):
        sites = look_over(model.fn, guide, *blank.arguments(), blank.name)
    if set(state["params"]) != set(tensors):
        raise ModelError(
            f"{path} holds parameters {', '.join(tensors)}; this guide and model declare "
            f"{', '.join(state['params'])}"
        )
    for name, parameter in state["params"].items():
        parameter.data.copy_(tensors[name])
    trained = dataclasses.replace(blank, sites=sites)
    return approximation_of(trained, marginal_of(model, sites, density, device)), density

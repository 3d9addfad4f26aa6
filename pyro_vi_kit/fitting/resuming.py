"""Going on from an earlier fit or a checkpoint: what it was, and whether it is the one asked for."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import FileError, ModelError, OptionError, OtherDataWarning
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.fitting.request import Options, Request
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.model import fingerprint
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.objectives import Objective
from pyro_vi_kit.posterior import Posterior, load
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.record import Record
from pyro_vi_kit.posterior.storage import latents_in_words, latents_of


def earlier_fit(
    resume: object, model: Model, guide: object, device: Device | None = None
) -> Posterior:
    """The posterior that ``resume=`` names.

    Args:
        resume: A posterior, or the path of a saved one.
        model: The model to go on with.
        guide: What ``guide=`` says, None where it says nothing.
        device: What ``device=`` says, for a saved one.

    Raises:
        OptionError: If it is neither, or its guide is another one.
        FileError: If the file cannot be read.
        ModelError: If the latents are not those of the model.
    """
    if isinstance(resume, str | Path):
        known: Any = None if isinstance(guide, str) else guide
        with warnings.catch_warnings():
            # Refused by `require_same_model`, in words that speak of resume=.
            warnings.simplefilter("ignore", OtherDataWarning)
            return load(resume, model, guide=known, device=device)
    if not isinstance(resume, Posterior):
        raise OptionError(
            f"resume= takes a posterior, or the path of a saved one, got {type(resume).__name__}"
        )
    return resume


def completed(options: Options, earlier: Posterior) -> Options:
    """The options of a fit that goes on: the earlier one's where nothing else is asked for."""
    record, found = earlier.record, Options(**options)
    if found.get("objective") is None:
        found["objective"] = objective_of(record)
    if (found.get("method"), record.method) == ("auto", "stochastic"):
        found["method"] = "stochastic"
    if (found.get("engine"), record.engine) == ("auto", "pyro"):
        found["engine"] = "pyro"
    if found.get("estimator") == "auto" and record.estimator not in (None, "dreg"):
        found["estimator"] = record.estimator
    if found.get("batch_size") is None:
        found["batch_size"] = record.batch_size
    if found.get("seed") is None:
        found["seed"] = seed_after(earlier)
    return found


def same_guide(earlier: Posterior, guide: object) -> GuideSpec | Guide | Callable[..., Any]:
    """The earlier fit's guide, before training.

    Raises:
        OptionError: If ``guide=`` names another one.
    """
    trained = earlier.approximation.guide  # type: ignore[attr-defined]
    own = earlier.spec if earlier.spec is not None else trained
    if guide is None or guide is trained:
        return own
    if isinstance(guide, str):
        if guides.specify(guide).name == earlier.guide:
            return own
    elif guide == earlier.spec:
        return own
    described = earlier.guide if earlier.spec is None else repr(earlier.spec)
    raise OptionError(
        f"resume= goes on with the guide of the earlier fit, {described}, and not with guide={guide!r}: "
        "leave guide= out, or start anew without resume="
    )


def trained_again(
    earlier: Posterior, model: Model, dtype: torch.dtype | None, device: torch.device | None = None
) -> tuple[Guide | Callable[..., Any], Density | None]:
    """The earlier fit's guide with its parameters, over this model, and the model's Density.

    Raises:
        ModelError: If the model's latents or learned parameters are not those of the earlier fit.
    """
    approximation = earlier.approximation
    if not isinstance(approximation, GuideApproximation):
        if device not in (None, approximation.device):  # type: ignore[attr-defined]
            raise OptionError(
                "a Pyro guide callable goes on where it was trained: leave device= out, or give the "
                "path of the saved fit as resume="
            )
        density = earlier.density
        if density is not None and model is not earlier.model:
            density = Density(
                model, dtype=density.dtype, device=density.device, init=density.initial()
            )
        return approximation.guide, density  # type: ignore[attr-defined]
    where = device or approximation.density.device
    density = Density(
        model,
        dtype=dtype or approximation.dtype,
        device=where,
        drawn=approximation.density.drawn,
        init=approximation.density.initial(),
    )
    _require_same("latents", latents_of(approximation.density), latents_of(density))
    before = {name: density.cast(value) for name, value in approximation.params.items()}
    _require_same("learned parameters", _shapes(before), _shapes(density.params))
    density.params = {
        name: before[name].clone().requires_grad_(value.requires_grad)
        for name, value in density.params.items()
    }
    return approximation.guide.moved_to(density), density


def require_same_model(earlier: Posterior, now: fingerprint.Fingerprint) -> None:
    """Refuse to go on with another model, or with other data.

    Args:
        earlier: The fit to go on from.
        now: The fingerprint of what is to be fitted.

    Raises:
        ModelError: If it does not compute what the earlier fit was made of; names the sites.
    """
    before = earlier.record.fingerprint
    found = None if before is None else fingerprint.difference(before, now)
    if found is not None:
        what = "other data" if found.data else "another model"
        raise ModelError(
            f"resume= is a fit of {what} ({found.words}): go on with the model and data that it was "
            "fitted to, or start anew without resume="
        )


def state_of(earlier: Posterior) -> dict[str, Any]:
    """A copy of the parameter store that a Pyro guide was trained in."""
    return copy.deepcopy(earlier.approximation.state)  # type: ignore[attr-defined]


def objective_of(record: Record) -> str | Objective:
    """What was maximised; by name where its options were those of the name.

    A schedule that has ended is not begun again: it ended at the ELBO.
    """
    objective = record.objective
    if objective.warmup:
        return "elbo"
    known = objective.name in objectives.REGISTRY
    return objective.name if known and objective == objectives.make(objective.name) else objective


def seed_after(earlier: Posterior) -> int:
    """A seed that follows from the earlier fit, and gives other numbers than it had."""
    return seed_of(earlier.record.seed, "resumed", len(earlier.record.losses)) >> 32


def told_as_one(earlier: Record, record: Record) -> Record:
    """The record of both fits: what each has cost, and how the later one ended."""
    status, before = record.status, earlier.status
    if status.modes is None:
        # Who goes on does not search again.
        status = dataclasses.replace(status, modes=before.modes, missed=before.missed)
    return dataclasses.replace(
        record,
        status=status,
        losses=np.concatenate([earlier.losses, record.losses]),
        history=_history_as_one(earlier, record),
        evaluations=earlier.evaluations + record.evaluations,
        seconds=earlier.seconds + record.seconds,
        skipped=earlier.skipped + record.skipped,
    )


def _history_as_one(earlier: Record, record: Record) -> dict[str, np.ndarray]:
    """The epochs of both, the later ones counted on from the earlier."""
    if not earlier.history or not record.history:
        return dict(earlier.history or record.history)
    before = {"epoch": len(earlier.history["epoch"]), "seconds": earlier.seconds}
    return {
        name: np.concatenate([column, record.history[name] + before.get(name, 0)])
        for name, column in earlier.history.items()
    }


def _shapes(params: dict[str, Any]) -> list[list[Any]]:
    return sorted([name, list(value.shape)] for name, value in params.items())


def _require_same(what: str, before: list[list[Any]], now: list[list[Any]]) -> None:
    if before != now:
        raise ModelError(
            f"resume= is a fit of {what} {latents_in_words(before) or 'none'}; this model has "
            f"{latents_in_words(now) or 'none'}: go on with the model and data that it was fitted to"
        )


# -- checkpoints: what a fit is, in plain words and numbers --------------------------------------------


def identity_of(
    request: Request,
    init: object,
    guide: object,
    trainee: Guide | Callable[..., Any],
    model_print: fingerprint.Fingerprint,
    earlier: Posterior | None,
) -> dict[str, Any]:
    """All that the numbers of a fit depend on, but for the time it is given.

    Args:
        request: Its options.
        init: Values by site, ``"auto"`` or ``"origin"``.
        guide: What ``guide=`` stands for.
        trainee: The guide itself.
        model_print: What that computes.
        earlier: The fit it goes on from with ``resume=``.
    """
    density = trainee.density if isinstance(trainee, Guide) else None
    return {
        "model": request.model.name,
        "latents": None if density is None else latents_of(density),
        "fingerprint": model_print,
        "guide": _guide(guide),
        "parameters": _shapes_of(trainee),
        "objective": [request.objective.name, _plain(request.objective)],
        "engine": _engine(request.engine),
        "estimator": request.estimator,
        "dtype": None if density is None else str(density.dtype),
        "device": str(request.device if density is None else density.device),
        "seed": request.seed,
        "tol": request.tolerance if request.own_tolerance else None,
        "steps": request.steps,
        "init": repr(sorted(init.items())) if isinstance(init, Mapping) else init,
        "optimizer": None if request.optimizer is None else _callable(request.optimizer),
        "batch_size": _described(request.batch_size),
        "epochs": None if request.epochs is None else request.epochs.described(),
        "resume": None if earlier is None else [earlier.record.seed, len(earlier.losses)],
    }


def require_same_fit(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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


def _shapes_of(trainee: object) -> list[list[Any]]:
    if not isinstance(trainee, Guide):
        return []
    return [[name, list(value.shape)] for name, value in trainee.state_dict().items()]

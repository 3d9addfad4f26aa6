"""Going on from an earlier fit: what it was, whether it fits the request, and both told as one."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import ModelError, OptionError, OtherDataWarning
from pyro_vi_kit.core.runtime import seed_of
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

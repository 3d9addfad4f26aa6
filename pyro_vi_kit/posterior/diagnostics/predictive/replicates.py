"""Data sets that a fitted model makes, beside the one that was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError
from pyro_vi_kit.model.groups import squeeze
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation import Approximation
from pyro_vi_kit.posterior.diagnostics.observations import Kind, observations


@dataclass(frozen=True, eq=False)
class Replicated:
    """One observed site.

    Attributes:
        name: The site's name.
        kind: What the values are.
        observed: The data, `[*shape]`; only what no mask hides, `[n, *event]`, where there is one.
        replicated: As much of each data set that the model made, `[S, *shape]`.
    """

    name: str
    kind: Kind
    observed: np.ndarray
    replicated: np.ndarray


@dataclass(frozen=True, eq=False)
class Replicates:
    """Replicated data sets.

    Attributes:
        sites: The observed sites.
        note: How the draws were made.
    """

    sites: tuple[Replicated, ...]
    note: str


def replicate(
    approximation: Approximation,
    density: Density,
    model: Model,
    *,
    level: str | None,
    sites: str | Sequence[str] | None,
    draws: int,
    seed: int,
    corrected: bool | None,
) -> Replicates:
    """Draw the observed sites anew.

    Latents inside plates stay those of their rows; what is new is what the model calls data.

    Args:
        approximation: The trained guide.
        density: The model.
        model: The model with its data.
        level: The verdict's word; None for a point estimate.
        sites: Observed sites; all when None.
        draws: S, data sets.
        seed: Of the draws.
        corrected: Whether draws of q are resampled by their importance weights; None leaves it to the
            verdict.

    Raises:
        OptionError: If nothing is observed, or a point estimate is to be corrected.
        ModelError: If the data cannot be drawn.
    """
    if corrected and level is None:
        raise OptionError("a point estimate has no weights to resample by: leave corrected= out")
    observed = observations(density, sites)
    corrected = level == "resample" if corrected is None else corrected
    try:
        values = approximation.predict(model, draws, seed, corrected=corrected)
    except ViError:
        raise
    except Exception as error:
        raise ModelError(
            f"the data cannot be drawn anew ({type(error).__name__}: {error}): vi.check(model) says "
            "which site cannot be sampled"
        ) from error
    found = []
    for one in observed:
        drawn = squeeze(one.site, values[one.name]).reshape(draws, *one.value.shape)
        data, copies = one.kept(one.value[None])[0], one.kept(drawn)
        if one.kind == "category" and one.site.event_shape:  # one-hot rows as the classes they mean
            data, copies = data.argmax(-1), copies.argmax(-1)
        found.append(Replicated(one.name, one.kind, data, copies))
    return Replicates(tuple(found), _note(draws, level, corrected))


def _note(draws: int, level: str | None, corrected: bool) -> str:
    made = f"{draws:,} data sets made by the model"
    if level is None:
        return f"{made} at the point estimate, whose uncertainty is left out"
    if corrected:
        why = " (the verdict is resample)" if level == "resample" else ""
        return f"{made} at draws corrected by importance resampling{why}"
    doubt = (
        ". The verdict is reject: what does not fit may be the guide's fault, and not the model's"
        if level == "reject"
        else ""
    )
    return f"{made} at draws of the guide{doubt}"

"""One simulation: fit a guide to its data, and place the truth among draws of the guide."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import ModelError, OptionError, first_line
from pyro_vi_kit.core.export import datasets
from pyro_vi_kit.core.runtime import RandomStream, seed_of
from pyro_vi_kit.fitting.fit import fit
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.calibrate.observing import Observing
from pyro_vi_kit.validation.calibrate.ranking import (
    LOG_LIKELIHOOD,
    TARP,
    Place,
    distances,
    joined_points,
    log_likelihood,
    place_of,
)
from pyro_vi_kit.validation.calibrate.simulating import Simulations

Fitter = Callable[[Model, int], Any]
"""From a model on simulated data and a seed to draws: `{site: [S, *shape]}`, a Posterior, or ArviZ."""


_ARVIZ = ("InferenceData", "DataTree")


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one simulation.

    Attributes:
        place: Where the truth lies; None where the fit failed.
        error: Why it failed; empty where it did not.
        converged: Whether the fit met its stopping rule; True where nothing says.
        seconds: Wall time.
    """

    place: Place | None
    error: str
    converged: bool
    seconds: float


@dataclass(frozen=True, eq=False)
class Trial:
    """What the simulations of one calibration share. It can be sent to another process.

    Attributes:
        observing: The model, and how data are put into it.
        dtype: Precision.
        guide: What is fitted; None where ``fitter`` is given.
        fitter: What gives draws in its place.
        options: Further options of `fit`.
        draws: S, draws that the truth is ranked among.
        sites: Sites that are ranked.
        scale: Units of each unconstrained coordinate for distances, `[D]`.
        seed: Of the calibration.
    """

    observing: Observing
    dtype: torch.dtype
    guide: GuideSpec | None
    fitter: Fitter | None
    options: Mapping[str, Any]
    draws: int
    sites: list[str]
    scale: Tensor
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        # A density holds recordings, which stay in the process that made them.
        return {name: value for name, value in self.__dict__.items() if name != "density"}

    @functools.cached_property
    def density(self) -> Density:
        """The density of the model on data of any simulation, to be given these."""
        return Density(self.observing.example, dtype=self.dtype)

    def run(self, number: int, simulations: Simulations, row: int, reference: Tensor) -> Result:
        """Fit and rank.

        Args:
            number: Of the simulation, which its seeds are made from.
            simulations: Data and truths.
            row: Where among them this one is.
            reference: Point that distances are measured from, `[D]`.

        Raises:
            KeyboardInterrupt: If the user interrupts.
        """
        started = time.monotonic()
        truths = {name: value[row] for name, value in simulations.truths.items()}
        data = {name: value[row] for name, value in simulations.data.items()}
        try:
            density, draws, converged = self._fitted(number, data)
            place = self._placed(number, density, truths, draws, reference)
        except OptionError:
            raise  # as wrong for all other data
        except Exception as error:  # noqa: BLE001  a fit that fails is a result, and is counted
            words = f"{type(error).__name__}: {first_line(error)}"
            return Result(None, words, False, time.monotonic() - started)
        return Result(place, "", converged, time.monotonic() - started)

    def _fitted(
        self, number: int, data: Mapping[str, Tensor]
    ) -> tuple[Density, dict[str, Tensor], bool]:
        """The density on these data, draws `{site: [S, *batch, *event]}`, and whether it converged."""
        fit_seed, draw_seed = seeds_of(self.seed, number)
        model = self.observing.with_values(data)
        leaves = tree_flatten((model.args, dict(model.kwargs)))[0]
        density = self.density.with_data([leaf for leaf in leaves if isinstance(leaf, Tensor)])
        if self.fitter is not None:
            return density, *self._from_fitter(self.fitter, density, model, fit_seed)
        if self.guide is None:
            raise OptionError("there is nothing to fit: give guide= or fitter=")
        with RandomStream(fit_seed, "initial weights"):
            guide = self.guide.build(density)
        posterior = fit(density.model, guide, seed=fit_seed, progress=False, **self.options)
        _raise_if_interrupted(posterior)
        draws = posterior.approximation.draw(self.draws, draw_seed)
        return density, draws, posterior.status.converged

    def _from_fitter(
        self, fitter: Fitter, density: Density, model: Model, seed: int
    ) -> tuple[dict[str, Tensor], bool]:
        found, converged = fitter(model, seed), True
        if isinstance(found, Posterior):
            _raise_if_interrupted(found)
            converged = found.status.converged
            found = found.sample(self.draws, seed)
        elif getattr(found, "attrs", {}).get("interrupted"):
            raise KeyboardInterrupt  # of `vi.nuts`, which keeps the draws that it has
        # ArviZ's objects are mappings too, of groups.
        plain = isinstance(found, Mapping) and type(found).__name__ not in _ARVIZ
        arrays = found if plain else _arrays(found)
        return {
            n: self._as_drawn(density, n, v) for n, v in arrays.items() if self._has(n)
        }, converged

    def _has(self, name: str) -> bool:
        return name in self.sites or any(site.name == name for site in self.density.latents)

    def _as_drawn(self, density: Density, name: str, values: Any) -> Tensor:
        """Evenly spaced ones of a fitter's draws of a site, in the shape that the model has there."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        site = density.structure.sites[name]
        shape = site.batch_shape + site.event_shape
        if array.ndim == 0 or len(array) < self.draws or array[0].size != shape.numel():
            raise OptionError(
                f"fitter= gave draws of shape {array.shape} for site {name!r}; wanted are "
                f"{self.draws} or more of shape {tuple(shape)}"
            )
        chosen = np.linspace(0, len(array) - 1, self.draws).round().astype(int)
        return torch.as_tensor(array[chosen]).reshape(self.draws, *shape)

    def _placed(
        self,
        number: int,
        density: Density,
        truths: Mapping[str, Tensor],
        draws: Mapping[str, Tensor],
        reference: Tensor,
    ) -> Place:
        missing = [name for name in self.sites if name not in draws]
        if missing:
            raise OptionError(
                f"there are no draws of site {missing[0]!r}: have fitter= give them, or name what is to "
                "be ranked, sites=[...]"
            )
        broken = [name for name in self.sites if not bool(draws[name].isfinite().all())]
        if broken:
            raise ModelError(f"draws of site {broken[0]!r} are not finite")
        place = place_of(density, truths, draws, self.sites)
        if all(site.name in draws for site in density.latents):
            z = joined_points(density, truths, draws)
            likelihood = log_likelihood(density, z, seeds_of(self.seed, number)[1])
            place.add(LOG_LIKELIHOOD, likelihood[0], likelihood[1:])
            away = distances(z, reference.to(z), self.scale.to(z))
            place.add(TARP, away[0], away[1:])
        return place


def seeds_of(seed: int, number: int) -> tuple[int, int]:
    """The seeds of a simulation's fit and of the draws from it."""
    # A fit's seed is told to the user, and is short therefore.
    return seed_of(seed, "fit", number) >> 32, seed_of(seed, "draws", number)


def _raise_if_interrupted(posterior: Posterior) -> None:
    if posterior.status.reason == "interrupted":
        raise KeyboardInterrupt


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """The draws of an ArviZ object, `{site: [chain * draw, *shape]}`."""
    try:
        posterior = datasets(tree)["posterior"]
    except (AttributeError, KeyError, TypeError) as error:
        raise OptionError(
            f"fitter= returned {type(tree).__name__}: it has to return draws {{site: [S, *shape]}}, a "
            "vi.Posterior, or ArviZ data with a posterior"
        ) from error
    return {
        str(name): values.to_numpy().reshape(-1, *values.shape[2:])
        for name, values in posterior.data_vars.items()
    }

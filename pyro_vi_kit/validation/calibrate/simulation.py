"""Data sets drawn from a model, and what is done with each: a fit, and the truth's rank among draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
from pyro_vi_kit.model.groups import GIVEN_DRAWS, squeeze
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.calibrate.data_reuse import SimulatedData

Values = Mapping[str, Tensor]

Fitter = Callable[[Model, int], Any]
"""From a model on simulated data and a seed to draws: `{site: [S, *shape]}`, a Posterior, or ArviZ."""

# Joint quantities, beside the sites.
LOG_LIKELIHOOD = "log_likelihood"
TARP = "all latents"

_CHUNK_NUMBERS = 4_000_000
_ARVIZ = ("InferenceData", "DataTree")


@dataclass(frozen=True, eq=False)
class DataSets:
    """N draws of the latents from the prior, each with data drawn given them.

    Attributes:
        numbers: Of the simulations, which their seeds are made from, `[N]`.
        truths: Latent, discrete and deterministic sites, `{site: [N, *batch, *event]}`.
        data: Observed sites, likewise.
        references: Points to measure distances from in unconstrained space, `[N, D]`: the next
            simulation's truth, which knows nothing of this one's.
    """

    numbers: Sequence[int]
    truths: Values
    data: Values
    references: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, rows: list[int]) -> DataSets:
        """Some of them, copied."""
        truths, data = ({n: v[rows] for n, v in p.items()} for p in (self.truths, self.data))
        return DataSets([self.numbers[r] for r in rows], truths, data, self.references[rows])


def simulate(density: Density, count: int, seed: int) -> tuple[DataSets, Tensor]:
    """Draw latents from the prior, and all observed sites given them.

    Returns:
        The data sets, and units for distances between their truths, `[D]`.

    Raises:
        ModelError: If a site cannot be sampled.
    """
    width = sum(v.numel() for v in density.observed.values()) + density.dim
    chunk = max(1, min(count, _CHUNK_NUMBERS // max(width, 1)))
    with RandomStream(seed, "simulated data"):
        parts = [
            density.simulate(None, draws=min(chunk, count - start))
            for start in range(0, count, chunk)
        ]
    truths = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    data = {name: truths.pop(name) for name in density.observed}
    z = torch.nan_to_num(density.unconstrained(truths), nan=0.0)
    quartiles = torch.quantile(z, z.new_tensor([0.25, 0.75]), dim=0)
    scale = (quartiles[1] - quartiles[0]) / 1.349
    units = torch.where(scale > 0, scale, torch.ones_like(scale))
    return DataSets(range(count), truths, data, z.roll(-1, 0)), units


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many of S draws lie below the truth, and how many are equal to it.

    Attributes:
        below: By site, `[*shape]`.
        equal: Likewise.
    """

    below: dict[str, np.ndarray]
    equal: dict[str, np.ndarray]

    def add(self, name: str, truth: np.ndarray, draws: np.ndarray) -> None:
        """Count the draws `[S, *shape]` of a site on either side of its truth `[*shape]`."""
        self.below[name] = (draws < truth).sum(0)
        self.equal[name] = (draws == truth).sum(0)


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one simulation.

    Attributes:
        ranks: Where the truth lies; None where the fit failed.
        error: Why it failed; empty where it did not.
        converged: Whether the fit met its stopping rule; True where nothing says.
    """

    ranks: Ranks | None
    error: str
    converged: bool


@dataclass(frozen=True, eq=False)
class Simulation:
    """What the simulations of one calibration share. It can be sent to another process.

    Attributes:
        simulated: The model, and how data are put into it.
        dtype: Precision.
        guide: What is fitted; None where ``fitter`` is given.
        fitter: What gives draws in its place.
        options: Further options of `fit`.
        draws: S, draws that the truth is ranked among.
        sites: Sites that are ranked.
        scale: Units of each unconstrained coordinate for distances, `[D]`.
        seed: Of the calibration.
    """

    simulated: SimulatedData
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
        return Density(self.simulated.example, dtype=self.dtype)

    def run(self, data_sets: DataSets, row: int) -> Result:
        """Fit a guide to one of these data sets, and rank the truth.

        Raises:
            OptionError: If an option cannot work, whatever the data.
            KeyboardInterrupt: If the user interrupts.
        """
        number = data_sets.numbers[row]
        # A fit's seed is told to the user, and is short therefore.
        seed, draw_seed = (
            seed_of(self.seed, "fit", number) >> 32,
            seed_of(self.seed, "draws", number),
        )
        truths = {name: value[row] for name, value in data_sets.truths.items()}
        try:
            model = self.simulated.with_values({n: v[row] for n, v in data_sets.data.items()})
            leaves = tree_flatten((model.args, dict(model.kwargs)))[0]
            density = self.density.with_data([leaf for leaf in leaves if isinstance(leaf, Tensor)])
            if self.fitter is not None:
                draws, converged = self._from_fitter(self.fitter, density, model, seed)
            else:
                draws, converged = self._fitted(density, seed, draw_seed)
            ranks = self._ranked(density, truths, draws)
            if all(site.name in draws for site in density.latents):
                self._rank_jointly(
                    ranks, density, truths, draws, draw_seed, data_sets.references[row]
                )
        except OptionError:
            raise  # as wrong for all other data
        except Exception as error:  # noqa: BLE001  a fit that fails is a result, and is counted
            return Result(None, f"{type(error).__name__}: {first_line(error)}", False)
        return Result(ranks, "", converged)

    def _fitted(
        self, density: Density, seed: int, draw_seed: int
    ) -> tuple[dict[str, Tensor], bool]:
        """Draws of the guide, `{site: [S, *batch, *event]}`, and whether its fit converged."""
        if self.guide is None:
            raise OptionError("there is nothing to fit: give guide= or fitter=")
        with RandomStream(seed, "initial weights"):
            guide = self.guide.build(density)
        posterior = fit(density.model, guide, seed=seed, progress=False, **self.options)
        _raise_if_interrupted(posterior)
        return posterior.approximation.draw(self.draws, draw_seed), posterior.status.converged

    def _from_fitter(
        self, fitter: Fitter, density: Density, model: Model, seed: int
    ) -> tuple[dict[str, Tensor], bool]:
        """The same of what the user gave."""
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
        wanted = {*self.sites, *(site.name for site in density.latents)}
        return {
            n: self._thinned(density, n, v) for n, v in arrays.items() if n in wanted
        }, converged

    def _thinned(self, density: Density, name: str, values: Any) -> Tensor:
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

    def _ranked(self, density: Density, truths: Values, draws: Values) -> Ranks:
        """The rank of each site's truth `[*batch, *event]` among its draws `[S, *batch, *event]`."""
        missing = [name for name in self.sites if name not in draws]
        if missing:
            raise OptionError(
                f"there are no draws of site {missing[0]!r}: have fitter= give them, or name what is to "
                "be ranked, sites=[...]"
            )
        broken = [name for name in self.sites if not bool(draws[name].isfinite().all())]
        if broken:
            raise ModelError(f"draws of site {broken[0]!r} are not finite")
        ranks = Ranks({}, {})
        for name in self.sites:
            site = density.structure.sites[name]
            ranks.add(name, squeeze(site, truths[name][None])[0], squeeze(site, draws[name]))
        return ranks

    def _rank_jointly(
        self,
        ranks: Ranks,
        density: Density,
        truths: Values,
        draws: Values,
        seed: int,
        reference: Tensor,
    ) -> None:
        """Ranks of functions of all latents: the log likelihood, and the distance to a point (TARP)."""
        names = [site.name for site in density.latents]
        joined = {
            name: torch.cat([truths[name][None].to(draws[name]), draws[name]]) for name in names
        }
        z = density.unconstrained(joined)
        likelihood = log_likelihood(density, z, seed)
        ranks.add(LOG_LIKELIHOOD, likelihood[0], likelihood[1:])
        away = distances(z, reference.to(z), self.scale.to(z))
        ranks.add(TARP, away[0], away[1:])


def log_likelihood(density: Density, z: Tensor, seed: int) -> np.ndarray:
    """Log density of all observations at these points `[K, D]`, `[K]`, nats.

    As a function of data and latents together it sees what no function of latents alone can (Modrák et
    al. 2023): a guide that is the prior, whatever the data, has uniform ranks in each latent.
    """
    with RandomStream(seed, GIVEN_DRAWS):  # for discrete sites
        parts = density.log_likelihood(z)
    total = torch.stack([value.reshape(len(z), -1).sum(-1) for value in parts.values()]).sum(0)
    return torch.nan_to_num(total, nan=-torch.inf).cpu().numpy()


def distances(z: Tensor, reference: Tensor, scale: Tensor) -> np.ndarray:
    """Distance of points `[K, D]` to a reference point `[D]`, in units of ``scale`` `[D]`, `[K]`.

    Lemos et al. (2023), "Sampling-based accuracy testing of posterior estimators": the share of draws
    that are nearer to a point than the truth is, is uniform for any such point, chosen without looking
    at the truth, if and only if the draws are of the posterior. Here it is another simulation's truth.
    """
    return torch.nan_to_num((z - reference) / scale, nan=torch.inf).norm(dim=-1).cpu().numpy()


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

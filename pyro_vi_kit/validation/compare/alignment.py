"""A fit's draws and a reference's, number by number under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pyro_vi_kit.core.errors import ModelError, OptionError, told
from pyro_vi_kit.core.export import Group, Tree, datasets, to_arviz
from pyro_vi_kit.model.groups import coords_of, dims_of
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.posterior.labels import labels_in
from pyro_vi_kit.validation.nuts import SamplerReport, diagnose

_LEAD = ("chain", "draw")


@dataclass(frozen=True, eq=False)
class Paired:
    """The P numbers that a fit and the reference both have.

    Attributes:
        labels: Name of each number, as ``theta[Choate]``.
        sites: The site that each belongs to.
        truth: The reference's draws `[chain, draw, P]`, float64.
        draws: The fit's draws `[S, P]`, float64.
        left_out: Latent sites of the fit that the reference does not have.
    """

    labels: tuple[str, ...]
    sites: tuple[str, ...]
    truth: np.ndarray
    draws: np.ndarray
    left_out: tuple[str, ...]


class Reference:
    """The draws that fits are compared with, and whether they can be: `vi.nuts`'s or anyone's.

    Args:
        tree: An ArviZ object of either kind with a ``posterior`` group.

    Attributes:
        posterior: Its draws, with dims (chain, draw, ...).
        report: Whether they converged.
        seconds: Wall time of the sampler, NaN where nothing says it.
        name: What to call it: ``NUTS`` where `vi.nuts` made it.

    Raises:
        OptionError: If it is no ArviZ object.
        ModelError: If it has no posterior with at least 4 draws.
    """

    def __init__(self, tree: Tree) -> None:
        groups = _groups(tree)
        if "posterior" not in groups:
            raise ModelError(
                f"the reference has no posterior group, only {', '.join(groups) or 'none at all'}: "
                "pass what vi.nuts returns, or ArviZ data with draws of the posterior"
            )
        self.posterior = groups["posterior"]
        self.report: SamplerReport = diagnose(tree)
        self.seconds = _seconds(tree.attrs, self.posterior.attrs)
        self.name = "NUTS" if "sampler" in tree.attrs else "the reference"


def by_name(posteriors: Mapping[str, Posterior] | Posterior) -> dict[str, Posterior]:
    """Fits by name; a single one is called like its guide.

    Raises:
        OptionError: If there is none, or one is no `Posterior`.
    """
    if isinstance(posteriors, Posterior):
        return {posteriors.guide: posteriors}
    if not isinstance(posteriors, Mapping) or not posteriors:
        raise OptionError(
            f"posteriors must be a fit or a dict of named fits, got {told(posteriors)}: "
            "{'full_rank': vi.fit(model, guide='full_rank')}"
        )
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            raise OptionError(
                f"posteriors[{name!r}] must be what vi.fit or vi.load returns, "
                f"got {type(posterior).__name__}"
            )
    return {str(name): posterior for name, posterior in posteriors.items()}


def pair(reference: Reference, posterior: Posterior, name: str, *, draws: int, seed: int) -> Paired:
    """Line up a fit's draws with the reference's.

    Sites are matched by name and their dims by name where both sides name them alike, else by
    position; a dim with the same labels in another order is put in the fit's order.

    Args:
        reference: What is taken as the truth.
        posterior: The fit.
        name: The fit's name, for messages.
        draws: Draws from the fit.
        seed: The same seed gives the same draws.

    Raises:
        ModelError: If no site is common to both, or the shapes of one differ.
    """
    fit = _draws(posterior, draws, seed)
    common = [
        n for n in fit.data_vars if _is_numeric(fit, n) and _is_numeric(reference.posterior, n)
    ]
    if not common:
        raise ModelError(
            f"fit {name!r} has no site that the reference has: {_list(fit)} against "
            f"{_list(reference.posterior)}. Rename the reference's variables to the model's sites"
        )
    names: list[tuple[str, str]] = []
    truth, approx = [], []
    for site in common:
        values = fit[site].to_numpy()[0]
        exact = _like(reference.posterior[site], fit[site], name)
        truth.append(exact.reshape(*exact.shape[:2], -1))
        approx.append(values.reshape(len(values), -1))
        names += [(str(site), label) for label in labels_in(fit[site])]
    sites, columns = zip(*names, strict=True)
    return Paired(
        labels=columns,
        sites=sites,
        truth=np.concatenate(truth, -1).astype(np.float64),
        draws=np.concatenate(approx, -1).astype(np.float64),
        left_out=tuple(n for n in _latents(posterior) if n in fit and n not in common),
    )


def _groups(tree: Tree) -> dict[str, xr.Dataset]:
    # InferenceData is known by its name, since ArviZ 1.x no longer has the class.
    if isinstance(tree, xr.DataTree) or type(tree).__name__ == "InferenceData":
        return datasets(tree)
    remedy = "its to_arviz()" if isinstance(tree, Posterior) else "arviz.from_dict or vi.nuts"
    raise OptionError(
        f"the reference must be an ArviZ object, got {type(tree).__name__}: make one with {remedy}"
    )


def _seconds(*attrs: Mapping[str, Any]) -> float:
    """Wall time under our name for it or ArviZ's."""
    for facts in attrs:
        for key in ("seconds", "sampling_time"):
            if key in facts:
                return float(facts[key])
    return float("nan")


def _draws(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    """Draws from q under the names, dims and coords that they are exported with."""
    values = posterior.sample(draws, seed)
    sites = {} if posterior.density is None else posterior.density.structure.sites
    dims = {n: dims_of(posterior.model, sites[n]) for n in values if n in sites}
    groups = {"posterior": Group({n: v[None] for n, v in values.items()}, dims)}
    return datasets(to_arviz(groups, coords_of(posterior.model, groups)))["posterior"]


def _latents(posterior: Posterior) -> list[str]:
    return [] if posterior.density is None else [s.name for s in posterior.density.latents]


def _is_numeric(dataset: xr.Dataset, name: Any) -> bool:
    return (
        name in dataset.data_vars
        and dataset[name].dtype.kind in "biuf"
        and set(_LEAD) <= set(dataset[name].dims)
    )


def _like(truth: xr.DataArray, fit: xr.DataArray, fit_name: str) -> np.ndarray:
    """The reference's draws of a site `[chain, draw, *shape]`, in the order of the fit's."""
    truth = truth.transpose(*_LEAD, ...)
    inner = fit.dims[2:]
    if set(inner) == set(truth.dims[2:]):
        truth = truth.transpose(*_LEAD, *inner)
        for dim in inner:
            truth = _relabelled(truth, dim, fit)
    if truth.shape[2:] != fit.shape[2:]:
        raise ModelError(
            f"site {fit.name!r} has shape {fit.shape[2:]} in fit {fit_name!r} but "
            f"{truth.shape[2:]} in the reference: both must be of the same model and data"
        )
    return truth.to_numpy()


def _relabelled(truth: xr.DataArray, dim: Any, fit: xr.DataArray) -> xr.DataArray:
    """The reference with a dim's positions in the fit's order, where both name the same ones."""
    if dim not in truth.coords or dim not in fit.coords:
        return truth
    theirs, ours = ([str(v) for v in side[dim].to_numpy()] for side in (truth, fit))
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        return truth
    return truth.isel({dim: [theirs.index(label) for label in ours]})


def _list(dataset: xr.Dataset) -> str:
    return ", ".join(map(str, dataset.data_vars))

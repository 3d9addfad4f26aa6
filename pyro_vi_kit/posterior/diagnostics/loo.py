"""Leave-one-out cross-validation from draws of an approximate posterior, without fitting again.

Weights for leaving out y_i are p(z | y) / q(z) x 1 / p(y_i | z), smoothed jointly (Magnusson, Andersen,
Jonasson & Vehtari 2019, eq. 8, https://proceedings.mlr.press/v97/magnusson19a.html; Vehtari, Gelman &
Gabry 2017, https://doi.org/10.1007/s11222-016-9696-4). The result is the installed ArviZ's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.core.export import arviz_major, import_arviz
from pyro_vi_kit.core.psis import psis, usable
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.posterior.approximation import (
    Approximation,
    GuideApproximation,
    SummedApproximation,
    Weighed,
)
from pyro_vi_kit.posterior.diagnostics.findings import EVEN_WEIGHTS
from pyro_vi_kit.posterior.diagnostics.observations import Observation, observations

if TYPE_CHECKING:
    import xarray as xr

# Numbers of log likelihood that are held at once: 3 GB of them.
_MOST = 400_000_000


class LooWarning(UserWarning):
    """Some observations cannot be left out by weighting; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units that are left out in turn.

    Attributes:
        dims: Names of their dims.
        kept: Which of them hold anything that is not masked, `[*dims]`.
        sites: The observed sites whose log densities a unit sums.
    """

    dims: tuple[str, ...]
    kept: np.ndarray
    sites: tuple[str, ...]


class Elpd(NamedTuple):
    """Leave-one-out predictive densities of n observations.

    Attributes:
        elpd: log p(y_i | y without y_i), `[n]`, nats.
        lpd: log p(y_i | y), `[n]`, nats, corrected by the smoothed weights p(z | y) / q(z) too.
        khat: Pareto k-hat of the weights that leave y_i out, `[n]`.
        ess: Their effective number of draws, `[n]`.
    """

    elpd: np.ndarray
    lpd: np.ndarray
    khat: np.ndarray
    ess: np.ndarray


def loo(
    approximation: Approximation,
    density: Density,
    coords: Mapping[str, Sequence[Any]],
    *,
    sites: str | Sequence[str] | None,
    plate: str | None,
    draws: int,
    seed: int,
) -> Any:
    """PSIS-LOO; see `Posterior.loo`. ``coords`` are names along dims."""
    observed = observations(density, sites, factors=True)
    chosen = units(observed, plate)
    observed = [o for o in observed if o.name in chosen.sites]
    size = sum(o.seen.size for o in observed)
    if draws * size > _MOST:
        raise OptionError(
            f"{draws:,} draws of {size:,} observations do not fit into memory: draws="
            f"{max(_MOST // size, 1):,} would, or leave out rows of a fit to a part of the data"
        )
    values, weighed = _log_likelihoods(approximation, density, chosen, draws, seed)
    log_p, log_q = weighed.log_p.numpy(), weighed.log_q.numpy()
    table = log_likelihood_of(chosen, values, observed, coords)
    found, result = elpd_data(table, log_p, log_q)
    flat = table.values.reshape(draws, -1)
    _warn(found, flat, log_p - log_q, chosen, density, approximation.name)
    return result


# -- what is left out: one observation, or all that a row of a plate holds -----------------------


def units(observed: Sequence[Observation], plate: str | None) -> Units:
    """The units of these sites.

    Args:
        observed: One site or more.
        plate: Whose rows are left out as a whole; single observations when None.

    Raises:
        OptionError: If there are no units to tell apart, or the sites have no common ones.
        UnknownNameError: If no observed site is in such a plate.
    """
    scaled = [o.name for o in observed if o.scaled]
    if scaled:
        raise OptionError(
            f"site {scaled[0]!r} is scaled by poutine.scale, so that an observation counts for more or "
            "less than one: fit the model without the scale to leave observations out"
        )
    dims = {o.name: _batch_dims(o) for o in observed}
    if plate is not None:
        return _of_plate(observed, dims, plate)
    first = next(iter(dims.values()))
    if any(other != first for other in dims.values()):
        choices = " or ".join(f"sites={name!r} {list(d)}" for name, d in dims.items())
        raise OptionError(
            f"the observed sites have different dims: choose {choices}, or name a plate that they have "
            "in common, plate=..."
        )
    if not first:
        raise OptionError(
            f"site {observed[0].name!r} is one observation as a whole, so that nothing can be left out: "
            "put the data into a pyro.plate instead of .to_event() or one site each"
        )
    return Units(first, np.logical_or.reduce([o.seen for o in observed]), tuple(dims))


def log_likelihood_of(
    chosen: Units,
    values: Mapping[str, np.ndarray],
    observed: Sequence[Observation],
    coords: Mapping[str, Sequence[Any]],
) -> xr.DataArray:
    """The log likelihood of each unit, dims (chain, draw, *units).

    Units that are masked as a whole are left out; where that leaves no rectangle, or where a site has no
    name for its rows, units lie along one dim.

    Args:
        chosen: The units.
        values: Log likelihoods by site, `[chain, draw, *batch]`, nats.
        observed: The sites.
        coords: Names along dims.
    """
    import xarray as xr

    total: np.ndarray = np.zeros((1, 1))
    for observation in observed:
        dims = _batch_dims(observation)
        summed = tuple(2 + i for i, dim in enumerate(dims) if dim not in chosen.dims)
        total = total + values[observation.name].sum(axis=summed)
    sizes = zip(chosen.dims, chosen.kept.shape, strict=True)
    labels = {dim: list(coords.get(dim, range(size))) for dim, size in sizes}
    lead = {"chain": np.arange(total.shape[0]), "draw": np.arange(total.shape[1])}
    if chosen.kept.all():
        return xr.DataArray(total, lead | labels, ("chain", "draw", *chosen.dims), "log_likelihood")
    places = np.argwhere(chosen.kept)
    name = chosen.dims[0] if len(chosen.dims) == 1 else "_".join(chosen.dims)
    names = [
        [labels[dim][i] for dim, i in zip(chosen.dims, place, strict=True)] for place in places
    ]
    plain = [n[0] if len(n) == 1 else ", ".join(map(str, n)) for n in names]
    kept = total[:, :, chosen.kept]
    return xr.DataArray(kept, lead | {name: plain}, ("chain", "draw", name), "log_likelihood")


def _of_plate(
    observed: Sequence[Observation], dims: Mapping[str, tuple[str, ...]], plate: str
) -> Units:
    inside = [o for o in observed if plate in dims[o.name]]
    if not inside:
        known = {dim for names in dims.values() for dim in names}
        raise UnknownNameError("plate of the observed sites", plate, known)
    outside = [o.name for o in observed if o not in inside]
    if outside:
        raise OptionError(
            f"site {outside[0]!r} is not in plate {plate!r}: choose the sites that are, "
            f"sites={[o.name for o in inside]}"
        )
    kept = []
    for observation in inside:
        own = dims[observation.name]
        other = tuple(i for i, dim in enumerate(own) if dim != plate)
        kept.append(observation.seen.any(axis=other))
    return Units((plate,), np.logical_or.reduce(kept), tuple(o.name for o in inside))


def _batch_dims(observation: Observation) -> tuple[str, ...]:
    return observation.dims[: observation.seen.ndim]


# -- log likelihoods of it ------------------------------------------------------------------------


def _log_likelihoods(
    approximation: Approximation, density: Density, chosen: Units, draws: int, seed: int
) -> tuple[Mapping[str, np.ndarray], Weighed]:
    """Log likelihoods by site, `[chain, draw, *batch]`; those of whole rows where they are not a sum.

    Raises:
        OptionError: If what is left out has no likelihood of its own.
    """
    discrete = _shared_discrete(density, chosen)
    if discrete is None or not isinstance(approximation, GuideApproximation | SummedApproximation):
        group, weighed = approximation.log_likelihood(draws, seed)
        return group.variables, weighed
    if not _are_whole_rows(density, chosen):
        raise OptionError(
            f"observed sites share the discrete site {discrete!r}, which is summed out, so that only "
            "whole rows of its plate, without continuous latents, can be left out: leave sites= out and "
            "name that plate"
        )
    rows, weighed = approximation.row_terms(draws, seed, chosen.dims[0])
    # One number a row: the first site stands for all of them.
    nothing = np.zeros((1, *rows.shape))
    return dict.fromkeys(chosen.sites, nothing) | {chosen.sites[0]: rows.numpy()[None]}, weighed


def _are_whole_rows(density: Density, chosen: Units) -> bool:
    """Whether the units are all that there is in the rows of an outermost plate without latents."""
    if len(chosen.dims) != 1:
        return False
    (plate,) = chosen.dims
    inside = [s for s in density.structure.sites.values() if plate in {p.name for p in s.plates}]
    outermost = all(s.data_plate is not None and s.data_plate.name == plate for s in inside)
    observed = {s.name for s in inside if s in density.structure.likelihood}
    return outermost and observed == set(chosen.sites) and all(s.kind != "latent" for s in inside)


def _shared_discrete(density: Density, chosen: Units) -> str | None:
    """A discrete latent that is summed out of several observed sites of the same rows."""
    for site in density.discrete:
        plates = {p.name for p in site.plates} & set(chosen.dims)
        seen = density.structure.likelihood
        if plates and sum(bool(plates & {p.name for p in s.plates}) for s in seen) > 1:
            return site.name
    return None


# -- predictive densities -------------------------------------------------------------------------


def good_khat(draws: int) -> float:
    """Up to which k-hat so many draws suffice (Vehtari et al. 2024, section 3.2.4)."""
    return min(1 - 1 / math.log10(draws), 0.7) if draws > 1 else 0.7


def leave_one_out(log_likelihood: np.ndarray, log_ratios: np.ndarray) -> Elpd:
    """Leave-one-out densities of each column.

    Args:
        log_likelihood: log p(y_i | z_s) at draws from q, `[S, n]`, nats, finite where the ratios are.
        log_ratios: log p(z_s, y) - log q(z_s), `[S]`, nats; -inf is a weight of zero.

    Raises:
        OptionError: If no draw has a positive density.
    """
    full = psis(log_ratios).log_weights
    lpd = _log_sums(full[:, None] + log_likelihood)
    elpd, khat, ess = np.empty((3, len(lpd)))
    for i, column in enumerate(log_likelihood.T):
        smoothed = psis(usable(log_ratios - column))
        elpd[i] = _log_sums((smoothed.log_weights + column)[:, None])[0]
        khat[i], ess[i] = smoothed.khat, smoothed.ess
    return Elpd(elpd, lpd, khat, ess)


def elpd_data(
    log_likelihood: xr.DataArray, log_p: np.ndarray, log_q: np.ndarray
) -> tuple[Elpd, Any]:
    """What leaving out says, and the same as ArviZ's ``ELPDData`` with pointwise values.

    ``loo_approximate_posterior`` makes it where ArviZ has that (1.x). The effective number of parameters
    is the same with both: ArviZ takes log p(y_i | y) over plain draws of q, here it is weighted.

    Args:
        log_likelihood: Dims (chain, draw, *observations), nats.
        log_p: log p(z, y) of the draws, `[S]`, nats.
        log_q: log q(z) of the draws, `[S]`, nats. One that model or guide refuses (a ratio of NaN or
            +inf) has weight zero.

    Raises:
        OptionError: If no draw has a positive density.
    """
    log_ratios = usable(log_p - log_q)
    flat = log_likelihood.values.reshape(len(log_p), -1)
    # A draw of weight zero counts for nothing, and -inf minus -inf would be NaN.
    flat = np.where(np.isneginf(log_ratios)[:, None], 0.0, flat)
    found = leave_one_out(flat, log_ratios)
    if arviz_major() >= 1:
        values = log_likelihood.copy(data=flat.reshape(log_likelihood.shape))
        return found, _by_arviz(found, values, log_ratios)
    pattern = log_likelihood.isel(chain=0, draw=0, drop=True)
    return found, _by_hand(found, pattern, len(log_p))


def _by_hand(found: Elpd, pattern: xr.DataArray, draws: int) -> Any:
    """The result as ``arviz.loo`` of 0.x makes it."""
    import_arviz()  # which is quiet about what is coming
    from arviz.stats.stats_utils import ELPDData

    good = good_khat(draws)
    shape = pattern.shape
    values = {
        "elpd_loo": float(found.elpd.sum()),
        "se": float(np.sqrt(found.elpd.size * found.elpd.var())),
        "p_loo": float((found.lpd - found.elpd).sum()),
        "n_samples": draws,
        "n_data_points": found.elpd.size,
        "warning": bool((found.khat > good).any()),
        "loo_i": pattern.copy(data=found.elpd.reshape(shape)).rename("loo_i"),
        "pareto_k": pattern.copy(data=found.khat.reshape(shape)).rename("pareto_shape"),
        "scale": "log",
        "good_k": good,
    }
    return ELPDData(data=list(values.values()), index=list(values))


def _by_arviz(found: Elpd, log_likelihood: xr.DataArray, log_ratios: np.ndarray) -> Any:
    """The result of ArviZ 1.x."""
    import xarray as xr

    data = xr.DataTree.from_dict({"/log_likelihood": log_likelihood.to_dataset(name="y")})
    with warnings.catch_warnings():  # the caller says what to do about it
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        # The difference of the two is all that counts.
        result = import_arviz().loo_approximate_posterior(
            data, log_ratios, np.zeros_like(log_ratios), pointwise=True, var_name="y"
        )
    result.p = float(found.lpd.sum() - result.elpd)
    return result


def _log_sums(values: np.ndarray) -> np.ndarray:
    """Log of the sum of exponentials over the first dimension."""
    peak = values.max(axis=0)
    base = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return base + np.log(np.exp(values - base).sum(axis=0))


def _warn(
    found: Elpd,
    log_likelihood: np.ndarray,
    log_ratios: np.ndarray,
    chosen: Units,
    density: Density,
    guide: str,
) -> None:
    """Say what to do where weights are too uneven to leave something out.

    ``log_likelihood`` is `[S, n]`, and ``log_ratios``, log p - log q, `[S]`.
    """
    draws = len(log_ratios)
    most = good_khat(draws)

    def uneven(khat: np.ndarray, ess: np.ndarray) -> np.ndarray:
        # A high k-hat means little where hardly any draw carries more weight than the others.
        return (khat > most) & (ess < EVEN_WEIGHTS * draws)

    bad = np.flatnonzero(uneven(found.khat, found.ess))
    if not len(bad):
        return
    whole = psis(usable(log_ratios))
    alone = [psis(-log_likelihood[:, i]) for i in bad]
    hard = uneven(np.array([a.khat for a in alone]), np.array([a.ess for a in alone])).any()
    local = [s.name for s in density.latents if set(chosen.dims) & {p.name for p in s.plates}]
    if uneven(np.array(whole.khat), np.array(whole.ess)) or not hard:
        remedy = (
            f"The guide {guide!r} is the reason, not the observations (k-hat {whole.khat:.2f} with "
            "nothing left out): fit a richer one, or take the draws of vi.nuts to az.loo."
        )
    elif local:
        remedy = (
            f"Site {local[0]!r} has a latent for each row, which the row's own data inform: without "
            "them it falls back to its prior. Integrate it out of the likelihood, or fit again without "
            "the rows."
        )
    else:
        remedy = (
            "They are surprising and influential: look at them (pareto_k says which), try a likelihood "
            "with heavier tails, or fit again without each of them."
        )
    warnings.warn(
        f"k-hat is above {most:.2f} for {len(bad)} of {found.khat.size} observations, whose elpd may "
        f"be off. {remedy}",
        LooWarning,
        stacklevel=4,
    )

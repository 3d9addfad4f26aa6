"""Leave-one-out cross-validation from an approximate posterior, without fitting again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.psis import psis, usable
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.posterior.approximation import (
    Approximation,
    GuideApproximation,
    SummedApproximation,
    Weighed,
)
from pyro_vi_kit.posterior.diagnostics.loo.elpd import Elpd, elpd_data, good_khat
from pyro_vi_kit.posterior.diagnostics.loo.left_out import Units, log_likelihood_of, units
from pyro_vi_kit.posterior.diagnostics.observations import observations
from pyro_vi_kit.posterior.diagnostics.verdict import EVEN_WEIGHTS

__all__ = ["LooWarning", "loo"]

# Numbers of log likelihood that are held at once: 3 GB of them.
_MOST = 400_000_000


class LooWarning(UserWarning):
    """Some observations cannot be left out by weighting; the message says what to do."""


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
    """PSIS-LOO; see `Posterior.loo`.

    Args:
        approximation: The trained guide.
        density: The model.
        coords: Names along dims.
        sites: Observed sites; all when None.
        plate: Whose rows are left out as a whole.
        draws: Draws from q.
        seed: Of the draws.
    """
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
    (plate,) = chosen.dims if len(chosen.dims) == 1 else ("",)
    inside = [s for s in density.structure.sites.values() if plate in {p.name for p in s.plates}]
    observed = {s.name for s in inside if s in density.structure.likelihood}
    outermost = all(s.data_plate is not None and s.data_plate.name == plate for s in inside)
    if observed != set(chosen.sites) or not outermost or any(s.kind == "latent" for s in inside):
        raise OptionError(
            f"observed sites share the discrete site {discrete!r}, which is summed out, so that only "
            "whole rows of its plate, without continuous latents, can be left out: leave sites= out and "
            "name that plate"
        )
    rows, weighed = approximation.row_terms(draws, seed, plate)
    # One number a row: the first site stands for all of them.
    nothing = np.zeros((1, *rows.shape))
    return dict.fromkeys(chosen.sites, nothing) | {chosen.sites[0]: rows.numpy()[None]}, weighed


def _shared_discrete(density: Density, chosen: Units) -> str | None:
    """A discrete latent that is summed out of several observed sites of the same rows."""
    for site in density.discrete:
        plates = {p.name for p in site.plates} & set(chosen.dims)
        seen = density.structure.likelihood
        if plates and sum(bool(plates & {p.name for p in s.plates}) for s in seen) > 1:
            return site.name
    return None


def _warn(
    found: Elpd,
    log_likelihood: np.ndarray,
    log_ratios: np.ndarray,
    chosen: Units,
    density: Density,
    guide: str,
) -> None:
    """Say what to do where weights are too uneven to leave something out.

    Args:
        found: What leaving out gave.
        log_likelihood: `[S, n]`.
        log_ratios: log p - log q, `[S]`.
        chosen: What was left out.
        density: The model.
        guide: The guide's name.
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

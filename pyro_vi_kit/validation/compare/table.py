"""`compare`: the errors of fits against a reference, in units of the reference's sd."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.export import Tree
from pyro_vi_kit.core.options import SEED, checks, integer
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.compare.alignment import Reference, by_name, pair
from pyro_vi_kit.validation.compare.measures import (
    ERRORS,
    Distances,
    effective_draws,
    error_table,
    mean_error_mcse,
    mean_error_noise,
)
from pyro_vi_kit.validation.nuts import SamplerWarning

if TYPE_CHECKING:
    import pandas as pd

OVERALL = "overall"
COLUMNS = (
    "fit",
    "parameter",
    *ERRORS,
    "mean_error_mcse",
    "sliced_w1",
    "sliced_w1_null",
    "sliced_w1_null_q99",
    "khat",
    "elbo",
    "elbo_se",
    "verdict",
    "seconds",
    "speedup",
)


@checks(draws=integer(4, 10**8), seed=SEED)
def compare(
    reference: Tree,
    posteriors: Mapping[str, Posterior] | Posterior,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare fits with a reference posterior, parameter by parameter and as a whole.

    Args:
        reference: What `vi.nuts` returns, or any ArviZ object with a ``posterior`` group whose
            variables are called like the model's sites.
        posteriors: Fits by name, or one fit.
        draws: Draws from each fit. More of them than the reference has are of little use.
        seed: The same seed gives the same table.

    Returns:
        One row for each fit and each scalar parameter of the latent and deterministic sites that
        it shares with the reference, and one per fit whose ``parameter`` is ``overall``. Columns:

        - ``mean_error``, ``q05_error``, ``q50_error``, ``q95_error``: fit minus reference, in
          reference sd; ``sd_ratio``: fit over reference sd. The overall row has the worst of each:
          the largest in size, with its sign, and the ratio farthest from 1 on a log scale.
          Infinite where the fit's draws are not finite or miss a constant, NaN where the
          reference's are not finite.
        - ``mean_error_mcse``: Monte Carlo standard error of ``mean_error``, of both sets of draws.
        - ``sliced_w1``: sliced Wasserstein-1 distance of the joint draws, in reference sd, the mean
          over batches of 1,000; ``sliced_w1_null`` and ``sliced_w1_null_q99``: its mean and 99 %
          quantile between exact draws. Overall rows only, as all that follow.
        - ``khat``, ``elbo`` and ``elbo_se`` (nats), ``verdict``: NaN and "" for a point estimate.
        - ``seconds``: wall time of the fit; ``speedup``: the reference's over it.

        ``attrs`` says whether the reference can be believed (``reference_converged``,
        ``reference_problems``), what it took (``reference_draws``, ``reference_seconds``), the
        largest ``mean_error`` that exact draws would show in 99 of 100 tables
        (``mean_error_noise``), and which latent sites the reference does not have (``left_out``).

    Raises:
        OptionError: If the reference is no ArviZ object, or an option cannot be used.
        ModelError: If there is nothing to compare, or the shapes of a site differ.

    Warns:
        SamplerWarning: If the reference has not converged.
    """
    import pandas as pd

    fits = by_name(posteriors)
    truth = Reference(reference)
    _warn_unconverged(truth)
    distances = Distances(seed)
    rows: list[dict[str, Any]] = []
    noise, left_out = 0.0, set()
    for name, posterior in fits.items():
        paired = pair(truth, posterior, name, draws=draws, seed=seed)
        ess = effective_draws(paired.truth)
        errors = error_table(paired)
        errors["mean_error_mcse"] = mean_error_mcse(paired, errors["sd_ratio"], ess)
        rows += [
            {"fit": name, "parameter": label} | {c: errors[c][i] for c in errors}
            for i, label in enumerate(paired.labels)
        ]
        distance = distances(paired, ess)
        overall = {
            "sliced_w1": distance.value,
            "sliced_w1_null": distance.null,
            "sliced_w1_null_q99": distance.null_q99,
        }
        overall |= _worst(errors) | quality(posterior)
        took = posterior.seconds
        overall["speedup"] = truth.seconds / took if took > 0 else float("nan")
        rows.append({"fit": name, "parameter": OVERALL} | overall)
        noise = max(noise, mean_error_noise(draws, ess))
        left_out |= set(paired.left_out)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["verdict"] = frame["verdict"].fillna("")
    frame.attrs.update(_facts(truth))
    frame.attrs.update(draws=draws, seed=seed, mean_error_noise=noise, left_out=sorted(left_out))
    return frame


def _worst(errors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of each error the one farthest from none, NaN where there is none."""
    worst = {}
    for name in ERRORS:
        with np.errstate(divide="ignore"):
            size = np.abs(np.log(errors[name]) if name == "sd_ratio" else errors[name])
        if np.isnan(size).all():
            worst[name] = float("nan")
            continue
        at = np.nanargmax(size)
        worst[name] = float(errors[name][at])
        if name == "mean_error":
            worst["mean_error_mcse"] = float(errors["mean_error_mcse"][at])
    return worst


def quality(posterior: Posterior) -> dict[str, Any]:
    """What the fit says of itself, and how long it took."""
    verdict = posterior.verdict
    return {
        "khat": posterior.khat,
        "elbo": posterior.elbo,
        "elbo_se": posterior.elbo_se,
        "verdict": "" if verdict is None else verdict.level,
        "seconds": posterior.seconds,
    }


def _facts(truth: Reference) -> dict[str, Any]:
    return {
        "reference": truth.name,
        "reference_converged": truth.report.converged,
        "reference_problems": list(truth.report.problems),
        "reference_chains": int(truth.posterior.sizes["chain"]),
        "reference_draws": int(truth.posterior.sizes["chain"] * truth.posterior.sizes["draw"]),
        "reference_seconds": truth.seconds,
    }


def _warn_unconverged(truth: Reference) -> None:
    if not truth.report.converged:
        warnings.warn(
            "the reference has not converged, so that it is no reference, and the errors below "
            f"do not say which side is wrong: {'; '.join(truth.report.problems)}",
            SamplerWarning,
            stacklevel=3,
        )

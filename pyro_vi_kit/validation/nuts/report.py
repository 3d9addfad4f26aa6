"""Whether MCMC draws may be believed: R-hat, effective sample sizes, divergences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.export import Tree, datasets, import_arviz
from pyro_vi_kit.posterior.labels import labels_in

if TYPE_CHECKING:
    import xarray as xr

MAX_RHAT = 1.01
MIN_ESS_PER_CHAIN = 100
MAX_DIVERGENT_SHARE = 0.001

# A number that is the same in all draws but for rounding, as the ones of a correlation matrix.
_ROUNDING = 64


class SamplerWarning(UserWarning):
    """A sampler's draws are to be doubted, or another sampler was used than one would expect."""


@dataclass(frozen=True)
class SamplerReport:
    """How far MCMC draws can be trusted.

    R-hat and effective sample sizes are the rank-normalised ones of Vehtari et al. (2021),
    https://doi.org/10.1214/20-BA1221, and so are their limits: R-hat below 1.01, and an effective
    sample size of 100 per chain.

    Attributes:
        max_rhat: The largest R-hat of any number in the posterior; NaN for one chain.
        min_ess_bulk: The smallest effective sample size for means.
        min_ess_tail: The smallest effective sample size for 5 % and 95 % quantiles.
        divergences: Divergent transitions after warm-up; None where the sampler did not say.
        converged: Several chains of finite draws within those limits, and at most one draw in a
            thousand divergent.
        problems: What is wrong and what to try, one sentence or two each. A few divergences are
            named here even where they are too few to count against ``converged``.
    """

    max_rhat: float
    min_ess_bulk: float
    min_ess_tail: float
    divergences: int | None
    converged: bool
    problems: tuple[str, ...]


def diagnose(tree: Tree) -> SamplerReport:
    """Judge the MCMC draws of an ArviZ object, of `nuts` or anyone else's.

    Args:
        tree: With a ``posterior`` group, and for divergences ``diverging`` in ``sample_stats``.

    Raises:
        ModelError: If there is no posterior with the dims chain and draw, or fewer than 4 draws.
    """
    groups = datasets(tree)
    labels, values, constant = _numbers(groups.get("posterior"))
    chains, draws, _ = values.shape
    finite = np.isfinite(values).all((0, 1))
    kept = finite & ~constant
    varying = labels[kept]
    rhat, bulk, tail = _diagnostics(values[..., kept])
    problems = [
        *_unusable(labels[~finite], varying, chains),
        *(_apart(varying, rhat) if chains > 1 else ()),
        *_too_few(varying, bulk, "means", chains),
        *_too_few(varying, tail, "tails", chains),
    ]
    stats = groups.get("sample_stats", {})
    divergences = int(stats["diverging"].sum()) if "diverging" in stats else None
    share = (divergences or 0) / (chains * draws)
    none = np.full(1, np.nan)
    return SamplerReport(
        max_rhat=float(np.max(rhat if rhat.size else none)),
        min_ess_bulk=float(np.min(bulk if bulk.size else none)),
        min_ess_tail=float(np.min(tail if tail.size else none)),
        divergences=divergences,
        converged=not problems and share <= MAX_DIVERGENT_SHARE,
        problems=(*problems, *_divergent(divergences, chains * draws)),
    )


def _numbers(posterior: xr.Dataset | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all numbers of a posterior labels `[n]`, draws `[chain, draw, n]`, and which are constants."""
    if posterior is None or not {"chain", "draw"} <= set(posterior.sizes):
        raise ModelError("no draws to diagnose: the object has no posterior with dims chain, draw")
    if posterior.sizes["draw"] < 4:
        raise ModelError(f"{posterior.sizes['draw']} draws are too few to diagnose: make 4 or more")
    labels: list[str] = []
    columns: list[np.ndarray] = []
    constant: list[np.ndarray] = []
    for values in posterior.data_vars.values():
        if not {"chain", "draw"} <= set(values.dims) or values.dtype.kind not in "biuf":
            continue
        variable = values.transpose("chain", "draw", ...)
        array = variable.to_numpy()
        labels += labels_in(variable)
        columns.append(array.reshape(*array.shape[:2], -1).astype(np.float64))
        constant.append(_constant(columns[-1], array.dtype))
    if not labels:
        raise ModelError("no draws to diagnose: the posterior holds no numbers")
    return np.array(labels), np.concatenate(columns, -1), np.concatenate(constant)


def _constant(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Which of `[chain, draw, n]` are the same number in all draws, up to rounding in ``dtype``."""
    precision = np.finfo(dtype).eps * _ROUNDING if dtype.kind == "f" else 0.0
    with np.errstate(invalid="ignore"):  # infinities, which are not constants here
        spread = np.ptp(values, (0, 1))
        return spread <= precision * np.abs(values).max((0, 1), initial=0.0, where=values < np.inf)


def _diagnostics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R-hat, bulk and tail effective sample size of `[chain, draw, n]`, each `[n]`."""
    import xarray as xr

    arviz = import_arviz()
    data = xr.Dataset({"x": (("chain", "draw", "number"), values)})
    unknown = np.full(values.shape[-1], np.nan)
    if not unknown.size:
        return unknown, unknown, unknown
    rhat = arviz.rhat(data)["x"].to_numpy() if len(values) > 1 else unknown
    bulk = arviz.ess(data, method="bulk")["x"].to_numpy()
    tail = arviz.ess(data, method="tail")["x"].to_numpy()
    return rhat, bulk, tail


def _unusable(broken: np.ndarray, varying: np.ndarray, chains: int) -> Iterator[str]:
    if broken.size:
        yield (
            f"{broken[0]} is not finite in every draw: look for overflow in the model, or run it in "
            "float64"
        )
    if not varying.size:
        yield (
            "every number is the same in all draws, so the sampler is stuck: look for an overflow "
            "in the model's gradient"
        )
    elif chains == 1:
        yield "one chain cannot show whether chains agree: run 4 with chains=4"


def _apart(labels: np.ndarray, rhat: np.ndarray) -> Iterator[str]:
    if rhat.size and not rhat.max() < MAX_RHAT:
        worst = int(np.argmax(rhat))
        yield (
            f"R-hat is {rhat[worst]:.3f} at {labels[worst]}, {MAX_RHAT} or more: the "
            "chains do not agree. Raise tune= and draws=; if it stays, the posterior has several "
            "modes or a scale that wants a non-centred form"
        )


def _too_few(labels: np.ndarray, ess: np.ndarray, use: str, chains: int) -> Iterator[str]:
    needed = MIN_ESS_PER_CHAIN * chains
    if ess.size and not ess.min() >= needed:
        worst = int(np.argmin(ess))
        yield (
            f"the effective sample size for {use} is {ess[worst]:.0f} at {labels[worst]}, "
            f"less than {needed}: raise draws="
        )


def _divergent(divergences: int | None, transitions: int) -> Iterator[str]:
    if divergences:
        yield (
            f"{divergences} of {transitions} transitions diverged: the draws may miss regions of "
            "high curvature. Raise target_accept= to 0.95 or 0.99, or write scales in non-centred "
            "form"
        )

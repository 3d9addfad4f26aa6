"""Posterior predictive checks: does the fitted model make data like those that were observed?

Statistics of the data are compared with those of data sets that the model makes (Gelman, Meng & Stern
1996, https://www.jstor.org/stable/24306036; Bayesian Data Analysis, section 6.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError
from pyro_vi_kit.model.groups import squeeze
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation import Approximation
from pyro_vi_kit.posterior.diagnostics.observations import Kind, observations

if TYPE_CHECKING:
    import pandas as pd

# Of many data sets `[S, n]` at once: `[S]`.
Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]
# A user's, of one data set.
Function: TypeAlias = Callable[[np.ndarray], Any]

_MOST_CLASSES = 6
# Two-sided tail probabilities below which a statistic is called high or low, and too high or too low.
_UNUSUAL, _EXTREME = 0.1, 0.02


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
    """Draw the observed sites anew; see `Posterior.replicate`.

    Latents inside plates stay those of their rows; what is new is what the model calls data. The
    verdict's word is ``level``, None for a point estimate.
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


# -- statistics -----------------------------------------------------------------------------------


def _skewness(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (centred**3).mean(-1) / spread**3, 0.0)


def _switches(values: np.ndarray) -> np.ndarray:
    """Neighbours that differ: what dependence between neighbouring data changes."""
    return (np.diff(values, axis=-1) != 0).sum(-1).astype(float)


def _resultant(values: np.ndarray) -> np.ndarray:
    return np.hypot(np.cos(values).mean(-1), np.sin(values).mean(-1))


def _share(value: float) -> Statistic:
    return lambda values: (values == value).mean(-1)


_mean, _max = partial(np.mean, axis=-1), partial(np.max, axis=-1)
_MOMENTS: Mapping[str, Statistic] = {
    "mean": _mean,
    "sd": partial(np.std, axis=-1),
    "min": partial(np.min, axis=-1),
    "max": _max,
    "skewness": _skewness,
}

DEFAULTS: Mapping[Kind, Mapping[str, Statistic]] = {
    "real": _MOMENTS,
    "positive": _MOMENTS,
    "count": {"mean": _mean, "sd": _MOMENTS["sd"], "share of zeros": _share(0.0), "max": _max},
    "binary": {"share of ones": _mean, "switches": _switches},
    "angle": {
        "mean cosine": lambda values: np.cos(values).mean(-1),
        "mean sine": lambda values: np.sin(values).mean(-1),
        "resultant length": _resultant,
    },
}


def defaults(kind: Kind, observed: np.ndarray) -> Mapping[str, Statistic]:
    """The statistics that suit a kind of data.

    Args:
        kind: What the values are.
        observed: The data, `[n]`: of classes, the commonest are counted.
    """
    if kind != "category":
        return DEFAULTS[kind]
    classes, counts = np.unique(observed, return_counts=True)
    common = np.sort(classes[np.argsort(-counts, kind="stable")[:_MOST_CLASSES]])
    return {f"share of {value:g}": _share(value) for value in common}


def apply(name: str, function: Function, data: np.ndarray) -> np.ndarray:
    """A user's statistic of each data set `[S, ...]`: `[S]`.

    Raises:
        OptionError: If it cannot be called, raises, or gives no number.
    """
    if not callable(function):
        raise OptionError(
            f"statistic {name!r} must be a function of an array, got {type(function).__name__}"
        )
    found = np.empty(len(data))
    for i, one in enumerate(data):
        try:
            value = np.asarray(function(one), dtype=float)
        except Exception as error:
            raise OptionError(
                f"statistic {name!r} raised {type(error).__name__} on an array of shape {one.shape}: "
                f"{error}"
            ) from error
        if value.size != 1:
            raise OptionError(
                f"statistic {name!r} must give one number for a data set, got shape {value.shape}"
            )
        found[i] = value.item()
    return found


# -- the data among the data sets -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """One statistic of one observed site.

    Attributes:
        site: The site's name.
        statistic: The statistic's name.
        observed: Its value on the data.
        replicated: Its values on the replicated data sets, `[S]`; NaN where it has none.
    """

    site: str
    statistic: str
    observed: float
    replicated: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """The values that are no NaN."""
        return self.replicated[~np.isnan(self.replicated)]

    @property
    def p_above(self) -> float:
        """Share of replicated data sets above the data, these counted among them, ties by half.

        Uniform where the data are one more data set of the same kind; never 0 or 1.
        """
        values = self.finite
        # A mean of the same numbers in another order is the same mean.
        ties = np.isclose(values, self.observed, rtol=1e-9, atol=0.0)
        above, tied = float((~ties & (values > self.observed)).sum()), float(ties.sum())
        return (above + 0.5 * (tied + 1)) / (len(values) + 1)

    @property
    def p_value(self) -> float:
        """Two-sided tail probability."""
        return min(1.0, 2 * min(self.p_above, 1 - self.p_above))

    @property
    def reading(self) -> str:
        """What that means, in words."""
        if not np.isfinite(self.observed) or not len(self.finite):
            return "cannot be told: the statistic is not finite"
        if self.p_value >= _UNUSUAL:
            return "fits"
        high = self.p_above < 0.5
        side = "high" if high else "low"
        if self.p_value >= _EXTREME:
            return f"somewhat {side}"
        values = self.finite
        reached = int((values >= self.observed if high else values <= self.observed).sum())
        number = "none" if reached == 0 else f"only {reached:,}"
        return f"too {side}: {number} of {len(values):,} as {side}"


def comparisons(
    replicates: Replicates, statistics: Mapping[str, Function] | None = None
) -> list[Comparison]:
    """Every statistic of every site.

    Args:
        replicates: The data sets.
        statistics: Functions of one data set by name; those that suit the kind of data when None.

    Raises:
        OptionError: If a statistic cannot be used.
    """
    if statistics is not None and (not isinstance(statistics, Mapping) or not statistics):
        raise OptionError(
            "statistics= must be a dict of functions by name, as {'range': np.ptp}, "
            f"got {type(statistics).__name__}"
        )
    return [found for site in replicates.sites for found in _of_site(site, statistics)]


def table(
    replicates: Replicates, statistics: Mapping[str, Function] | None, prob: float
) -> pd.DataFrame:
    """The comparisons as a frame; see `Posterior.check_predictive`."""
    import pandas as pd

    tail = 50.0 * (1.0 - prob)
    rows = []
    for found in comparisons(replicates, statistics):
        values = found.finite if len(found.finite) else np.array([np.nan])
        low, high = np.quantile(values, [tail / 100, 1 - tail / 100])
        rows.append(
            {
                "site": found.site,
                "statistic": found.statistic,
                "observed": found.observed,
                "mean": float(values.mean()),
                "sd": float(values.std()),
                f"{tail:g}%": float(low),
                f"{100 - tail:g}%": float(high),
                "p_above": found.p_above,
                "p_value": found.p_value,
                "reading": found.reading,
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs["note"] = replicates.note
    return frame


def _of_site(site: Replicated, statistics: Mapping[str, Function] | None) -> Iterator[Comparison]:
    if statistics is not None:
        for name, function in statistics.items():
            values = apply(name, function, np.concatenate([site.observed[None], site.replicated]))
            yield Comparison(site.name, name, float(values[0]), values[1:])
        return
    observed = site.observed.reshape(1, -1).astype(float)
    copies = site.replicated.reshape(len(site.replicated), -1).astype(float)
    for name, function in defaults(site.kind, observed[0]).items():
        yield Comparison(site.name, name, float(function(observed)[0]), function(copies))

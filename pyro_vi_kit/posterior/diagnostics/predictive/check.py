"""Test statistics of the data among those of replicated data sets.

Gelman, Meng & Stern 1996, https://www.jstor.org/stable/24306036; Bayesian Data Analysis, section 6.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.posterior.diagnostics.predictive.replicates import Replicated, Replicates
from pyro_vi_kit.posterior.diagnostics.predictive.statistics import Function, apply, defaults

if TYPE_CHECKING:
    import pandas as pd

# Two-sided tail probabilities below which a statistic is called high or low, and too high or too low.
_UNUSUAL, _EXTREME = 0.1, 0.02


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

    if not 0 < prob < 1:
        raise OptionError(f"prob= must lie between 0 and 1, got {told(prob)}")
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

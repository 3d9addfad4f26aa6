"""The model against the data: leave-one-out, and data sets that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.options import (
    DRAWS,
    SEED,
    checks,
    flag,
    mapping,
    names,
    optional,
    share,
    text,
)
from pyro_vi_kit.posterior.diagnostics import loo, predictive
from pyro_vi_kit.posterior.quality import Judged

if TYPE_CHECKING:
    import pandas as pd


class AgainstData(Judged):
    """The part of a posterior that holds the model against the data."""

    @checks(sites=optional(names), plate=optional(text), draws=DRAWS, seed=SEED)
    def loo(
        self,
        sites: str | Sequence[str] | None = None,
        plate: str | None = None,
        *,
        draws: int = 4000,
        seed: int = 0,
    ) -> Any:
        """Leave-one-out cross-validation (PSIS-LOO) without fitting again, as ArviZ's ``ELPDData``.

        Draws of q are weighted by p(z | y) / q(z) x 1 / p(y_i | z), Pareto-smoothed for each observation
        (Magnusson et al. 2019, https://proceedings.mlr.press/v97/magnusson19a.html), so that the answer
        is the posterior's and not the guide's. ``az.compare`` and ``az.plot_khat`` take the result. It
        holds the elpd and its standard error (nats), the effective number of parameters and, for each
        observation under the plate's names, the elpd and k-hat: ``elpd_loo``, ``se``, ``p_loo``,
        ``loo_i``, ``pareto_k`` with ArviZ 0.x; ``elpd``, ``se``, ``p``, ``elpd_i``, ``pareto_k`` with
        1.x.

        What a mask hides is not counted. Several observed sites of the same dims are left out row by
        row.

        Args:
            sites: Observed sites whose densities count; all when None.
            plate: Leave out whole rows of this plate instead of single observations.
            draws: Draws from q.
            seed: The same seed gives the same numbers.

        Raises:
            OptionError: If nothing can be left out: a point estimate, no observed site or none in a
                plate, streamed data, sites with different dims.
            ModelError: If the model has no batched density.

        Warns:
            LooWarning: Where k-hat says that an observation's elpd may be off; with the remedy.
        """
        self._require_spread()
        with self._few_threads():
            return loo.loo(
                self.approximation,
                self._known_density(),
                self.model.coords,
                sites=sites,
                plate=plate,
                draws=draws,
                seed=seed,
            )

    @checks(
        statistics=optional(mapping),
        sites=optional(names),
        draws=DRAWS,
        seed=SEED,
        prob=share,
        corrected=optional(flag),
    )
    def check_predictive(
        self,
        statistics: Mapping[str, Callable[[np.ndarray], float]] | None = None,
        *,
        sites: str | Sequence[str] | None = None,
        draws: int = 1000,
        seed: int = 0,
        prob: float = 0.9,
        corrected: bool | None = None,
    ) -> pd.DataFrame:
        """Compare the data with data sets that the fitted model makes (posterior predictive checks).

        One row for each observed site and statistic. Columns: ``site``, ``statistic``, ``observed``;
        the replicated data sets' ``mean``, ``sd`` and interval; ``p_above``, the share of them above the
        data, ties counted by half; ``p_value``, two-sided; and ``reading``, in words. ``attrs["note"]``
        says how the draws were made. With a right model p-values gather around the middle, since the
        data have been used to fit it (Gelman et al. 2013, Bayesian Data Analysis, section 6.3): a small
        one means more than its size, a large one proves little.

        Args:
            statistics: Functions of a data set by name, of an array in the site's own shape (only what
                no mask hides, `[n, *event]`, where there is one). By default some that suit the kind of
                data.
            sites: Observed sites to look at; all when None.
            draws: Replicated data sets.
            seed: The same seed gives the same table.
            prob: Mass of the interval.
            corrected: Resample the draws by their importance weights; when None, where the verdict says
                "resample".

        Raises:
            OptionError: If there are no observed sites, the data are streamed, or an option is wrong.
            ModelError: If the data cannot be drawn.
        """
        replicates = self.replicate(draws, seed, sites=sites, corrected=corrected)
        return predictive.table(replicates, statistics, prob)

    @checks(draws=DRAWS, seed=SEED, sites=optional(names), corrected=optional(flag))
    def replicate(
        self,
        draws: int = 1000,
        seed: int = 0,
        *,
        sites: str | Sequence[str] | None = None,
        corrected: bool | None = None,
    ) -> predictive.Replicates:
        """Data sets that the fitted model makes, beside the data: what `check_predictive` looks at.

        Args:
            draws: Replicated data sets.
            seed: The same seed gives the same data sets.
            sites: Observed sites; all when None.
            corrected: As `check_predictive` has it.
        """
        level = None if self.approximation.point else (self.verdict and self.verdict.level)
        with self._few_threads():
            return predictive.replicate(
                self.approximation,
                self._known_density(),
                self.model,
                level=level,
                sites=sites,
                draws=draws,
                seed=seed,
                corrected=corrected,
            )

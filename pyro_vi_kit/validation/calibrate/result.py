"""What a calibration found: ranks, coverage, tests and the verdict."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import checks, is_array, share
from pyro_vi_kit.model.groups import dims_of, squeeze
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.labels import labels
from pyro_vi_kit.validation.calibrate.calibration_tests import (
    PROBS,
    Tested,
    assess,
    band,
    coverage_row,
    covered,
    ecdf,
)
from pyro_vi_kit.validation.calibrate.simulation import LOG_LIKELIHOOD, TARP, Ranks
from pyro_vi_kit.validation.calibrate.verdict import CalibrationVerdict, adjusted, in_words, judge
from pyro_vi_kit.validation.calibrate.workers import Run

if TYPE_CHECKING:
    import pandas as pd


def _masses(option: str, value: Any) -> list[float]:
    if not isinstance(value, Iterable) or is_array(value):
        raise OptionError(f"{option}= are masses between 0 and 1, got {told(value)}")
    return [share(option, prob) for prob in value]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `vi.calibrate` returns.

    Ranks and probabilities are of the simulations whose fit gave draws, N of them; those that failed are
    in ``failures``. A site of numbers that never differ from the truth, as a constant, is left out.

    Attributes:
        model: The model.
        guide: What was fitted.
        simulations: Data sets that were simulated.
        draws: S, draws that each truth was ranked among.
        seed: The seed.
        ranks: How many draws lie below the truth, 0 to S, ties broken at random, `{site: [N, *shape]}`.
            ``log_likelihood`` is of all data given the latents, a joint quantity.
        probabilities: Q(theta <= truth), continuous: uniform on (0, 1) where the guide is the
            posterior, `{site: [N, *shape]}`.
        truths: Values that the data were simulated from, `{site: [N, *shape]}`.
        tarp: Share of draws nearer than the truth to a random point, all latents together, continuous,
            `[N]`; None where a fitter did not give all latents.
        numbers: Index of each simulation among all, `[N]`.
        failures: Why a fit failed, by simulation.
        not_converged: Fits that did not meet their stopping rule; they are ranked all the same.
        seconds: Wall time of everything.
        jobs: Processes that worked on it.
        dims: Names of each site's dims.
        interrupted: Whether the user interrupted, so that it is of the simulations until then.
    """

    model: Model
    guide: str
    simulations: int
    draws: int
    seed: int
    ranks: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]
    truths: dict[str, np.ndarray]
    tarp: np.ndarray | None
    numbers: np.ndarray
    failures: dict[int, str]
    not_converged: int
    seconds: float
    jobs: int
    dims: dict[str, list[str]]
    interrupted: bool = False

    # -- by number ----------------------------------------------------------------------------

    def columns(self) -> dict[str, np.ndarray]:
        """The probabilities of each single number, `[N]`, by its label."""
        return {label: values for own in self.by_site.values() for label, values in own.items()}

    @functools.cached_property
    def by_site(self) -> dict[str, dict[str, np.ndarray]]:
        """The same by site: joint quantities too, ``log_likelihood`` and ``all latents`` (TARP)."""
        found = {
            name: {
                label: values[:, *index]
                for index, label in self._labels(name)
                if not self._is_constant(name, index)
            }
            for name, values in self.probabilities.items()
        }
        return found | ({} if self.tarp is None else {TARP: {TARP: self.tarp}})

    def _labels(self, site: str) -> list[tuple[tuple[int, ...], str]]:
        """Index and label of each number of a site."""
        shape = self.probabilities[site].shape[1:]
        return list(labels(site, shape, self.dims.get(site, ()), self.model.coords))

    def _is_constant(self, site: str, index: tuple[int, ...]) -> bool:
        values = self.truths[site][:, *index] if site in self.truths else np.arange(2)
        return bool((values == values[0]).all())

    @functools.cached_property
    def _assessed(self) -> dict[str, dict[str, Tested]]:
        return {
            name: {label: assess(values) for label, values in own.items()}
            for name, own in self.by_site.items()
            if own
        }

    # -- what it says -------------------------------------------------------------------------

    @functools.cached_property
    def verdict(self) -> CalibrationVerdict:
        """Whether the guide is calibrated, and what is wrong where it is not."""
        return judge(
            self._assessed,
            {label: covered(values, 0.9) for label, values in self.columns().items()},
            len(self.numbers),
            len(self.failures),
            next(iter(self.failures.values()), ""),
            self.not_converged,
        )

    def p_values(self) -> dict[str, float]:
        """The p-value of each site, adjusted for all tests and sites, that the verdict rests on."""
        return adjusted(self._assessed)

    def summary(self) -> pd.DataFrame:
        """A row for each number, and for ``log_likelihood`` and all latents jointly (TARP).

        Columns: ``verdict``; ``bias``, sds by which the guide is too high; ``dispersion``, the
        factor by which it is too narrow (above 1) or too wide; the share of truths inside central
        intervals, ``50%`` to ``95%``; p-values ``p_bias`` (VSBC), ``p_dispersion`` and ``p_uniform``
        (SBC), raw; ``p_site``, adjusted for all tests and sites, which the verdict rests on.
        """
        import pandas as pd

        p = self.p_values()
        rows = {}
        for site, own in self._assessed.items():
            for label, number in own.items():
                values = self.by_site[site][label]
                rows[label] = {
                    "verdict": in_words(site, number, len(own), p[site]),
                    "bias": number.bias,
                    "dispersion": number.dispersion,
                    **{f"{100 * prob:g}%": covered(values, prob) for prob in PROBS},
                    "p_bias": number.p_bias,
                    "p_dispersion": number.p_dispersion,
                    "p_uniform": number.p_uniform,
                    "p_site": p[site],
                }
        return pd.DataFrame.from_dict(rows, orient="index")

    @checks(probs=_masses)
    def coverage(self, probs: Sequence[float] = PROBS) -> pd.DataFrame:
        """How often central intervals hold the truth, with 95 % intervals of that share (binomial).

        Args:
            probs: Masses of the intervals.

        Returns:
            Columns ``parameter``, ``prob``, ``coverage``, ``low``, ``high``.

        Raises:
            OptionError: If a mass is not between 0 and 1.
        """
        import pandas as pd

        rows = [
            {"parameter": label, **coverage_row(values, prob)}
            for site, own in self.by_site.items()
            if site not in (LOG_LIKELIHOOD, TARP)
            for label, values in own.items()
            for prob in probs
        ]
        return pd.DataFrame(rows)

    def expected_coverage(self) -> pd.DataFrame:
        """Expected coverage of regions about random points, all latents jointly (TARP).

        Returns:
            Columns ``credibility``, the region's mass under the guide; ``coverage``, how often it holds
            the truth; ``low`` and ``high``, between which the whole curve stays with 95 % probability
            where the guide is the posterior.

        Raises:
            OptionError: If a fitter did not give all latents.
        """
        import pandas as pd

        if self.tarp is None:
            raise OptionError("expected coverage needs draws of all latents, and fitter= gave some")
        limits = band(len(self.tarp))
        columns = {
            "credibility": limits.points,
            "coverage": ecdf(self.tarp, limits.points),
            "low": limits.low,
            "high": limits.high,
        }
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """All ranks in one table, a row for each number of each simulation.

        Columns ``simulation``, ``parameter``, ``truth``, ``rank``, ``probability``. Joint quantities
        have no truth, and TARP has no rank.
        """
        import pandas as pd

        parts = []
        for site, own in self.by_site.items():
            named = {label: i for i, label in self._labels(site)} if site in self.ranks else {}
            for label, values in own.items():
                index = (slice(None), *named.get(label, ()))
                columns: dict[str, Any] = {
                    "simulation": self.numbers,
                    "parameter": label,
                    "truth": self.truths[site][index] if site in self.truths else np.nan,
                    "rank": self.ranks[site][index] if site in self.ranks else -1,
                    "probability": values,
                }
                parts.append(pd.DataFrame(columns))
        frame = pd.concat(parts, ignore_index=True)
        return frame.astype({"rank": "Int64"}).replace({"rank": {-1: pd.NA}})

    def __repr__(self) -> str:
        done = f"{len(self.numbers)} of {self.simulations} simulations"
        done += " (interrupted)" if self.interrupted else ""
        within = f"{self.seconds:.1f} s" + (f" in {self.jobs} processes" if self.jobs > 1 else "")
        return "\n".join(
            [
                f"Calibration of {self.guide!r} on {self.model.name!r}: {self.verdict}",
                f"  ranked   {done}, among {self.draws} draws each, in {within}",
                "  see      .summary(), .coverage(), plots.rank_ecdf(calibration)",
            ]
        )


def collected(density: Density, guide: str, run: Run, seconds: float) -> Calibration:
    """The calibration that these results make; some are missing where the user interrupted."""
    done = dict(sorted(run.results.items()))
    ranked = {i: result for i, result in done.items() if result.ranks is not None}
    draws, seed = run.simulation.draws, run.simulation.seed
    ranks, probabilities = _untied([r.ranks for r in ranked.values() if r.ranks], draws, seed)
    tarp = probabilities.pop(TARP, None)
    ranks.pop(TARP, None)
    numbers = np.array(list(ranked))
    sites = {name: density.structure.sites[name] for name in ranks if name != LOG_LIKELIHOOD}
    return Calibration(
        model=density.model,
        guide=guide,
        simulations=len(run.data_sets),
        draws=draws,
        seed=seed,
        ranks=ranks,
        probabilities=probabilities,
        truths={n: squeeze(s, run.data_sets.truths[n])[numbers] for n, s in sites.items()},
        tarp=tarp,
        numbers=numbers,
        failures={i: result.error for i, result in done.items() if result.error},
        not_converged=sum(not result.converged for result in ranked.values()),
        seconds=seconds,
        jobs=run.jobs,
        dims={name: dims_of(density.model, site) for name, site in sites.items()},
        interrupted=run.interrupted,
    )


def _untied(
    counts: Sequence[Ranks], draws: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ranks with ties broken at random, and continuous probabilities, each `{site: [N, *shape]}`."""
    generator = np.random.default_rng([seed, 1])
    ranks, probabilities = {}, {}
    for name in counts[0].below:
        below = np.stack([each.below[name] for each in counts])
        equal = np.stack([each.equal[name] for each in counts])
        ranks[name] = below + generator.integers(0, equal + 1)
        # Inside of (0, 1): a normal score of 0 or 1 would be infinite.
        within = generator.uniform(1e-9, 1.0 - 1e-9, below.shape)
        probabilities[name] = (ranks[name] + within) / (draws + 1)
    return ranks, probabilities

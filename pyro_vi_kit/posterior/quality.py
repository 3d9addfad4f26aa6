"""How good a fit is: bounds, importance weights, and the verdict."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import checks, share
from pyro_vi_kit.core.psis import Psis
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.base import Fitted
from pyro_vi_kit.posterior.diagnostics import diagnosis
from pyro_vi_kit.posterior.diagnostics.verdict import Verdict
from pyro_vi_kit.posterior.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    import pandas as pd


class Judged(Fitted):
    """The part of a posterior that says whether to believe it."""

    @functools.cached_property
    def _evaluation(self) -> Evaluation:
        with self._few_threads():
            return evaluate(self.approximation, self._named)

    @property
    def _smoothed(self) -> Psis | None:
        return self._evaluation.smoothed

    @property
    def elbo(self) -> float | None:
        """The single-sample ELBO of q on fresh draws, nats; None for a point estimate."""
        return self._evaluation.elbo

    @property
    def elbo_se(self) -> float | None:
        """Standard error of `elbo`, nats."""
        return self._evaluation.elbo_se

    @property
    def bound(self) -> float | None:
        """The trained objective's value, nats."""
        return self.elbo if self.record.bound is None else self.record.bound

    @property
    def khat(self) -> float | None:
        """Pareto k-hat of the joint importance ratios; None for a point estimate."""
        return None if self._smoothed is None else self._smoothed.khat

    @property
    def khat_se(self) -> float | None:
        """Standard error of `khat`: how far another set of draws would put it."""
        return None if self._smoothed is None else self._smoothed.khat_se

    @property
    def ess(self) -> float | None:
        """Effective number of the weighted draws that `khat` and `log_evidence` are read off.

        There are 4,000 of them, up to 64,000 where the verdict is a close call, fewer where a draw is
        large. None for a point estimate.
        """
        return None if self._smoothed is None else self._smoothed.ess

    @property
    def log_evidence(self) -> tuple[float, float] | None:
        """Importance-weighted log evidence and its standard error, nats.

        With improper priors or factors it is defined up to their constant.
        """
        smoothed = self._smoothed
        if smoothed is None:
            return None
        return smoothed.log_mean_weight, smoothed.log_mean_weight_se

    @functools.cached_property
    def _diagnosis(self) -> diagnosis.Diagnosis | None:
        with self._few_threads():
            return diagnosis.diagnose(
                self.approximation,
                self.density,
                self._evaluation,
                self._named,
                self.status,
                (self._dims(), self.model.coords),
            )

    def _given_up(self) -> Iterator[str]:
        """That of the verdict too, once somebody has asked for it."""
        yield from super()._given_up()
        found = self.__dict__.get("_diagnosis")
        if found is not None:
            yield from found.found.given_up

    @property
    def verdict(self) -> Verdict | None:
        """Whether to believe it; None for a point estimate."""
        return None if self._diagnosis is None else self._diagnosis.verdict

    def diagnose(self) -> pd.DataFrame:
        """Whether to believe each number: a row for each, labelled as in `summary`.

        Columns: ``khat``, Pareto k-hat of the importance weights smoothed along that number, a
        heuristic that says which numbers make the weights uneven, or of each datum's own weights where
        the guide has a distribution for each datum; ``mean_shift``, how far a correction moves its
        mean, in sds; ``sd_shift``, how far it moves its sd, as a share of it; both with their Monte
        Carlo errors ``..._se``; and ``verdict``. What corrects is in ``attrs["shifts"]``: importance
        weights, or short Hamiltonian chains that begin at draws of q.

        Raises:
            OptionError: For a point estimate, which has no spread to be judged.
        """
        found = self._diagnosis
        if found is None:
            raise OptionError(
                f"{self._point_words()} has no spread to be judged: fit a guide with spread, e.g. "
                "guide='mean_field'"
            )
        with self._few_threads():
            return found.table(self.approximation)

    @checks(prob=share)
    def summary(self, prob: float = 0.9) -> pd.DataFrame:
        """Mean, sd, interval and Monte Carlo error of each parameter, with its verdict.

        Args:
            prob: Mass of the equal-tailed interval.
        """
        from pyro_vi_kit.posterior.summary import summarise

        levels = () if self._diagnosis is None else self._diagnosis.levels.tolist()
        verdict = "" if self.verdict is None else str(self.verdict)
        values, coords = self._evaluation.values, self.model.coords
        return summarise(values, self._dims(), coords, levels, prob, verdict)

    def __repr__(self) -> str:
        if self.approximation.point:
            words = self._point_words().removeprefix("a ")
            if isinstance(self.approximation, GuideApproximation):
                words = "point estimate"
            else:
                words += ", without ELBO, k-hat, evidence and verdict"
            head = f"{self.guide} posterior of {self.model.name}: {words}"
        else:
            head = f"{self.guide} posterior of {self.model.name}: {self.verdict}"
        lines = [head, f"  status   {self.status.reason}: {self.status.advice}"]
        lines += [f"  note     {note}" for note in self.status.notes]
        if not self.approximation.point:
            nats, se = self.log_evidence or (np.nan, np.nan)
            lines += [
                f"  ELBO     {self.elbo:.3f} nats (s.e. {self.elbo_se:.3f})",
                f"  evidence {nats:.3f} nats (s.e. {se:.3f}), by importance weights",
            ]
        if self.record.correction:
            lines.append(f"  corrected by {self.record.correction}")
        lines.append(
            f"  made by  {self.method} on the {self.engine} engine, objective "
            f"{self.record.objective.name}: {self.evaluations:,} gradient evaluations in "
            f"{self.seconds:.2f} s"
        )
        if self.record.ladder:
            lines.append(f"  climbed  {' -> '.join(map(str, self.record.ladder))}")
        return "\n".join(lines)

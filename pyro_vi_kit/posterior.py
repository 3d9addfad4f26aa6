"""A fitted posterior: draws, quality, predictions, and the way out to ArviZ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vi_kit import (
    amortization,
    diagnosis,
    evidence,
    export,
    linear_response,
    loo,
    pointwise,
    predictive,
    refinement,
    storage,
)
from pyro_vi_kit.approximation import Approximation, GuideApproximation
from pyro_vi_kit.density import Density
from pyro_vi_kit.device import Device
from pyro_vi_kit.errors import ModelError, OptionError, ViError
from pyro_vi_kit.evaluation import Evaluation, evaluate, usable
from pyro_vi_kit.groups import coords_of, dims_of, squeeze, width_of
from pyro_vi_kit.guides import FullRank, GuideSpec
from pyro_vi_kit.methods.result import HISTORY
from pyro_vi_kit.model import Model
from pyro_vi_kit.psis import psis, resample
from pyro_vi_kit.record import Record, ladder_frame
from pyro_vi_kit.runtime import fresh_seed, one_thread
from pyro_vi_kit.summary import summarise
from pyro_vi_kit.types import Status
from pyro_vi_kit.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

# Numbers that the draws of an export make together where nobody says how many there shall be: about
# 100 MB of file.
_EXPORTED = 10_000_000
_MOST_DRAWS, _FEWEST_DRAWS = 1000, 100
# Numbers that all draws together may make in a streamed model to be weighed for an export.
_WEIGHABLE = 10_000_000_000
_LEFT_OUT = (
    "The data are streamed, so that there is nothing here with a row for each datum: no observed_data, "
    "constant_data, log_likelihood and predictive groups; sample_stats only where the draws are few "
    "enough to be weighed on all data."
)


class Posterior:
    """What `vi.fit` returns.

    Args:
        model: The model.
        approximation: The trained guide.
        record: How it was trained.
        density: The model's Density; None where the model has none.
        spec: The guide's options, where it was named or configured.
    """

    def __init__(
        self,
        model: Model,
        approximation: Approximation,
        record: Record,
        density: Density | None,
        spec: GuideSpec | None = None,
    ) -> None:
        self.model = model
        self.approximation = approximation
        self.record = record
        self.density = density
        self.spec = spec

    # -- how it was done ----------------------------------------------------------------------

    @property
    def guide(self) -> str:
        """Name of the guide."""
        return self.approximation.name

    @property
    def status(self) -> Status:
        """How the fit ended, and what to do about it."""
        return self.record.status

    @property
    def losses(self) -> np.ndarray:
        """Minus the bound at each step, `[steps]`, nats; NaN where a step was skipped."""
        return self.record.losses

    @property
    def history(self) -> pd.DataFrame:
        """A row for each epoch; none where steps did not go by epochs.

        Columns: ``epoch``; ``seconds`` since training began; ``rate``, the learning rate at its end;
        ``bound``, mean training bound, and ``validation``, bound on data held out, both in nats per row
        of the data (where these have a plate).
        """
        import pandas as pd

        frame = pd.DataFrame(
            {name: self.record.history.get(name, []) for name in HISTORY}, dtype=float
        )
        return frame.astype({"epoch": int})

    @property
    def evaluations(self) -> int:
        """Per-sample gradient evaluations of the log density."""
        return self.record.evaluations

    @property
    def seconds(self) -> float:
        """Wall time of the fit."""
        return self.record.seconds

    @property
    def method(self) -> str:
        """How parameters moved: ``lbfgs`` or ``stochastic``."""
        return self.record.method

    @property
    def engine(self) -> str:
        """How steps were executed: ``eager`` or ``pyro``."""
        return self.record.engine

    @property
    def ladder(self) -> pd.DataFrame:
        """A row for each guide that ``guide="auto"`` tried; none where the guide was named.

        Columns: ``rung``, from 1; ``guide``; ``elbo`` (nats); ``khat``; ``verdict``; ``seconds``, the
        verdict's included; ``chosen``; ``ended``, how its fit ended, or why it was left out.
        """
        return ladder_frame(self.record.ladder)

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Learned parameters of the model (`pyro.param`, `pyro.module`), constrained, by name."""
        return {n: v.cpu().numpy() for n, v in self.approximation.parameters().items()}

    # -- how good it is -----------------------------------------------------------------------

    @functools.cached_property
    def _evaluation(self) -> Evaluation:
        with self._few_threads():
            return evaluate(self.approximation, self._named)

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
        return self._evaluation.khat

    @property
    def khat_se(self) -> float | None:
        """Standard error of `khat`: how far another set of draws would put it."""
        return self._evaluation.khat_se

    @property
    def ess(self) -> float | None:
        """Effective number of the weighted draws that `khat` and `log_evidence` are read off.

        There are 4,000 of them, up to 64,000 where the verdict is a close call, fewer where a draw is
        large. None for a point estimate.
        """
        return self._evaluation.ess

    @property
    def log_evidence(self) -> tuple[float, float] | None:
        """Importance-weighted log evidence and its standard error, nats.

        With improper priors or factors it is defined up to their constant.
        """
        return self._evaluation.log_evidence

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
                "a point estimate (guide 'delta') has no spread to be judged: fit a guide with spread, "
                "e.g. guide='mean_field'"
            )
        with self._few_threads():
            return found.table(self.approximation)

    def summary(self, prob: float = 0.9) -> pd.DataFrame:
        """Mean, sd, interval and Monte Carlo error of each parameter, with its verdict.

        Args:
            prob: Mass of the equal-tailed interval.
        """
        levels = () if self._diagnosis is None else self._diagnosis.levels.tolist()
        verdict = "" if self.verdict is None else str(self.verdict)
        values, coords = self._evaluation.values, self.model.coords
        return summarise(values, self._dims(), coords, levels, prob, verdict)

    def __repr__(self) -> str:
        if self.approximation.point:
            head = f"{self.guide} posterior of {self.model.name}: point estimate"
        else:
            head = f"{self.guide} posterior of {self.model.name}: {self.verdict}"
        lines = [head, f"  status   {self.status.reason}: {self.status.advice}"]
        if not self.approximation.point:
            nats, se = self.log_evidence or (np.nan, np.nan)
            lines += [
                f"  ELBO     {self.elbo:.3f} nats (s.e. {self.elbo_se:.3f})",
                f"  evidence {nats:.3f} nats (s.e. {se:.3f}), by importance weights",
            ]
        note = f" (not captured: {self.record.note})" if self.record.note else ""
        if self.record.correction:
            lines.append(f"  corrected by {self.record.correction}")
        lines.append(
            f"  made by  {self.method} on the {self.engine} engine{note}, objective "
            f"{self.record.objective.name}: {self.evaluations:,} gradient evaluations in "
            f"{self.seconds:.2f} s"
        )
        if self.record.ladder:
            lines.append(f"  climbed  {' -> '.join(map(str, self.record.ladder))}")
        return "\n".join(lines)

    # -- draws --------------------------------------------------------------------------------

    def sample(self, draws: int = 1000, seed: int | None = None) -> dict[str, np.ndarray]:
        """Draws from q, `{site: [draws, *site shape]}`, deterministic and discrete sites too.

        Discrete sites are drawn exactly given the continuous ones and the data, as integers.

        Args:
            draws: How many.
            seed: The same seed gives the same draws.
        """
        _require_draws(draws)
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            return self._named(self.approximation.draw(draws, seed))

    def resample(self, draws: int = 1000, seed: int | None = None) -> dict[str, np.ndarray]:
        """Draws corrected by Pareto-smoothed importance resampling, as `sample` gives them.

        Chosen from at least ten times as many draws of q.

        Raises:
            OptionError: For a point estimate, or where no draw has a positive density.
        """
        _require_draws(draws)
        self._require_spread()
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            values, weighed = self.approximation.draw_and_weigh(max(4000, 10 * draws), seed)
        smoothed = psis(usable((weighed.log_p - weighed.log_q).numpy()))
        chosen = resample(smoothed.log_weights, draws, np.random.default_rng(seed))
        return {name: value[chosen] for name, value in self._named(values).items()}

    def log_weights(self, draws: int = 1000, seed: int | None = None) -> np.ndarray:
        """Log p(x, z) - log q(z) in nats, `[draws]`, at what `sample` draws with that seed.

        Raises:
            OptionError: For a point estimate, which has no density.
        """
        _require_draws(draws)
        self._require_spread()
        with self._few_threads():
            weighed = self.approximation.weigh(draws, fresh_seed() if seed is None else seed)
        return (weighed.log_p - weighed.log_q).numpy()

    def _require_spread(self) -> None:
        if self.approximation.point:
            raise OptionError(
                "a point estimate (guide 'delta') has no log weights: fit a guide with "
                "spread, e.g. guide='mean_field'"
            )

    # -- corrections --------------------------------------------------------------------------

    def evidence(self, draws: int = 10_000, seed: int | None = None) -> tuple[float, float]:
        """Log evidence by importance weights and a standard error that knows of the tail, nats.

        Of mean_field and full_rank a fifth of the draws has one coordinate wide, so that tails heavier
        than q's are found. The error counts the mass beyond the largest weight that was drawn, and is
        infinite where the weights may have no mean. `log_evidence` is the plain mean of the 4,000
        weights of every diagnostic.

        Args:
            draws: How many; the error falls with their square root.
            seed: The same seed gives the same numbers.

        Raises:
            OptionError: For a point estimate, for fewer than 2 draws, or where none has a positive
                density.
        """
        _require_draws(draws)
        self._require_spread()
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            return evidence.estimate(self.approximation, draws, seed)

    def linear_response(
        self, draws: int | None = None, seed: int = 0, progress: bool | None = None
    ) -> Posterior:
        """The Gaussian of the same mean, with covariances by linear response (LRVB).

        Independent normals are too narrow; how their optimum moves when the posterior is tilted says
        what the covariances should be (Giordano, Broderick & Jordan 2018). The result is a full_rank
        posterior: `sample`, `summary`, `verdict`, `resample` and `save` are as ever. Its standard
        deviations on a constrained scale are those of the transformed Gaussian, which may be too
        skewed; `linear_response_summary` has those of each number itself.

        Args:
            draws: Fixed draws on which the fit is refined and differentiated; an even number, 2,048 or
                eight for each dimension when None.
            seed: Of the draws.
            progress: Show progress on stderr; None shows it on a terminal only.

        Raises:
            OptionError: If the guide is not mean_field (up to 1,000 unconstrained dimensions) or
                full_rank (up to 50) fitted to the ELBO of data in memory, or the ELBO has no optimum
                there.
        """
        response = self._response(draws, seed, progress)
        approximation, record = linear_response.corrected(
            response, self._of_this_package(), self.record, seed
        )
        return Posterior(self.model, approximation, record, approximation.density, FullRank())

    def linear_response_summary(
        self, draws: int | None = None, seed: int = 0, progress: bool | None = None
    ) -> pd.DataFrame:
        """Standard deviations by linear response, of latent and deterministic sites as reported.

        Columns: ``mean`` of q, ``sd`` by linear response, ``sd_q`` of q itself. The arguments and errors
        are those of `linear_response`.
        """
        response = self._response(draws, seed, progress)
        with self._few_threads():
            return linear_response.summarise(
                response,
                self._of_this_package(),
                self._named,
                dims=self._dims(),
                coords=self.model.coords,
                seed=seed,
            )

    def _response(
        self, draws: int | None, seed: int, progress: bool | None
    ) -> linear_response.Response:
        with self._few_threads():
            return linear_response.respond(
                self.approximation, self.record, draws=draws, seed=seed, progress=progress
            )

    # -- predictions --------------------------------------------------------------------------

    def predict(
        self,
        *args: Any,
        draws: int = 1000,
        seed: int | None = None,
        corrected: bool = False,
        **kwargs: Any,
    ) -> dict[str, np.ndarray]:
        """Predictive draws `{site: [draws, *shape]}` of the observed and deterministic sites.

        Args:
            *args: The model's arguments at new inputs; its own data when none are given. Pass None
                for what is to be predicted, where the model takes it.
            draws: How many.
            seed: The same seed gives the same draws.
            corrected: Start from draws chosen by importance resampling, as `resample` gives them,
                instead of draws from q.
            **kwargs: The model's keyword arguments.

        Raises:
            ModelError: If the model refuses the arguments.
            OptionError: If a point estimate, which has no weights, is to be corrected.
        """
        _require_draws(draws)
        if corrected:
            self._require_spread()
        seed = fresh_seed() if seed is None else seed
        if self.model.stream is not None and not (args or kwargs):
            raise OptionError(
                "predict() of a streamed model needs the inputs to predict at, posterior.predict(x, "
                "None): its own data are not in memory"
            )
        model = self.model.with_args(*args, **kwargs) if args or kwargs else self.model
        try:
            with self._few_threads():
                values = self.approximation.predict(model, draws, seed, corrected=corrected)
        except ViError:
            raise
        except Exception as error:
            raise ModelError(
                f"the model cannot predict with these arguments ({type(error).__name__}: {error}). "
                "Latents inside a plate keep its length; for new data of another length use "
                "posterior.infer(*args) with guide='amortized'"
            ) from error
        return self._named(values)

    def infer(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of new data in one pass of the encoder, nothing trained.

        Args:
            *args: The model's arguments on the new data.
            **kwargs: Its keyword arguments.

        Raises:
            OptionError: If the guide is not amortized.
        """
        if not self._encodes:
            raise OptionError(
                f"guide {self.guide!r} has no encoder to infer new data with: fit with "
                "guide='amortized', or fit the new data"
            )
        moved = self._of_this_package().moved_to(self.model.with_args(*args, **kwargs))
        model = _named_as_far_as_known(moved.density)
        return Posterior(model, moved, self.record, moved.density, self.spec)

    @property
    def _encodes(self) -> bool:
        """Whether an encoder gives each datum its distribution."""
        if not isinstance(self.approximation, GuideApproximation):
            return False
        guide = self.approximation.guide
        local = [block for block in guide.blocks if block.plate is not None]
        return bool(local) and all(guide.table(block) is None for block in local)

    # -- against the data ---------------------------------------------------------------------

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
        _require_draws(draws)
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
        _require_draws(draws)
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

    def _known_density(self) -> Density:
        if self.density is None:
            raise ModelError(
                "the plates and masks of this model are not known, since it has no batched density: "
                "vi.check(model) says what stands in the way"
            )
        return self.density

    # -- datum by datum -----------------------------------------------------------------------

    def refine(
        self,
        *args: Any,
        steps: int | None = None,
        tol: float = refinement.TOLERANCE,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Go on from the encoder's answer with numbers for each row (semi-amortized inference).

        Only the rows' own numbers are trained: the globals' distribution, what rows share (the layers of
        a flow) and the model's learned parameters stay as they are. An encoder that sees the globals is
        asked at their mean. The result has no encoder, and is saved and loaded like any posterior.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            steps: The most steps.
            tol: Nats a datum that the bound may fall short by, on average.
            seed: The same seed gives the same numbers on the same machine.
            batch_size: Rows in a step; all, or as many as memory has room for, when None.
            progress: Show progress on stderr; None shows it on a terminal only.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no distribution for each datum, or an option is wrong.
        """
        _require_at_least_one("steps", steps)
        _require_at_least_one("batch_size", batch_size)
        _require_tolerance(tol)
        target = self._on(args, kwargs)
        seed = fresh_seed() if seed is None else seed
        with target._few_threads(), torch.enable_grad():
            refined, record = refinement.refine(
                target._of_this_package(),
                self.record.objective,
                steps=steps,
                tol=tol,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
        return Posterior(target.model, refined, record, refined.density, self.spec)

    def per_datum(
        self,
        *args: Any,
        draws: int = 1000,
        seed: int = 0,
        plate: str | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """ELBO, log evidence, k-hat and effective draws of each row of the data plate.

        Columns: ``elbo``, the single-sample bound; ``log_evidence``, log p(x_i) by importance weights
        (the bound of `draws` samples in expectation); ``elbo_se`` and ``log_evidence_se``, all in nats;
        ``khat``; and ``ess``, the share of draws that the weights are worth. Sums are in ``attrs``. The
        index is named like the plate, so that ``.to_xarray()`` has it as its dimension.

        Where the model has global latents, everything is given them: they are held at the mean of q,
        unconstrained, and ``attrs["globals"]`` says so.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            draws: Draws of each row.
            seed: The same seed gives the same numbers.
            plate: Whose rows, where the guide has local latents in several.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no distribution for each datum, or the rows of the plate depend
                on each other's latents.
        """
        _require_draws(draws)
        self._require_spread()
        target = self._on(args, kwargs)
        approximation = target._of_this_package()
        with target._few_threads():
            seen = pointwise.seen_per_datum(approximation.guide, approximation.params, plate)
            return pointwise.table(seen, draws, seed, target.model.coords)

    def amortization_gap(
        self,
        *args: Any,
        draws: int = 1000,
        seed: int = 0,
        plate: str | None = None,
        steps: int | None = None,
        tol: float = refinement.TOLERANCE,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """What the encoder loses for each row, and what its family loses, in nats.

        Columns: ``elbo`` of the encoder's answer, ``elbo_refined`` of the best member of the family
        that `refine` finds, ``log_evidence`` by its importance weights; ``amortization``, what the
        second has over the first, and ``approximation``, what the third has over the second; with
        standard errors. Means over rows are in ``attrs``, and ``attrs["summary"]`` says them. Globals
        are held at the mean of q, as in `per_datum`.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            draws: Draws of each row.
            seed: The same seed gives the same numbers.
            plate: Whose rows, where the guide has encoders for several.
            steps: The most steps of the refinement.
            tol: Nats a datum that the refinement may fall short by, on average.
            progress: Show progress on stderr; None shows it on a terminal only.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no encoder, or an option is wrong.
        """
        _require_draws(draws)
        _require_at_least_one("steps", steps)
        _require_tolerance(tol)
        target = self._on(args, kwargs)
        with target._few_threads(), torch.enable_grad():
            return amortization.gaps(
                target._of_this_package(),
                target.model.coords,
                plate=plate,
                draws=draws,
                seed=seed,
                steps=steps,
                tol=tol,
                progress=progress,
            )

    def _on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Posterior:
        """This posterior, or what the encoder infers of new data."""
        return self.infer(*args, **kwargs) if args or kwargs else self

    def _of_this_package(self) -> GuideApproximation:
        if not isinstance(self.approximation, GuideApproximation):
            raise OptionError(
                f"guide {self.guide!r} is a Pyro guide, whose parts for each datum are not known: fit "
                "with guide='amortized'"
            )
        return self.approximation

    # -- the way out --------------------------------------------------------------------------

    def to_arviz(self, draws: int | None = None, seed: int = 0) -> Any:
        """`InferenceData` (ArviZ 0.x) or `DataTree` (1.x) with one chain of draws from q.

        Groups: posterior, unconstrained_posterior, posterior_predictive, log_likelihood, prior,
        prior_predictive, observed_data, constant_data, sample_stats (log_p, log_q, log_w) and
        loss_trace, those that the model has.

        Args:
            draws: Draws from q; 1,000 when None, and down to 100 where a draw makes many numbers.
            seed: The same seed gives the same draws.
        """
        draws = self._exported(draws)
        with self._few_threads():
            groups = self.groups(draws, seed)
        coords = coords_of(self.model, groups)
        return export.to_arviz(groups, coords, self.attrs(seed))

    def groups(self, draws: int, seed: int) -> dict[str, export.Group]:
        """What `to_arviz` exports, as plain arrays."""
        groups = self.approximation.groups(draws, seed)
        if not self.approximation.point and self._weighable(draws):
            log_p, log_q = (t.numpy()[None] for t in self.approximation.weigh(draws, seed))
            groups["sample_stats"] = export.Group(
                {"log_p": log_p, "log_q": log_q, "log_w": log_p - log_q}
            )
        history = {name: c for name, c in self.record.history.items() if name != "epoch"}
        dims = {"loss": ["step"]} | {name: ["epoch"] for name in history}
        groups["loss_trace"] = export.Group(
            {"loss": self.losses} | history, dims, sampled=False, attrs={"unit": "nats"}
        )
        return groups

    def _weighable(self, draws: int) -> bool:
        """Whether so many draws are weighed on all data in about a minute."""
        return self.model.stream is None or draws * self.approximation.cost <= _WEIGHABLE

    def attrs(self, seed: int) -> dict[str, Any]:
        """How it was made and how good it is, in what netCDF can hold."""
        attrs = {"model": self.model.name, "guide": self.guide, "draws_seed": seed}
        attrs |= self.record.attrs() | self._evaluation.attrs()
        if self.verdict is not None:
            attrs |= {
                "verdict": self.verdict.level,
                "verdict_reasons": "; ".join(self.verdict.reasons),
                "verdict_advice": self.verdict.advice,
            }
        if self.model.stream is not None:
            attrs |= {"streamed_rows": self.model.stream.rows, "left_out": _LEFT_OUT}
        if self.parameters:
            attrs["learned_parameters"] = ", ".join(self.parameters)
        return attrs

    def save(self, path: str | Path, draws: int | None = None) -> Path:
        """Write valid ArviZ netCDF that also holds the guide's tensors; read it with `vi.load`.

        Args:
            path: The file.
            draws: Draws from q in it; 1,000 when None, and down to 100 where a draw makes many numbers.

        Raises:
            FileError: If the path cannot be written.
        """
        draws = self._exported(draws)
        target = export.check_writable(path)
        with self._few_threads():
            groups = self.groups(draws, seed=0)
        groups[storage.GROUP] = storage.guide_group(self.approximation, self.record, self.spec)
        coords = coords_of(self.model, groups)
        return export.write(export.to_arviz(groups, coords, self.attrs(0)), target)

    def _exported(self, draws: int | None) -> int:
        """How many draws an export holds."""
        if draws is not None:
            _require_draws(draws)
            return draws
        numbers = 1 if self.density is None else max(width_of(self.density), 1)
        return min(_MOST_DRAWS, max(_FEWEST_DRAWS, _EXPORTED // numbers))

    # -- names --------------------------------------------------------------------------------

    def _named(self, values: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Values in each site's own shape."""
        sites = {} if self.density is None else self.density.structure.sites
        return {
            name: squeeze(sites[name], value) if name in sites else value.detach().cpu().numpy()
            for name, value in values.items()
        }

    def _dims(self) -> dict[str, list[str]]:
        if self.density is None:
            return {}
        return {
            site.name: dims_of(self.model, site)
            for site in self.density.structure.of_kind("latent", "discrete", "deterministic")
        }

    def _few_threads(self) -> Any:
        return one_thread(self.density is None or is_small(self.density))


def load(
    path: str | Path,
    model: Model,
    *,
    guide: GuideSpec | Callable[..., Any] | None = None,
    device: Device | None = None,
) -> Posterior:
    """Read a posterior that `Posterior.save` wrote. Nothing in the file is ever run.

    Args:
        path: The file.
        model: The model it is a posterior of, with its data.
        guide: The configured guide or Pyro guide, where the file cannot name it: one with an encoder
            of the user's, or a Pyro guide callable.
        device: Where to put it, as ``fit`` has it; where the model's data are when None.

    Raises:
        FileError: If the file cannot be read or holds no posterior of this package.
        ModelError: If the model's latents are not those of the file.
        OptionError: If ``guide=`` is needed, or `model` is no `Model`.
    """
    if not isinstance(model, Model):
        raise OptionError(f"load takes the vi.Model of the posterior, got {type(model).__name__}")
    restored = storage.restore(path, model, guide, device)
    return Posterior(
        model, restored.approximation, restored.record, restored.density, restored.spec
    )


def is_small(density: Density) -> bool:
    """Whether more than one thread would only wait: under a million numbers of data."""
    return sum(t.numel() for t in density.data) < 1_000_000


def _named_as_far_as_known(density: Density) -> Model:
    """The density's model without the names of a plate's rows where it has another number of them."""
    plates, model = density.structure.plates, density.model
    coords = {
        dim: names
        for dim, names in model.coords.items()
        if dim not in plates or len(names) == plates[dim].size
    }
    return Model(
        model.fn, *model.args, kwargs=model.kwargs, coords=coords, dims=model.dims, name=model.name
    )


def _require_at_least_one(option: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and not whole:
        raise OptionError(f"{option}= must be an integer of at least 1, got {value!r}")


def _require_tolerance(tol: object) -> None:
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not tol > 0:
        raise OptionError(f"tol= must be a positive number of nats, got {tol!r}")


def _require_draws(draws: int) -> None:
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise OptionError(f"draws must be a positive integer, got {draws!r}")

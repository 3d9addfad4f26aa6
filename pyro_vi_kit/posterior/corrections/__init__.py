"""Corrections of a fit that cost little: evidence, linear response.

What is weighed and corrected for a verdict is in `diagnostics`; importance resampling is in `sampling`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pyro_vi_kit.core.options import DRAWS, SEED, checks, flag, optional
from pyro_vi_kit.core.runtime import fresh_seed
from pyro_vi_kit.guides import FullRank
from pyro_vi_kit.posterior.base import Fitted
from pyro_vi_kit.posterior.corrections import evidence, linear_response

if TYPE_CHECKING:
    import pandas as pd


class Corrected(Fitted):
    """The part of a posterior that mends it."""

    @checks(draws=DRAWS, seed=optional(SEED))
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
        self._require_spread()
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            return evidence.estimate(self.approximation, draws, seed)

    @checks(draws=optional(DRAWS), seed=SEED, progress=optional(flag))
    def linear_response(
        self, draws: int | None = None, seed: int = 0, progress: bool | None = None
    ) -> Self:
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
        return self._of(self.model, approximation, record, FullRank())

    @checks(draws=optional(DRAWS), seed=SEED, progress=optional(flag))
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

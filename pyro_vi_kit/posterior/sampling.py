"""Draws of a posterior, plain and corrected, and of data under it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError
from pyro_vi_kit.core.options import DRAWS, SEED, checks, flag, optional
from pyro_vi_kit.core.runtime import fresh_seed
from pyro_vi_kit.posterior.approximation.base import chosen_of, pool_of
from pyro_vi_kit.posterior.base import Fitted


class Drawn(Fitted):
    """The part of a posterior that draws."""

    @checks(draws=DRAWS, seed=optional(SEED))
    def sample(self, draws: int = 1000, seed: int | None = None) -> dict[str, np.ndarray]:
        """Draws from q, `{site: [draws, *site shape]}`, deterministic and discrete sites too.

        Discrete sites are drawn exactly given the continuous ones and the data, as integers.

        Args:
            draws: How many.
            seed: The same seed gives the same draws.
        """
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            return self._named(self.approximation.draw(draws, seed))

    @checks(draws=DRAWS, seed=optional(SEED))
    def resample(self, draws: int = 1000, seed: int | None = None) -> dict[str, np.ndarray]:
        """Draws corrected by Pareto-smoothed importance resampling, as `sample` gives them.

        Chosen from at least ten times as many draws of q.

        Raises:
            OptionError: For a point estimate, or where no draw has a positive density.
        """
        self._require_spread()
        seed = fresh_seed() if seed is None else seed
        with self._few_threads():
            values, weighed = self.approximation.draw_and_weigh(pool_of(draws), seed)
        chosen = chosen_of(weighed, draws, seed)
        return {name: value[chosen] for name, value in self._named(values).items()}

    @checks(draws=DRAWS, seed=optional(SEED))
    def log_weights(self, draws: int = 1000, seed: int | None = None) -> np.ndarray:
        """Log p(x, z) - log q(z) in nats, `[draws]`, at what `sample` draws with that seed.

        Raises:
            OptionError: For a point estimate, which has no density.
        """
        self._require_spread()
        with self._few_threads():
            weighed = self.approximation.weigh(draws, fresh_seed() if seed is None else seed)
        return weighed.log_weights

    @checks(draws=DRAWS, seed=optional(SEED), corrected=flag)
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

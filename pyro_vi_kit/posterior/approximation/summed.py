"""A Pyro guide of the user's that leaves discrete latents to the model, which sums them out.

Pyro trains it with `TraceEnum_ELBO`. Its draws are weighed by the marginal density of what it has, which
is what was trained, and the discrete latents are drawn exactly given the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.core.stopping import model_errors
from pyro_vi_kit.guides.user_guides import stacked
from pyro_vi_kit.model.groups import (
    GIVEN_DRAWS,
    in_chunks,
    log_likelihood,
    model_groups,
    shares_outside,
    width_of,
)
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation.protocol import (
    PRIOR_DRAWS,
    Weighed,
    chosen_of,
    pool_of,
    told,
)
from pyro_vi_kit.posterior.approximation.trained import TrainedGuide


class SummedApproximation:
    """A Pyro guide weighed by a Density in which the discrete latents that it lacks are summed out.

    Args:
        trained: The guide, and what it was trained in.
        density: The model's Density, with the discrete latents that the guide has among its latents.
    """

    def __init__(self, trained: TrainedGuide, density: Density) -> None:
        self.trained = trained
        self.density = density
        self.guide = trained.guide
        self.state = trained.state
        self.dtype = trained.dtype
        self.device = trained.device
        self.name = trained.name
        self.point = trained.point
        self.points = trained.sites.points
        self.given_up = density.given_up
        self._params = {name: density.cast(v.detach()) for name, v in trained.params.items()}
        self._width = width_of(density)
        # A trace of the guide takes about a millisecond whatever its size.
        self.cost = max(self._width, 100_000)

    @model_errors
    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        values, z, _ = self._drawn(draws, seed)
        return self._constrained(values, z, seed)

    @model_errors
    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        _, z, log_q = self._drawn(draws, seed)
        return Weighed(self._log_p(z), log_q)

    @model_errors
    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        values, z, log_q = self._drawn(draws, seed)
        return self._constrained(values, z, seed), Weighed(self._log_p(z), log_q)

    @model_errors
    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """See `Approximation.outside`."""
        _, z, _ = self._drawn(draws, seed)
        with RandomStream(seed, "draws"):
            return shares_outside(self.density, z, self._params)

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """See `Approximation.predict`."""
        _, z, log_q = self._drawn(pool_of(draws) if corrected else draws, seed)
        if corrected:
            weighed = Weighed(self._log_p(z), log_q)
            chosen = torch.as_tensor(chosen_of(weighed, draws, seed), device=self.device)
            z = {name: value[chosen] for name, value in z.items()}
        with RandomStream(seed, GIVEN_DRAWS):
            values = in_chunks(
                lambda part: self.density.simulate(part, model, self._params), z, self._width
            )
        latent = {site.name for site in (*self.density.latents, *self.density.discrete)}
        return {name: value for name, value in values.items() if name not in latent}

    @model_errors
    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """See `Approximation.log_likelihood`."""
        _, z, log_q = self._drawn(draws, seed)
        found = log_likelihood(self.density, z, params=self._params, seed=seed)
        return found, Weighed(self._log_p(z), log_q)

    @torch.no_grad()
    def row_terms(self, draws: int, seed: int, plate: str) -> tuple[Tensor, Weighed]:
        """All that the log joint has for each row of a plate, `[S, N]`, and the draws' log densities."""
        _, z, log_q = self._drawn(draws, seed)

        def rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {plate: self.density.terms(part, self._params, jacobian=False).local[plate]}

        return told(in_chunks(rows, z, self._width)[plate]), Weighed(self._log_p(z), log_q)

    @model_errors
    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        _, z, _ = self._drawn(draws, seed)
        prior_draws = min(PRIOR_DRAWS, draws)
        return model_groups(
            self.density, z, params=self._params, seed=seed, prior_draws=prior_draws
        )

    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""
        return self.trained.parameters()

    def _drawn(self, draws: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Values of the guide's latents by site, the same unconstrained, and log q `[S]`."""
        with self.trained.running(seed):
            traces = [self.trained.guide_trace() for _ in range(draws)]
            log_q = torch.stack([torch.as_tensor(trace.log_prob_sum()) for trace in traces])
        sites = [site.name for site in self.density.latents]
        values = stacked(traces, sites)
        for site in self.density.latents:
            # Without the ones that broadcasting puts in front.
            values[site.name] = values[site.name].reshape(
                draws, *site.batch_shape, *site.event_shape
            )
        z = self.density.block.unpack(self.density.unconstrained(values))
        return values, dict(z), told(log_q)

    @torch.no_grad()
    def _log_p(self, z: Mapping[str, Tensor]) -> Tensor:
        """The marginal log density of the guide's latents as the model has them, `[S]`."""
        density = self.density.strict()

        def total(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"": density.terms(part, self._params, jacobian=False).total()}

        return told(in_chunks(total, z, self._width)[""])

    def _constrained(
        self, values: Mapping[str, Tensor], z: Mapping[str, Tensor], seed: int
    ) -> dict[str, Tensor]:
        """All latent, discrete and deterministic sites; those of the guide just as it drew them."""
        with RandomStream(seed, GIVEN_DRAWS):
            found = in_chunks(
                lambda part: self.density.constrain(part, self._params), z, self._width
            )
        return found | {name: value for name, value in values.items() if name in found}

"""A Pyro guide of the user's that leaves discrete latents to the model, which sums them out.

Pyro trains it with `TraceEnum_ELBO`. Its draws are weighed by the marginal density of what it has, which
is what was trained, and the discrete latents are drawn exactly given the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import OptionError, ViError
from pyro_vi_kit.core.stopping import model_errors
from pyro_vi_kit.guides.user_guides import GuideSites, named, stacked
from pyro_vi_kit.model.groups import in_chunks
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation.base import OverDensity, Weighed, on_cpu
from pyro_vi_kit.posterior.approximation.of_traces import TraceApproximation, TrainedGuide


class SummedApproximation(OverDensity):
    """A Pyro guide weighed by a Density in which the discrete latents that it lacks are summed out.

    Args:
        trained: The guide, and what it was trained in.
        density: The model's Density, with the discrete latents that the guide has among its latents.
    """

    def __init__(self, trained: TrainedGuide, density: Density) -> None:
        params = {name: density.cast(v.detach()) for name, v in trained.params.items()}
        super().__init__(trained.name, trained.point, density, params)
        self.trained = trained
        self.guide = trained.guide
        self.state = trained.state
        self.dtype = trained.dtype
        self.device = trained.device
        self.points = trained.sites.points
        # A trace of the guide takes about a millisecond whatever its size.
        self.cost = max(self._width, 100_000)

    @model_errors
    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`; those of the guide just as it drew them."""
        values, z, _ = self._drawn(draws, seed)
        return self._as_drawn(values, z, seed)

    @model_errors
    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        values, z, log_q = self._drawn(draws, seed)
        return self._as_drawn(values, z, seed), Weighed(self._log_p(z), log_q)

    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `OverDensity.unconstrained`."""
        return self._drawn(draws, seed)[1]

    def weighed(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `OverDensity.weighed`."""
        _, z, log_q = self._drawn(draws, seed)
        return z, Weighed(self._log_p(z), log_q)

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
        return values, dict(z), on_cpu(log_q)

    @torch.no_grad()
    def _log_p(self, z: Mapping[str, Tensor]) -> Tensor:
        """The marginal log density of the guide's latents as the model has them, `[S]`."""
        density = self.density.strict()

        def total(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"": density.terms(part, self.params, jacobian=False).total()}

        return on_cpu(in_chunks(total, z, self._width)[""])

    def _as_drawn(
        self, values: Mapping[str, Tensor], z: Mapping[str, Tensor], seed: int
    ) -> dict[str, Tensor]:
        """All latent, discrete and deterministic sites; those of the guide just as it drew them."""
        found = self.constrained(z, seed)
        return found | {name: value for name, value in values.items() if name in found}


def marginal_of(
    model: Model, sites: GuideSites, density: Density | None, device: Device
) -> Density | None:
    """The Density in which the discrete latents that a guide lacks are summed out; None where none are.

    Args:
        model: The model.
        sites: What the guide does about its latents.
        density: Its Density with all discrete latents summed out, where it has one.
        device: Where everything is.

    Raises:
        OptionError: If they cannot be summed out, and the guide is more than a point estimate.
    """
    if not sites.summed:
        return None
    if density is not None and not sites.held:
        return density
    drawn = Drawn(dict.fromkeys(sites.held, False)) if sites.held else None
    try:
        if density is None:
            return Density(model, device=device, drawn=drawn)
        return Density(model, dtype=density.dtype, device=device, drawn=drawn)
    except ViError as error:
        if sites.latents == len(sites.points) + len(sites.summed):
            return None
        raise OptionError(
            f"the guide lacks the discrete latent(s) {named(sites.summed)}, and they cannot be summed "
            f"out of the model ({error}): give the guide a pyro.sample for each of them"
        ) from error


def approximation_of(
    trained: TrainedGuide, marginal: Density | None
) -> TraceApproximation | SummedApproximation:
    """A trained guide, to draw from and to weigh.

    Args:
        trained: The guide, and what it was trained in.
        marginal: What `marginal_of` gave.
    """
    if marginal is None:
        return TraceApproximation(trained)
    return SummedApproximation(trained, marginal)

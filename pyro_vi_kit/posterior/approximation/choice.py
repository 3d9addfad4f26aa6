"""Which approximation a Pyro guide of the user's is: by traces, or with discrete latents summed out."""

from __future__ import annotations

from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import OptionError, ViError
from pyro_vi_kit.guides.user_guides import GuideSites, named
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation.of_traces import TraceApproximation
from pyro_vi_kit.posterior.approximation.summed import SummedApproximation
from pyro_vi_kit.posterior.approximation.trained import TrainedGuide


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

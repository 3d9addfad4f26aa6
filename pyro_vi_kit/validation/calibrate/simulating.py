"""Data sets drawn from a model, with the values of its latents that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import Visit
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.validation.calibrate.observing import Observing

Values = Mapping[str, Tensor]

_CHUNK_NUMBERS = 4_000_000


@dataclass(frozen=True, eq=False)
class Simulations:
    """N draws of the latents from the prior, each with data drawn given them.

    Attributes:
        truths: Latent, discrete and deterministic sites, `{site: [N, *batch, *event]}`.
        data: Observed sites, likewise.
    """

    truths: Values
    data: Values

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def rows(self, numbers: list[int]) -> Simulations:
        """Some of them, copied."""
        parts = (self.truths, self.data)
        return Simulations(*({n: v[numbers] for n, v in part.items()} for part in parts))


def simulate(density: Density, count: int, seed: int) -> Simulations:
    """Draw latents from the prior, and all observed sites given them.

    Args:
        density: The model, one that `require_generative` lets pass.
        count: N.
        seed: The same seed gives the same draws.

    Raises:
        ModelError: If a site cannot be sampled.
    """
    width = sum(v.numel() for v in density.observed.values()) + density.dim
    chunk = max(1, min(count, _CHUNK_NUMBERS // max(width, 1)))
    with RandomStream(seed, "simulated data"):
        parts = [
            density.simulate(None, draws=min(chunk, count - start))
            for start in range(0, count, chunk)
        ]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    data = {name: values.pop(name) for name in density.observed}
    return Simulations(values, data)


def require_generative(model: Model, density: Density) -> Observing:
    """Refuse what is no recipe for data: improper priors, factors, learned parameters, and so on.

    Args:
        model: The model.
        density: Its density.

    Returns:
        What puts simulated data into it.

    Raises:
        ModelError: Naming the site and the remedy.
    """
    if density.streamed is not None:
        raise ModelError(
            f"{model.name!r} streams its data, and calibration simulates them as a whole: give it a "
            "part of them in memory, vi.Model(fn, x, y)"
        )
    if density.params:
        raise ModelError(
            f"parameter {next(iter(density.params))!r} is learned and has no prior to draw it from: "
            "make it a latent with pyro.sample, or a fixed number"
        )
    improper = next((site.name for site in density.latents if site.improper), None)
    if improper is not None:
        raise ModelError(
            f"the prior of latent {improper!r} is improper and cannot be drawn from: give it a proper "
            "one, wide if you like, such as dist.Normal(0, 10)"
        )
    factor = next((site.name for site in density.structure.of_kind("factor")), None)
    if factor is not None:
        raise ModelError(
            f"factor {factor!r} changes the density but draws nothing, so that data cannot be "
            "simulated: write it as pyro.sample(..., dist, obs=data)"
        )
    if not density.observed:
        raise ModelError(
            f"{model.name!r} has no observed site, so that there are no data to simulate: write them as "
            "pyro.sample(..., dist, obs=data)"
        )
    visits, _ = density.visits(density.somewhere())
    for visit in visits.values():
        _require_plain(visit, visits)
    return Observing(density)


def _require_plain(visit: Visit, visits: Mapping[str, Visit]) -> None:
    """Refuse a site whose density is not that of what is drawn there."""
    if visit.kind == "deterministic":
        if visit.counts and visit.unscaled().any():
            raise ModelError(
                f"site {visit.name!r} is a Delta with a log_density, which no draw of the model shows: "
                "calibrate the model without it"
            )
        return
    if not isinstance(visit.scale, int | float) or visit.scale != 1:
        raise ModelError(
            f"the density of site {visit.name!r} is scaled (poutine.scale), so that it is not that of "
            "what is drawn there: calibrate the model without the scale"
        )
    stem = visit.name.removesuffix("_unobserved")
    if stem != visit.name and f"{stem}_observed" in visits:
        raise ModelError(
            f"site {stem!r} is observed in part (obs_mask=), and its latents have no prior of their own "
            "in the rows that are: calibrate the model on the rows that are complete, without obs_mask="
        )
    masked = visit.mask is False or isinstance(visit.mask, Tensor)
    if visit.kind != "observed" and masked:
        raise ModelError(
            f"latent {visit.name!r} is masked, so that its density is not that of what is drawn there: "
            "calibrate the model without the mask"
        )

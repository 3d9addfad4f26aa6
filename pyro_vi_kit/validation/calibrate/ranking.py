"""The place of the truth among draws: ranks by site, of the log likelihood, and distances for TARP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.groups import GIVEN_DRAWS, squeeze
from pyro_vi_kit.model.log_density import Density

Values = Mapping[str, Tensor]

# Joint quantities, beside the sites.
LOG_LIKELIHOOD = "log_likelihood"
TARP = "all latents"


@dataclass(frozen=True, eq=False)
class Place:
    """How many of S draws lie below the truth, and how many are equal to it.

    Attributes:
        below: By site, `[*shape]`.
        equal: Likewise.
    """

    below: dict[str, np.ndarray]
    equal: dict[str, np.ndarray]

    def add(self, name: str, truth: np.ndarray, draws: np.ndarray) -> None:
        """Count the draws `[S, *shape]` of a site on either side of its truth `[*shape]`."""
        self.below[name] = (draws < truth).sum(0)
        self.equal[name] = (draws == truth).sum(0)


def place_of(density: Density, truths: Values, draws: Values, sites: list[str]) -> Place:
    """The place of each site's truth.

    Args:
        density: The model.
        truths: `{site: [*batch, *event]}`.
        draws: `{site: [S, *batch, *event]}`.
        sites: Which to rank.
    """
    place = Place({}, {})
    for name in sites:
        site = density.structure.sites[name]
        place.add(name, squeeze(site, truths[name][None])[0], squeeze(site, draws[name]))
    return place


def joined_points(density: Density, truths: Values, draws: Values) -> Tensor:
    """Truth and draws in unconstrained space, `[1 + S, D]`, the truth first."""
    names = [site.name for site in density.latents]
    joined = {name: torch.cat([truths[name][None].to(draws[name]), draws[name]]) for name in names}
    return density.unconstrained(joined)


def log_likelihood(density: Density, z: Tensor, seed: int) -> np.ndarray:
    """Log density of all observations at these points `[K, D]`, `[K]`, nats.

    As a function of data and latents together it sees what no function of latents alone can (Modrák et
    al. 2023): a guide that is the prior, whatever the data, has uniform ranks in each latent.
    """
    with RandomStream(seed, GIVEN_DRAWS):  # for discrete sites
        parts = density.log_likelihood(z)
    total = torch.stack([value.reshape(len(z), -1).sum(-1) for value in parts.values()]).sum(0)
    return torch.nan_to_num(total, nan=-torch.inf).cpu().numpy()


def distances(z: Tensor, reference: Tensor, scale: Tensor) -> np.ndarray:
    """Distance of points `[K, D]` to a reference point `[D]`, in units of ``scale`` `[D]`, `[K]`.

    Lemos et al. (2023), "Sampling-based accuracy testing of posterior estimators": the share of draws
    that are nearer to a point than the truth is, is uniform for any such point, chosen without looking
    at the truth, if and only if the draws are of the posterior. Here it is another simulation's truth.
    """
    return torch.nan_to_num((z - reference) / scale, nan=torch.inf).norm(dim=-1).cpu().numpy()

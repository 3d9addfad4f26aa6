"""A trained guide as something to draw from and to weigh."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.psis import psis, resample, usable
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.model.model import Model

# Draws in the prior groups of an export, and no more than of the posterior.
PRIOR_DRAWS = 500


class Weighed(NamedTuple):
    """log p(x, z) and log q(z) at draws from q, each `[S]`, float64, on the CPU, in nats."""

    log_p: Tensor
    log_q: Tensor

    @property
    def log_weights(self) -> np.ndarray:
        """Log p(x, z) - log q(z), `[S]`, nats."""
        return (self.log_p - self.log_q).numpy()


class Approximation(Protocol):
    """A trained guide.

    Attributes:
        name: The guide's name.
        point: Whether it is a point estimate in any latent, and so has no density.
        points: Those latents, where it is one in some of them only.
        dtype: Its precision.
        cost: Numbers that one draw makes in the model, roughly.
        given_up: What was tried and given up in running model and guide, and why, one line each.
    """

    name: str
    point: bool
    points: tuple[str, ...]
    dtype: torch.dtype
    cost: int
    given_up: list[str]

    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Draws from q of every latent and deterministic site, `{site: [S, *batch, *event]}`.

        Discrete sites are drawn given the continuous ones and the data.
        """
        ...

    def weigh(self, draws: int, seed: int) -> Weighed:
        """The log densities of what `draw` gives with that seed."""
        ...

    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """What `draw` and `weigh` give with that seed, drawn once."""
        ...

    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """Which share of draws leaves the domain of a distribution, by site and what does, in words."""
        ...

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """Observed and deterministic sites drawn anew, on a model's own or other arguments.

        ``corrected`` starts from draws chosen by Pareto-smoothed importance resampling.
        """
        ...

    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """The log density of each observation at draws from q, and the draws' log densities."""
        ...

    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """The groups of an ArviZ object that follow from draws, data and the model."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Learned parameters of the model, constrained, by name."""
        ...


def pool_of(draws: int) -> int:
    """From how many draws of q so many are chosen by their weights."""
    return max(4000, 10 * draws)


def chosen_of(weighed: Weighed, draws: int, seed: int) -> np.ndarray:
    """Indices `[draws]` of draws chosen by Pareto-smoothed importance resampling."""
    smoothed = psis(usable(weighed.log_weights))
    rng = np.random.default_rng(seed_of(seed, "resampling"))
    return resample(smoothed.log_weights, draws, rng)


def told(log_density: Tensor) -> Tensor:
    """A log density as it is handed out: detached, float64, on the CPU."""
    return log_density.detach().double().cpu()

"""A trained guide as something to draw from and to weigh, and what those over a Density share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.psis import psis, resample, usable
from pyro_vi_kit.core.runtime import RandomStream, require_memory, seed_of
from pyro_vi_kit.core.stopping import model_errors
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
        density: The Density of its latents; None where there is none.
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

    @property
    def density(self) -> Density | None:
        """See the attributes."""
        ...

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


def on_cpu(log_density: Tensor) -> Tensor:
    """A log density as it is handed out: detached, float64, on the CPU."""
    return log_density.detach().double().cpu()


class OverDensity(ABC):
    """What approximations share whose draws are points of a Density.

    Args:
        name: The guide's name.
        point: Whether it is a point estimate in any latent.
        density: The Density that has all latents of the guide, in their order.
        params: Unconstrained learned parameters of the model.
    """

    def __init__(
        self, name: str, point: bool, density: Density, params: Mapping[str, Tensor]
    ) -> None:
        self.name = name
        self.point = point
        self.points: tuple[str, ...] = ()
        self.density = density
        self.dtype = density.dtype
        self.params = dict(params)
        self.given_up = density.given_up
        self._width = width_of(density)
        self.cost = self._width

    @abstractmethod
    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Unconstrained draws by site, `[S, ...]`."""

    @abstractmethod
    def weighed(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """What `unconstrained` gives, and its log densities."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""

    @model_errors
    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        return self.constrained(self.unconstrained(draws, seed), seed)

    @model_errors
    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        return self.weighed(draws, seed)[1]

    @model_errors
    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        z, weighed = self.weighed(draws, seed)
        return self.constrained(z, seed), weighed

    @model_errors
    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """See `Approximation.outside`."""
        if self.density.streamed is not None:
            return {}  # no batch of the data speaks for all
        z = self.unconstrained(draws, seed)
        with RandomStream(seed, "draws"):
            return shares_outside(self.density, z, self.params)

    def constrained(self, z: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Latent, discrete and deterministic sites at unconstrained values `[S, ...]`."""
        # Discrete sites are drawn given z, as `groups` draws them.
        with RandomStream(seed, GIVEN_DRAWS):
            return in_chunks(lambda part: self.density.constrain(part, self.params), z, self._width)

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """See `Approximation.predict`."""
        made = sum(value.numel() for value in self.density.observed.values())
        require_memory(draws * made, "ask for fewer draws=")
        if corrected:
            pool, weighed = self.weighed(pool_of(draws), seed)
            chosen = torch.as_tensor(chosen_of(weighed, draws, seed), device=self.density.device)
            z = {name: value[chosen] for name, value in pool.items()}
        else:
            z = self.unconstrained(draws, seed)
        with RandomStream(seed, GIVEN_DRAWS):
            values = in_chunks(
                lambda part: self.density.simulate(part, model, self.params), z, self._width
            )
        latent = {site.name for site in (*self.density.latents, *self.density.discrete)}
        return {name: value for name, value in values.items() if name not in latent}

    @model_errors
    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """See `Approximation.log_likelihood`."""
        z, weighed = self.weighed(draws, seed)
        return log_likelihood(self.density, z, params=self.params, seed=seed), weighed

    @torch.no_grad()
    def row_terms(self, draws: int, seed: int, plate: str) -> tuple[Tensor, Weighed]:
        """All that the log joint has for each row of a plate, `[S, N]`, and the draws' log densities.

        Rows have no latents of their own.
        """
        z, weighed = self.weighed(draws, seed)

        def rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {plate: self.density.terms(part, self.params).local[plate]}

        return on_cpu(in_chunks(rows, z, self._width)[plate]), weighed

    @model_errors
    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        z, prior = self.unconstrained(draws, seed), min(PRIOR_DRAWS, draws)
        return model_groups(self.density, z, params=self.params, seed=seed, prior_draws=prior)

"""A guide of this package, over a Density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.runtime import RandomStream, isolated, require_memory
from pyro_vi_kit.core.stopping import model_errors
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.local.streamed import joined_draws, weigh_all
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

_CHUNK_NUMBERS = 4_000_000


class GuideApproximation:
    """A guide of this package.

    Args:
        name: Its registry name.
        guide: It, trained.
        params: Unconstrained learned parameters of the model.
    """

    def __init__(self, name: str, guide: Guide, params: Mapping[str, Tensor]) -> None:
        self.name = name
        self.guide = guide
        self.point = guide.point
        self.points: tuple[str, ...] = ()
        self.density: Density = guide.density
        self.dtype = guide.density.dtype
        self.given_up = guide.density.given_up
        self.params = {k: self.density.cast(v.detach()).clone() for k, v in params.items()}
        _on_their_own(guide)
        self._width = width_of(self.density)
        # A run of the model for each draw takes about a millisecond whatever its size.
        self.cost = max(self._width, 100_000 if self.density.batching == "loop" else 0)
        if self.density.streamed is not None and self.density.model.stream is not None:
            self.cost = self.density.streamed.rows * self.density.model.stream.numbers

    @model_errors
    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        return self.constrained(self.unconstrained(draws, seed), seed)

    @torch.no_grad()
    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Unconstrained draws by site, `[S, ...]`."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            return _joined([self.guide.draw(size).z for size in self._sizes(draws)])

    @model_errors
    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        return self._weighed(draws, seed)[1]

    @model_errors
    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        z, weighed = self._weighed(draws, seed)
        return self.constrained(z, seed), weighed

    @torch.no_grad()
    def _weighed(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """Unconstrained draws by site, as `unconstrained` gives them, and their log densities."""
        if self.density.streamed is not None:
            return self._weighed_on_stream(draws, seed)
        parts, log_p, log_q = [], [], []
        density = self.density.strict()
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            for size in self._sizes(draws):
                draw = self.guide.draw(size)
                terms = density.terms(draw.z, self.params, jacobian=not self.guide.point)
                parts.append(draw.z)
                log_p.append(terms.total())
                log_q.append(draw.shared + sum(rows.sum(-1) for rows in draw.local.values()))
        return _joined(parts), Weighed(told(torch.cat(log_p)), told(torch.cat(log_q)))

    def _weighed_on_stream(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """The same, in one pass over all batches for all draws."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            draw = joined_draws([self.guide.draw(size) for size in self._sizes(draws)])
            log_p, log_q = weigh_all(self.guide, draw, self.params, self.density.batches())
        return draw.z, Weighed(told(log_p), told(log_q))

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
            pool, weighed = self._weighed(pool_of(draws), seed)
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
        z, weighed = self._weighed(draws, seed)
        found = log_likelihood(self.density, z, params=self.params, seed=seed)
        return found, weighed

    @torch.no_grad()
    def row_terms(self, draws: int, seed: int, plate: str) -> tuple[Tensor, Weighed]:
        """All that the log joint has for each row of a plate, `[S, N]`, and the draws' log densities."""
        z, weighed = self._weighed(draws, seed)

        def rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {plate: self.density.terms(part, self.params).local[plate]}

        return told(in_chunks(rows, z, self._width)[plate]), weighed

    @model_errors
    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        z = self.unconstrained(draws, seed)
        return model_groups(
            self.density, z, params=self.params, seed=seed, prior_draws=min(PRIOR_DRAWS, draws)
        )

    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""
        known = self.density.structure.parameters
        return {
            name: torch.distributions.transform_to(known[name].constraint)(value)
            for name, value in self.params.items()
        }

    def moved_to(self, model: Model) -> GuideApproximation:
        """The same trained guide on other data of the same model."""
        own = self.density
        density = Density(
            model,
            dtype=own.dtype,
            device=own.device,
            drawn=own.drawn,
            init=own.initial(own.structure.plates),
        )
        return GuideApproximation(self.name, self.guide.moved_to(density), self.params)

    def _sizes(self, draws: int) -> list[int]:
        require_memory(draws * self.density.dim, "ask for fewer draws=")
        chunk = max(1, _CHUNK_NUMBERS // max(self._width, 1))
        return [min(chunk, draws - i) for i in range(0, draws, chunk)]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _on_their_own(guide: Guide) -> None:
    """Give parameters that are views of one vector, as training has them, memory of their own.

    Sums round by how memory is aligned: a guide that is read from a file would else differ in the last
    bit from the one that was saved.
    """
    for parameter in guide.parameters():
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()

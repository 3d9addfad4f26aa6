"""A guide of this package, over a Density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vi_kit.core.runtime import RandomStream, isolated, require_memory
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.local.streamed import joined_draws, weigh_all
from pyro_vi_kit.model.groups import chunks_of
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation.base import OverDensity, Weighed, on_cpu


class GuideApproximation(OverDensity):
    """A guide of this package.

    Args:
        name: Its registry name.
        guide: It, trained.
        params: Unconstrained learned parameters of the model.
    """

    def __init__(self, name: str, guide: Guide, params: Mapping[str, Tensor]) -> None:
        density = guide.density
        own = {name: density.cast(value.detach()).clone() for name, value in params.items()}
        super().__init__(name, guide.point, density, own)
        self.guide = guide
        _on_their_own(guide)
        # A run of the model for each draw takes about a millisecond whatever its size.
        self.cost = max(self._width, 100_000 if density.batching == "loop" else 0)
        if density.streamed is not None and density.model.stream is not None:
            self.cost = density.streamed.rows * density.model.stream.numbers

    @torch.no_grad()
    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `OverDensity.unconstrained`."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            return _joined([self.guide.draw(size).z for size in self._sizes(draws)])

    @torch.no_grad()
    def weighed(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `OverDensity.weighed`."""
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
        return _joined(parts), Weighed(on_cpu(torch.cat(log_p)), on_cpu(torch.cat(log_q)))

    def _weighed_on_stream(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """The same, in one pass over all batches for all draws."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            draw = joined_draws([self.guide.draw(size) for size in self._sizes(draws)])
            log_p, log_q = weigh_all(self.guide, draw, self.params, self.density.batches())
        return draw.z, Weighed(on_cpu(log_p), on_cpu(log_q))

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
        return chunks_of(draws, self._width)


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

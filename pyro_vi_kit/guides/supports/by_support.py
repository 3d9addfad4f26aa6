"""Which family fits a site's support, and the distribution over a vector that is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
)

from pyro_vi_kit.guides.supports.site_parts import Normals, Part
from pyro_vi_kit.model.log_density import Block, Site
from pyro_vi_kit.model.log_density.supports import Turn

Kind = Literal["normal", "gamma", "beta", "dirichlet", "von_mises"]


def kind_of(site: Site) -> Kind | None:
    """The family for a site's support; None where it has none, and keeps a normal.

    A half-line has a Gamma and an interval a Beta, moved and scaled as the support is.
    """
    if site.transform is None:
        return None
    steps = _steps(site.transform)
    if steps == [Turn]:
        return "von_mises"
    known: dict[Any, Kind] = {
        ExpTransform: "gamma",
        SigmoidTransform: "beta",
        StickBreakingTransform: "dirichlet",
    }
    if len(steps) == 1:
        return known.get(steps[0])
    return "normal" if not steps else None


def _steps(transform: Any) -> list[type]:
    """What a transform does beside shifts and scales, first things first."""
    if isinstance(transform, IndependentTransform):
        return _steps(transform.base_transform)
    if isinstance(transform, ComposeTransform) and not isinstance(transform, Turn):
        return [step for part in transform.parts for step in _steps(part)]
    return [] if isinstance(transform, AffineTransform) else [type(transform)]


@dataclass(frozen=True)
class Place:
    """Where a site's numbers lie in the family.

    Attributes:
        site: The site.
        kind: Its family.
        kept: Whether it is a normal because no family fits its support.
        columns: Unconstrained numbers, in the flat vector.
        spreads: Numbers of the spread: one for each column, or for each simplex.
    """

    site: Site
    kind: Kind
    kept: bool
    columns: slice
    spreads: slice

    @property
    def width(self) -> int:
        """Columns that share a spread."""
        return self.site.unconstrained_shape[-1] if self.kind == "dirichlet" else 1


def places_of(block: Block) -> tuple[Place, ...]:
    """The place of each site of a block for all data."""
    places: list[Place] = []
    column = spread = 0
    for site in block.sites:
        kind = kind_of(site)
        size = math.prod(site.unconstrained_shape)
        width = site.unconstrained_shape[-1] if kind == "dirichlet" else 1
        columns = slice(column, column + size)
        spreads = slice(spread, spread + size // max(width, 1))
        places.append(Place(site, kind or "normal", kind is None, columns, spreads))
        column, spread = columns.stop, spreads.stop
    return tuple(places)


class BySupport(TorchDistribution):
    """Parts that each hold some numbers of a vector.

    Args:
        parts: Each with its columns.
        columns: `[n]` for each part; together every number once.
        batch_shape: Of equal copies.
    """

    arg_constraints: ClassVar[Any] = {}
    support: ClassVar[Any] = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        parts: Sequence[Part],
        columns: Sequence[Tensor],
        batch_shape: torch.Size = torch.Size(),  # noqa: B008 - it cannot be changed
        validate_args: bool | None = None,
    ) -> None:
        self.parts, self.columns = parts, columns
        dim = sum(len(held) for held in columns)
        super().__init__(batch_shape, torch.Size([dim]), validate_args=validate_args)

    @property
    def symmetric(self) -> bool:
        """Whether it is its own mirror image about the mean."""
        return all(isinstance(part, Normals) for part in self.parts)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BySupport:
        """The same distribution for each of a batch."""
        return BySupport(self.parts, self.columns, torch.Size(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`."""
        sizes = [part.noise for part in self.parts]
        like = self.parts[0].like
        # All noise of a draw comes together, so that K draws at once are K single ones.
        shape = (*sample_shape, *self.batch_shape, sum(sizes))
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        drawn = [p.draw(n) for p, n in zip(self.parts, noise.split(sizes, -1), strict=True)]
        return self._in_order(drawn)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `[..., D]`, nats."""
        total = value.new_zeros(())
        for part, held in zip(self.parts, self.columns, strict=True):
            total = total + part.log_prob(value.index_select(-1, held))
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """`[*batch, D]`.

        Raises:
            NotImplementedError: If there are angles.
        """
        mean = self._in_order([part.mean for part in self.parts])
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """`[*batch, D]`.

        Raises:
            NotImplementedError: If there are angles.
        """
        variance = self._in_order([part.variance for part in self.parts])
        return variance.expand(self.batch_shape + self.event_shape)

    def _in_order(self, values: Sequence[Tensor]) -> Tensor:
        order = torch.cat(list(self.columns)).argsort()
        return torch.cat(list(values), -1).index_select(-1, order)

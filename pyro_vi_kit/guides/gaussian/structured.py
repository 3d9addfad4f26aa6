"""Gaussians over blocks of sites that the user names (Saul & Jordan 1996; Tan & Nott 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import require_one_of
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.guides.spec import GuideSpec, require_dense
from pyro_vi_kit.model.log_density import Density

Between = Literal["independent", "first", "linear"]


@dataclass(frozen=True)
class Structured(GuideSpec):
    """Gaussians of blocks of sites: full-rank inside a block, independent or linear between them.

    Args:
        blocks: Groups of site names. Sites that are not named have a block of their own each, after
            these; without blocks every site has one.
        between: What links the blocks: ``independent``; ``first``, the mean of every other block moves
            linearly with the first one (a hierarchy: name the globals first); ``linear``, it moves
            with all earlier ones. The last is a full-rank Gaussian, whatever the blocks.
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        OptionError: If a block is no group of names, a site is named twice, or another option is wrong.
    """

    name = "structured"
    about = About(
        does="a Gaussian whose named blocks are full-rank, with no or linear links between them",
        cost="D^2",
        use="where it is known which latents hang together, and all of D would be too much",
        paper="Saul & Jordan 1996; Tan & Nott 2018",
    )
    methods = ("lbfgs", "stochastic")
    richer = "full_rank"

    blocks: Sequence[Sequence[str]] = ()
    between: Between = "independent"
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.name, "between", self.between, get_args(Between))
        object.__setattr__(self, "blocks", _require_blocks(self.name, self.blocks))
        named = [site for block in self.blocks for site in block]
        doubled = sorted({site for site in named if named.count(site) > 1})
        if doubled:
            raise OptionError(f"{self.name}: blocks name site {doubled[0]!r} twice: name it once")

    def build(self, density: Density) -> Guide:
        """The guide for this model, centred on the origin of unconstrained space.

        Raises:
            OptionError: If a block names a site that is no latent of the model, or the model has too
                many latents for a dense factor.
        """
        require_dense(self.name, density.dim)
        places = _places(density)
        unknown = [site for block in self.blocks for site in block if site not in places]
        if unknown:
            raise OptionError(
                f"{self.name}: blocks name {unknown[0]!r}, which is no latent of this model; it has "
                f"{', '.join(places)}"
            )
        named = {site for block in self.blocks for site in block}
        blocks = [*self.blocks, *((site,) for site in places if site not in named)]
        orders = [[i for site in block for i in places[site]] for block in blocks]
        layout = Layout.of(orders, self.between)
        return self.of_families(density, {density.block: BlockNormal(layout, self.init_scale)})


def _require_blocks(name: str, blocks: object) -> tuple[tuple[str, ...], ...]:
    """Groups of names as tuples."""
    example = 'blocks=[("mu", "tau"), ("theta",)]'
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise OptionError(
            f"{name}: blocks must be groups of site names, {example}, got {told(blocks)}"
        )
    for block in blocks:
        words = isinstance(block, Sequence) and not isinstance(block, str)
        if not words or not block or not all(isinstance(site, str) for site in block):
            raise OptionError(
                f"{name}: each block must be a group of site names, {example}, got {told(block)}"
            )
    return tuple(tuple(block) for block in blocks)


def _places(density: Density) -> dict[str, list[int]]:
    """Where each latent's numbers lie in the flat vector."""
    places: dict[str, list[int]] = {}
    for i, (site, _) in enumerate(density.block.labels()):
        places.setdefault(site, []).append(i)
    return places


@dataclass(frozen=True)
class Layout:
    """Which numbers of a factor are free, in the order of the blocks.

    These factors are closed under products and inverses, so that one of them can be the unit in which
    another is measured.

    Attributes:
        order: Of the D numbers, block by block, `[D]`.
        sizes: Numbers in each block.
        root: How many of the first numbers all later ones may depend on.
    """

    order: Tensor
    sizes: tuple[int, ...]
    root: int

    @classmethod
    def of(cls, orders: Sequence[Sequence[int]], between: Between) -> Layout:
        """The layout of blocks, each given by its places in the flat vector."""
        sizes = tuple(len(order) for order in orders)
        root = {"independent": 0, "first": sizes[0], "linear": sum(sizes)}[between]
        return cls(torch.tensor([i for order in orders for i in order]), sizes, root)

    def free(self) -> Tensor:
        """The free numbers strictly below the diagonal, `[D, D]`, boolean."""
        block = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        column = torch.arange(len(self.order))
        return ((block[:, None] == block) | (column < self.root)).tril(-1)

    def nearest(self, scale_tril: Tensor) -> Tensor:
        """The factor of the Gaussian nearest to one of factor `[D, D]`, by KL(q || p), in block order.

        Given the root, independent blocks have the precision's diagonal blocks and the exact conditional
        mean; the root's own distribution is then the exact one.
        """
        order = self.order.to(scale_tril.device)
        covariance = (scale_tril @ scale_tril.T)[order][:, order]
        precision = torch.cholesky_inverse(scale_tril)[order][:, order]
        factor, root = torch.zeros_like(covariance), self.root
        if root:
            top = torch.linalg.cholesky(covariance[:root, :root])
            factor[:root, :root] = top
            across = torch.linalg.solve_triangular(top, covariance[root:, :root].T, upper=False)
            factor[root:, :root] = across.T
        start = 0
        for size in self.sizes:
            here = slice(start, start + size)
            start += size
            if start > root:
                inner = torch.linalg.cholesky(precision[here, here])
                factor[here, here] = torch.linalg.cholesky(torch.cholesky_inverse(inner))
        return factor


class InOrder(TorchDistribution):
    """A multivariate normal of a vector's numbers in another order.

    Args:
        base: The normal in the other order, event shape `[D]`.
        order: Where its numbers belong in the vector, `[D]`.
    """

    arg_constraints: ClassVar[Any] = {}
    support: ClassVar[Any] = constraints.real_vector
    has_rsample = True
    symmetric = True

    def __init__(self, base: Any, order: Tensor, validate_args: bool | None = None) -> None:
        self.base = base
        self.order = order
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InOrder:
        """The same distribution with this batch shape."""
        return InOrder(self.base.expand(batch_shape), self.order)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised draws `[*sample_shape, *batch, D]`."""
        return self.base.rsample(torch.Size(sample_shape)).index_select(-1, self.order.argsort())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `[..., D]`, nats."""
        return self.base.log_prob(value.index_select(-1, self.order))

    @property
    def mean(self) -> Tensor:
        """`[*batch, D]`."""
        return self.base.mean.index_select(-1, self.order.argsort())

    @property
    def variance(self) -> Tensor:
        """`[*batch, D]`."""
        return self.base.variance.index_select(-1, self.order.argsort())

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance in the vector's own order, `[D, D]`."""
        back = self.order.argsort()
        rows = self.base.scale_tril.index_select(-2, back)
        return torch.linalg.cholesky(rows @ rows.mT)


class BlockNormal(GaussianFamily):
    """A normal whose factor has free numbers inside blocks and below a root, in units of a frame.

    Args:
        layout: Which numbers are free.
        scale: Initial standard deviation.
    """

    gaussian = "blocks"

    def __init__(self, layout: Layout, scale: float) -> None:
        super().__init__()
        self.layout = layout
        dim = len(layout.order)
        self.order: Tensor
        self.below: Tensor
        self.centre: Tensor
        self.unit: Tensor
        self.register_buffer("order", layout.order, persistent=False)
        self.register_buffer("below", layout.free().nonzero().T, persistent=False)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.eye(dim))
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_diagonal = nn.Parameter(torch.full((dim,), scale).log())
        self.lower = nn.Parameter(torch.zeros(self.below.shape[1]))

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        inner = self.log_diagonal.exp().diag().index_put(tuple(self.below), self.lower)
        loc = self.centre + self.unit @ self.loc
        return InOrder(dist.MultivariateNormal(loc, scale_tril=self.unit @ inner), self.order)

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Take the nearest member as the frame; parameters go back to zero."""
        self.centre.copy_(loc[self.order])
        self.unit.copy_(self.layout.nearest(scale_tril))
        self.loc.zero_()
        self.log_diagonal.zero_()
        self.lower.zero_()

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move the mean, in a frame that is still the unit one."""
        self.loc.copy_(loc[self.order])

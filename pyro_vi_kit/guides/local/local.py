"""One distribution per datum: its numbers are stored in a table, or read off the datum by an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.func import functional_call

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told
from pyro_vi_kit.core.options import require_count
from pyro_vi_kit.guides.families import Family, Table
from pyro_vi_kit.guides.local.conditional import CouplingHead
from pyro_vi_kit.guides.local.heads import DenseHead, Head, NormalHead, PointHead
from pyro_vi_kit.guides.mixtures.mixture import MixtureHead
from pyro_vi_kit.model.log_density import Plate


@runtime_checkable
class HeadSpec(Protocol):
    """A local family with its options, before it meets a model."""

    name: ClassVar[str]

    def head(self, dim: int) -> Head:
        """The head for d latents a datum; weights from torch's random state."""
        ...


@dataclass(frozen=True)
class LocalMixture:
    """A mixture of normals for each datum.

    Args:
        components: C.

    Raises:
        OptionError: If it is no positive integer.
    """

    name = "mixture"

    components: int = 4

    def __post_init__(self) -> None:
        require_count(self.name, "components", self.components)

    def head(self, dim: int) -> Head:
        """See `HeadSpec.head`."""
        return MixtureHead(dim, self.components)


@dataclass(frozen=True)
class LocalFlow:
    """A coupling flow for each datum: shared layers that read features of the datum.

    Args:
        layers: Coupling layers.
        hidden: Width of each layer's network.
        features: Numbers of each datum that the layers read.

    Raises:
        OptionError: If one is no positive integer.
    """

    name = "affine_coupling"

    layers: int = 4
    hidden: int = 32
    features: int = 8

    def __post_init__(self) -> None:
        counts = {"layers": self.layers, "hidden": self.hidden, "features": self.features}
        for option, value in counts.items():
            require_count(self.name, option, value)

    def head(self, dim: int) -> Head:
        """See `HeadSpec.head`."""
        return CouplingHead(dim, self.layers, self.hidden, self.features)


HEADS: dict[str, Callable[[int], Head]] = {
    "delta": PointHead,
    "mean_field": NormalHead,
    "full_rank": DenseHead,
    "mixture": LocalMixture().head,
    "affine_coupling": LocalFlow().head,
}


def head_for(local: str | HeadSpec, dim: int) -> Head:
    """The head that ``local=`` names, for d latents a datum.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If it is neither a name nor an instance.
    """
    if isinstance(local, str):
        if local not in HEADS:
            raise UnknownNameError("local", local, list(HEADS))
        return HEADS[local](dim)
    if not isinstance(local, HeadSpec) or isinstance(local, type):
        raise OptionError(
            f"local= takes a name ({', '.join(HEADS)}), vi.guides.LocalMixture(components=4) or "
            f"vi.guides.LocalFlow(layers=4), got {told(local)}"
        )
    return local.head(dim)


def local_name(plate: Plate, plates: int) -> str:
    """What a guide calls the block of a plate, of so many."""
    return "local" if plates == 1 else f"local_{plate.name.replace('.', '_')}"


class LocalFamily(Family):
    """One distribution per datum.

    Args:
        source: From what is known of each datum to its numbers `[..., p]`: a `Table`, or an encoder of
            the datum's observations.
        head: From the numbers to a distribution.
        conditioned: Whether an encoder sees the draws of the globals beside the observations.
    """

    def __init__(self, source: nn.Module, head: Head, *, conditioned: bool = False) -> None:
        super().__init__()
        self.source = source
        self.head = head
        self.conditioned = conditioned
        self.scored, self.relaxed = head.scored, head.relaxed

    @property
    def strata(self) -> int:
        """Components of each datum's mixture; 0 where it is none."""
        return self.head.strata

    @property
    def table(self) -> Table | None:
        """The table, where each datum has numbers of its own."""
        return self.source if isinstance(self.source, Table) else None

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distributions, event shape `[d]`."""
        return self.head(self.source(context))

    def draw_given(
        self,
        shape: tuple[int, ...],
        context: Tensor,
        *,
        detached: bool,
        live: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `draw`, with draws of the globals in the context.

        Args:
            shape: Of the draws, before the context's own.
            context: `[..., B, F]`.
            detached: Take log q at constant parameters.
            live: Let its gradient flow through the globals' draws all the same: they are draws, and no
                parameters.
        """
        if not (detached and live):
            return self.draw(shape, context, detached=detached)
        value = self(context).rsample(torch.Size(shape))
        constant = {name: p.detach() for name, p in self.named_parameters()}
        return value, functional_call(self, constant, (context,)).log_prob(value)

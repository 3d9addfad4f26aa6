"""RealNVP: affine coupling layers over a Gaussian (Dinh, Sohl-Dickstein & Bengio 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_vi_kit.core.options import require_one_of
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.flows.coupling import CouplingFlow
from pyro_vi_kit.guides.flows.flows import LayeredSpec
from pyro_vi_kit.guides.spec import GuideSpec, require_dense

Permutations = Literal["random", "reverse", "none"]


@dataclass(frozen=True)
class AffineCoupling(LayeredSpec):
    """RealNVP flow over a Gaussian: bends what the Gaussian cannot (funnels, bananas).

    Args:
        layers: Number of coupling layers. In each, one half of the coordinates moves the other, and in
            the next layer the halves change roles.
        hidden: Widths of the tanh network in each layer.
        permutations: How coordinates change places behind each pair of layers: ``random`` (drawn once,
            from the fit's seed), ``reverse``, or ``none``.
        init_scale: Initial standard deviation of the Gaussian, in unconstrained units.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "affine_coupling"
    about = About(
        does="bent and skewed bumps: funnels, bananas",
        cost="layers x D x hidden + D^2",
        use="where full_rank is not good enough",
        paper="Dinh, Sohl-Dickstein & Bengio 2017",
    )
    after = "full_rank"
    extends = True
    per_datum = "affine_coupling"

    layers: int = 8
    hidden: tuple[int, ...] = (32,)
    permutations: Permutations = "random"
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.name, "permutations", self.permutations, get_args(Permutations))

    @classmethod
    def candidates(cls, dim: int, modes: int) -> Sequence[GuideSpec]:
        """See `GuideSpec.candidates`; with one dimension there is nothing to couple."""
        if dim == 1:
            return ()
        return (cls(),) if modes > 1 else (cls(), cls(layers=16, hidden=(64,)))

    def family(self, dim: int) -> Family:
        """The family over `[D]`.

        Raises:
            OptionError: If D is too large for a dense covariance.
        """
        require_dense(self.name, dim)
        return CouplingFlow(dim, self.layers, self.hidden, self._orders(dim), self.init_scale)

    def _orders(self, dim: int) -> Tensor:
        """The coordinates' order behind each pair of layers, `[layers // 2, D]`."""
        order = torch.arange(dim)
        if dim == 2:
            # The halves change roles anyway; another exchange would move one of them twice in a row.
            return order.expand(self.layers // 2, dim).clone()
        orders = {
            "random": lambda: torch.randperm(dim),
            "reverse": lambda: order.flip(0),
            "none": lambda: order,
        }
        made = [orders[self.permutations]() for _ in range(self.layers // 2)]
        return torch.stack(made) if made else order.new_zeros(0, dim)

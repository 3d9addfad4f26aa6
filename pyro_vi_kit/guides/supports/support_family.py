"""Mean field whose families follow the supports: Gamma, Beta, Dirichlet, von Mises and normal.

The families live on the constrained scale and are pushed to the unconstrained one, so that everything
else about a fit is as for any guide (Figurnov, Mohamed & Mnih 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.guides.supports.by_support import BySupport, Place, places_of
from pyro_vi_kit.guides.supports.site_parts import (
    LogGammas,
    Normals,
    Part,
    StickDirichlets,
    TurnVonMises,
)
from pyro_vi_kit.model.log_density import Block

_TURN = 2.0 * math.pi
_NODES = 40
# Wider Gaussians, in unconstrained units, say nothing about a shape.
_WIDEST = 2.0


class SupportFamily(GaussianFamily):
    """Independent distributions whose kinds follow the supports of the sites.

    Every one has a place `loc` and a spread, 1 / sqrt(concentration):

    - normal: mean and standard deviation, unconstrained;
    - gamma: the logarithm of its mean, and shape^-1/2;
    - beta, dirichlet: the unconstrained image of its mean, and (sum of alpha)^-1/2, one per simplex;
    - von Mises: its angle, and kappa^-1/2.

    Both are measured in a fixed frame (`centre`, `unit`, `log_base`), what the family was started from.

    Args:
        block: The latents.
        scale: Initial standard deviation, roughly, in unconstrained units.

    Attributes:
        places: Where each site's numbers are, and its family.
    """

    def __init__(self, block: Block, scale: float) -> None:
        super().__init__()
        self.places: tuple[Place, ...] = places_of(block)
        dim = sum(_length(place.columns) for place in self.places)
        spreads = sum(_length(place.spreads) for place in self.places)
        self.centre: Tensor
        self.unit: Tensor
        self.log_base: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("unit", torch.ones(dim))
        self.register_buffer("log_base", torch.zeros(spreads))
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((spreads,), scale).log())
        self._groups = _groups_of(self.places)
        for i, (_, columns, places) in enumerate(self._groups):
            self.register_buffer(f"_columns_{i}", columns, persistent=False)
            self.register_buffer(f"_spreads_{i}", places, persistent=False)
        self.kept = tuple(place.site.name for place in self.places if place.kept)
        for place in self.places:
            self.log_base[place.spreads] = math.log(_spread_at_origin(place))

    @property
    def kinds(self) -> dict[str, str]:
        """The family of each site: ``normal``, ``gamma``, ``beta``, ``dirichlet`` or ``von_mises``."""
        return {place.site.name: place.kind for place in self.places}

    def numbers(self) -> tuple[Tensor, Tensor]:
        """The place of each number, `[D]`, and the logarithms of the spreads, `[S]`."""
        return self.centre + self.unit * self.loc, self.log_base + self.log_scale

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution, event shape `[D]`."""
        loc, log_spread = self.numbers()
        parts, columns = [], []
        for i, (kind, _, _) in enumerate(self._groups):
            held: Tensor = getattr(self, f"_columns_{i}")
            spread = log_spread[getattr(self, f"_spreads_{i}")]
            parts.append(_part(kind, loc[held], spread))
            columns.append(held.flatten())
        return BySupport(parts, columns)

    @torch.no_grad()
    def become(self, place: Place, loc: Tensor, unit: Tensor, log_spread: Tensor) -> None:
        """Take these as a site's frame; its parameters go back to zero.

        Args:
            place: The site's.
            loc: Of its numbers, `[n]`.
            unit: How far an optimiser's step of one goes, `[n]`.
            log_spread: `[n]`, or one for each simplex.
        """
        self.centre[place.columns] = loc
        self.unit[place.columns] = unit
        self.log_base[place.spreads] = log_spread
        self.loc[place.columns] = 0.0
        self.log_scale[place.spreads] = 0.0

    @torch.no_grad()
    def start_from(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Become the member that this Gaussian is an approximation of.

        The best Gaussian at the logarithm of a Gamma variate has the variance 1 / shape, and the mean
        of exp under it is the Gamma's; likewise for the others, with means by quadrature.
        """
        sd = torch.cholesky_inverse(scale_tril).diagonal().rsqrt()
        for place in self.places:
            if _length(place.columns):
                here = (loc[place.columns], sd[place.columns])
                self.become(place, *_nearest(place, *here))

    @torch.no_grad()
    def centre_on(self, loc: Tensor) -> None:
        """Move the places, in a frame that is still the unit one."""
        for place in self.places:
            here = loc[place.columns]
            angle = place.kind == "von_mises"
            self.loc[place.columns] = _TURN * here.sigmoid() - math.pi if angle else here


def _length(part: slice) -> int:
    return part.stop - part.start


def _groups_of(places: Sequence[Place]) -> list[tuple[str, Tensor, Tensor]]:
    """Sites of one kind together: kind, columns `[n]` or `[n, K - 1]`, and spreads `[n]`."""
    held: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    for place in places:
        if not _length(place.columns):
            continue
        kind = "dirichlet" if place.kind == "beta" else place.kind
        columns, spreads = held.setdefault((kind, place.width), ([], []))
        columns += range(place.columns.start, place.columns.stop)
        spreads += range(place.spreads.start, place.spreads.stop)
    return [
        (
            kind,
            torch.tensor(columns).reshape(-1, width)
            if kind == "dirichlet"
            else torch.tensor(columns),
            torch.tensor(spreads),
        )
        for (kind, width), (columns, spreads) in held.items()
    ]


def _part(kind: str, loc: Tensor, log_spread: Tensor) -> Part:
    """Distributions of a kind at places `[n]` (or `[n, K - 1]`) with spreads `[n]`."""
    if kind == "normal":
        return Normals(loc, log_spread.exp())
    concentration = (-2.0 * log_spread).exp()
    if kind == "gamma":
        return LogGammas(concentration, loc)
    if kind == "von_mises":
        return TurnVonMises(loc, concentration)
    return StickDirichlets(log_shares(loc) - 2.0 * log_spread.unsqueeze(-1))


def stick_offset(like: Tensor) -> Tensor:
    """What torch's stick-breaking takes off its numbers, for the last dim of ``like``, `[K - 1]`."""
    return torch.arange(like.shape[-1], 0, -1, device=like.device).to(like).log()


def log_shares(stick: Tensor) -> Tensor:
    """Logarithms of the simplex `[..., K]` that unconstrained numbers `[..., K - 1]` stand for."""
    logits = stick - stick_offset(stick)
    before = logsigmoid(-logits).cumsum(-1)
    first = torch.zeros_like(before[..., :1])
    taken = torch.cat([logsigmoid(logits), first], -1)
    return taken + torch.cat([first, before], -1)


def _spread_at_origin(place: Place) -> float:
    """The spread per unconstrained sd, at the origin."""
    if place.kind == "von_mises":
        return 0.5 * math.pi
    if place.kind in ("beta", "dirichlet"):
        shares = place.width + 1
        return math.sqrt(shares - 1) / shares
    return 1.0


def _nearest(place: Place, loc: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place, unit and log spread of the member that normals at `[n]` approximate."""
    if place.kind == "normal":
        return loc, sd, sd.log()
    sd = sd.clamp(max=_WIDEST)
    if place.kind == "gamma":
        return loc + 0.5 * sd.square(), sd, sd.log()
    if place.kind == "von_mises":
        return _nearest_angle(loc, sd)
    return _nearest_simplex(*(x.reshape(-1, place.width) for x in (loc, sd)))


def _nearest_simplex(loc: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of Dirichlets, from normals `[n, K - 1]`: each stick says what the sum of alpha would be."""
    offset = stick_offset(loc)
    share = _average((loc - offset), sd, torch.sigmoid)
    bent = _average((loc - offset), sd, lambda u: u.sigmoid() * (-u).sigmoid())
    logit = torch.logit(share)
    own = -(sd.square() * bent).log()
    left = torch.log1p(-share).cumsum(-1) - torch.log1p(-share)
    log_total = (own - left).mean(-1)
    precision = (log_total.unsqueeze(-1) + left).exp() * share * (1.0 - share)
    return (logit + offset).flatten(), precision.rsqrt().flatten(), -0.5 * log_total


def _nearest_angle(loc: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of von Mises angles, by the resultant (Banerjee et al. 2005, equation 4.4)."""
    cosine = _average(loc, sd, lambda u: (_TURN * u.sigmoid() - math.pi).cos())
    sine = _average(loc, sd, lambda u: (_TURN * u.sigmoid() - math.pi).sin())
    length = torch.hypot(cosine, sine).clamp(1e-3, 1.0 - 1e-9)
    concentration = length * (2.0 - length.square()) / (1.0 - length.square())
    spread = concentration.rsqrt()
    return torch.atan2(sine, cosine), spread.clamp(max=1.0), spread.log()


def _average(loc: Tensor, sd: Tensor, function: object) -> Tensor:
    """The mean of a function under normals, by Gauss and Hermite; same shape as ``loc``."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    points = torch.as_tensor(nodes, dtype=loc.dtype, device=loc.device)
    shares = torch.as_tensor(weights / weights.sum(), dtype=loc.dtype, device=loc.device)
    return function(loc.unsqueeze(-1) + sd.unsqueeze(-1) * points) @ shares  # type: ignore[operator]

"""Which latents have a normal prior in unconstrained space that nothing else changes.

It is found by running the model: the prior's own parameters, and that its density with the log
determinant of the site's transform is the normal density claimed. So a LogNormal counts, whose log is
normal, and no Jacobian is lost (as it is in `TraceMeanField_ELBO` with guides on constrained sites).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro.distributions import LogNormal, MultivariateNormal, Normal
from torch import Tensor

from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.visits import Visit

_TOLERANCE = 1e-6
_LOG_TWO_PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class NormalPrior:
    """The prior of one site in unconstrained space.

    Attributes:
        site: Its name.
        places: Where its numbers lie in the flat vector, `[d]`.
        loc: Mean, `[d]`.
        scale_tril: Cholesky factor of the covariance, `[d, d]`; or standard deviations, `[d]`.
    """

    site: str
    places: Tensor
    loc: Tensor
    scale_tril: Tensor

    def log_prob(self, flat: Tensor) -> Tensor:
        """Log density at flat points `[..., D]`: `[...]`, nats."""
        gap = flat[..., self.places] - self.loc
        return self._constant() - 0.5 * self._whitened(gap.unsqueeze(-1)).square().sum((-2, -1))

    def expected(self, mean: Tensor, root: Tensor) -> Tensor:
        """Expected log density under a normal of this mean `[D]` and covariance, nats.

        Args:
            mean: `[D]`.
            root: R of the covariance R R^T, `[D, r]`; or standard deviations, `[D]`.
        """
        gap = mean[self.places] - self.loc
        square = self._whitened(gap.unsqueeze(-1)).square().sum()
        rows = root[self.places]
        spread = self._whitened(rows.diag() if rows.dim() == 1 else rows).square().sum()
        return self._constant() - 0.5 * (square + spread)

    def _whitened(self, columns: Tensor) -> Tensor:
        """The inverse of the factor times columns `[..., d, r]`."""
        if self.scale_tril.dim() == 1:
            return columns / self.scale_tril.unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, columns, upper=False)

    def _constant(self) -> Tensor:
        scales = self.scale_tril if self.scale_tril.dim() == 1 else self.scale_tril.diagonal()
        return -scales.log().sum() - 0.5 * len(self.loc) * _LOG_TWO_PI


_FOUND: WeakKeyDictionary[Density, tuple[list[NormalPrior], dict[str, str]]] = WeakKeyDictionary()


def normal_priors(density: Density) -> tuple[list[NormalPrior], dict[str, str]]:
    """The latents with a fixed normal prior, and why each other one has none, by name."""
    if density not in _FOUND:
        _FOUND[density] = _find(density)
    return _FOUND[density]


def _find(density: Density) -> tuple[list[NormalPrior], dict[str, str]]:
    generator = torch.Generator().manual_seed(7)
    away = torch.randn(1, density.dim, generator=generator, dtype=torch.float64, device="cpu")
    # A leaf, so that what depends on latents or on learned parameters can be told.
    z = density.near_start(density.cast(away)).requires_grad_()
    visits = density.differentiable_visits(density.block.unpack(z))
    places, start = {}, 0
    for site in density.latents:
        size = math.prod(site.unconstrained_shape)
        places[site.name] = torch.arange(start, start + size, device=density.device)
        start += size
    priors, reasons = [], {}
    discrete_before = False
    for name, visit in visits.items():
        discrete_before = discrete_before or visit.has_states
        if visit.kind != "latent":
            continue
        reason = "comes behind a discrete site" if discrete_before else _obstacle(visit)
        made = None if reason else _prior(name, visit, places[name])
        if made is not None and _agrees(made, visit, z):
            priors.append(made)
        else:
            reasons[name] = reason or "its prior is not normal in unconstrained space"
    return priors, reasons


def _obstacle(visit: Visit) -> str:
    """Why a site cannot have a fixed normal prior; empty where it may."""
    base = _base(visit.fn)
    if not isinstance(base, Normal | LogNormal | MultivariateNormal):
        return f"its prior is {type(base).__name__}"
    parameters = [value for value in vars(base).values() if isinstance(value, Tensor)]
    inner = getattr(base, "base_dist", None)
    parameters += [v for v in vars(inner).values() if isinstance(v, Tensor)] if inner else []
    if any(parameter.requires_grad for parameter in parameters):
        return "its prior depends on other latents or on learned parameters"
    scaled = isinstance(visit.scale, Tensor) or visit.scale != 1
    if scaled or visit.mask not in (None, True):
        return "its prior is scaled or masked"
    return ""


def _prior(name: str, visit: Visit, places: Tensor) -> NormalPrior | None:
    base = _base(visit.fn)
    if isinstance(base, MultivariateNormal):
        if base.loc.numel() != len(places) or base.loc.dim() != 1:
            return None
        return NormalPrior(name, places, base.loc.detach(), base.scale_tril.detach())
    normal: Any = base.base_dist if isinstance(base, LogNormal) else base
    shape = visit.value.shape
    loc = normal.loc.detach().expand(shape).reshape(-1)
    scale = normal.scale.detach().expand(shape).reshape(-1)
    return NormalPrior(name, places, loc, scale) if len(loc) == len(places) else None


def _agrees(prior: NormalPrior, visit: Visit, z: Tensor) -> bool:
    """Whether this is the site's density in unconstrained space, Jacobian included."""
    with torch.no_grad():
        expected = visit.log_prob().sum()
        if visit.log_det is not None:
            expected = expected + visit.log_det.sum()
        found = prior.log_prob(z)[0]
        return bool((found - expected).abs() <= _TOLERANCE * (1.0 + expected.abs()))


def _base(fn: Any) -> Any:
    """The distribution inside events, expansions and masks."""
    names = ("Independent", "MaskedDistribution", "ExpandedDistribution")
    while type(fn).__name__ in names:
        fn = fn.base_dist
    return fn

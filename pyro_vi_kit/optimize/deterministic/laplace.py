"""The Gaussian of the log density's curvature at a point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.model.gradients import second_derivatives
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, round_at
from pyro_vi_kit.optimize.deterministic.search import Search

# In units of conditional sds; below, rounding decides what the curvature is.
_CURVED = 1e-10


@dataclass(frozen=True)
class Laplace:
    """A Gaussian from the curvature at a point, and whether the point is a mode.

    Attributes:
        gaussian: Mean at the point; covariance minus the inverse of the Hessian, with directions in
            which the log density is not curved downwards bent by the size of their curvature.
        log_prob: Log density at the point, nats.
        left: Nats that a Newton step promises; infinite where some direction is not curved downwards.
        flat: Directions that are not curved downwards, and were bent; 0 where that is not known.
    """

    gaussian: Gaussian
    log_prob: float
    left: float
    flat: int = 0

    @property
    def trusted(self) -> bool:
        """Whether the point is within 0.1 nat of a mode. A funnel, for one, has none."""
        return self.left < 0.1

    @property
    def log_evidence(self) -> float:
        """The integral of the density by this approximation, nats."""
        log_det = float(self.gaussian.scale_tril.diagonal().log().sum())
        return self.log_prob + log_det + 0.5 * len(self.gaussian.loc) * math.log(2.0 * math.pi)


def laplace(search: Search, z: Tensor, log_prob: float, gradient: Tensor) -> Laplace:
    """The Laplace approximation at a point `[D]` with this log density and gradient.

    Where the Hessian is not finite, or its diagonal is zero, the covariance there is the identity.
    """
    precision = -hessian(search.density, z)
    search.evaluations += 2 * search.density.dim
    if not bool(torch.isfinite(precision).all()):
        return Laplace(round_at(z), log_prob, math.inf)
    # In units of the conditional sds the eigenvalues can be compared with each other.
    size = precision.diagonal().abs()
    unit = torch.where(size > 1e-300, size, torch.ones_like(size)).rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, None] * precision * unit)
    curved = bool(values[0] > _CURVED) and bool((precision.diagonal() > 0).all())
    slope = vectors.T @ (unit * gradient)
    covariance = unit[:, None] * (vectors / values.abs().clamp_min(1e-6)) @ vectors.T * unit
    scale_tril, failed = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
    if int(failed):
        scale_tril, curved = unit.diag(), False
    left = 0.5 * float((slope.square() / values).sum()) if curved else math.inf
    flat = int((values <= _CURVED).sum())
    return Laplace(Gaussian(z, scale_tril), log_prob, left, flat)


def hessian(density: Density, z: Tensor) -> Tensor:
    """Hessian of the log density at `[D]`, `[D, D]`: D gradients of gradients in one batch.

    Falls back to central differences of gradients where an operation cannot be differentiated twice, or
    its second derivative is not finite (`logaddexp` far from a tie).
    """
    points = z.detach().expand(density.dim, -1).clone()
    try:
        rows = second_derivatives(density, points)
    except RuntimeError:
        rows = torch.full_like(points, torch.nan)
    if not bool(rows.isfinite().all()):
        step = 1e-4 * (1.0 + z.abs())
        shifts = step.diag()
        _, forward = density.log_prob_and_grad(z + shifts)
        _, backward = density.log_prob_and_grad(z - shifts)
        rows = (forward - backward) / (2.0 * step[:, None])
    return ((rows + rows.T) / 2).detach()

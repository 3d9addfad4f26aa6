"""Where to start: the mode of the log density, and the Gaussian of its curvature there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.density import Density
from pyro_vi_kit.errors import ModelError
from pyro_vi_kit.methods.minimise import Minimum, minimise

_STARTS = 32


@dataclass(frozen=True)
class Laplace:
    """A Gaussian from the curvature at a mode.

    Attributes:
        loc: The mode, `[D]`.
        scale_tril: Cholesky factor of the inverse of minus the Hessian, `[D, D]`.
        evaluations: Single-point gradient evaluations that it cost.
        trusted: Whether the search converged to a point where the log density is curved downwards in
            every direction. A funnel's mode, for one, is not.
        stopped: ``""``, ``"budget"`` or ``"interrupted"``: what cut the search short.
    """

    loc: Tensor
    scale_tril: Tensor
    evaluations: int
    trusted: bool
    stopped: str


def starting_point(density: Density, seed: int) -> Tensor:
    """The origin of unconstrained space, or the best of 32 random points where it is no good, `[D]`.

    Raises:
        ModelError: If the log density is finite at none of them.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(_STARTS, density.dim, generator=generator, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, density.dim), points]).to(density.dtype)
    log_prob, gradient = density.log_prob_and_grad(points)
    good = torch.isfinite(log_prob) & torch.isfinite(gradient).all(-1)
    if not good.any():
        raise ModelError(
            f"the log density or its gradient is not finite at any of {_STARTS + 1} starting points: "
            "see vi.check(model), or give a point with init={site: value}"
        )
    if good[0]:
        return points[0]
    return points[torch.where(good, log_prob, -torch.inf).argmax()]


def find_mode(
    density: Density, start: Tensor, *, jacobian: bool = True, deadline: float | None = None
) -> Minimum:
    """Maximise the log density from ``start``, `[D]`.

    Args:
        density: The model.
        start: Where to begin, `[D]`.
        jacobian: Whether to find the mode of the unconstrained density, or of the constrained one.
        deadline: `time.monotonic` second at which to stop.
    """
    return minimise(
        lambda z: -density.log_prob(z.unsqueeze(0), jacobian=jacobian).sum(),
        start,
        deadline=deadline,
    )


def laplace(density: Density, start: Tensor, deadline: float | None = None) -> Laplace:
    """The Laplace approximation reached from ``start``, `[D]`."""
    mode = find_mode(density, start, deadline=deadline)
    precision = -hessian(density, mode.x)
    evaluations = mode.evaluations + 2 * density.dim
    diagonal = precision.diagonal()
    identity = torch.eye(density.dim, dtype=density.dtype)
    if not bool(torch.isfinite(precision).all()) or not bool((diagonal > 0).all()):
        return Laplace(mode.x, identity, evaluations, False, mode.stopped)
    # In units of the conditional sds the eigenvalues can be compared with each other.
    unit = diagonal.rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, None] * precision * unit)
    trusted = bool(values[0] > 1e-10) and mode.converged
    covariance = unit[:, None] * (vectors / values.clamp_min(1e-6)) @ vectors.T * unit
    scale_tril, failed = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
    if int(failed):
        return Laplace(mode.x, unit.diag(), evaluations, False, mode.stopped)
    return Laplace(mode.x, scale_tril, evaluations, trusted, mode.stopped)


def hessian(density: Density, z: Tensor) -> Tensor:
    """Hessian of the log density at `[D]`, `[D, D]`: D gradients of gradients in one batch.

    Falls back to central differences of gradients where an operation cannot be differentiated twice.
    """
    points = z.detach().expand(density.dim, -1).clone().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(density.log_prob(points).sum(), points, create_graph=True)
        (rows,) = torch.autograd.grad(gradient.diagonal().sum(), points)
    except RuntimeError:
        step = 1e-4 * (1.0 + z.abs())
        shifts = step.diag()
        _, forward = density.log_prob_and_grad(z + shifts)
        _, backward = density.log_prob_and_grad(z - shifts)
        rows = (forward - backward) / (2.0 * step[:, None])
    return (rows + rows.T) / 2

"""Gaussians along the way of an L-BFGS search (Zhang, Carpenter, Gelman & Vehtari 2022).

The steps of a search and the changes of its gradients give an inverse Hessian of the form diagonal plus
low rank, from which to draw costs D J^2, whatever D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian

# Of a change that is nearly across its step nothing can be learned.
_LEAST_BEND = 1e-12


@dataclass(frozen=True)
class LowRankGaussian:
    """A Gaussian of covariance `T T^T`, with `T = diag(sd) (I + Q (inner - I) Q^T)`.

    Attributes:
        loc: Mean, `[D]`.
        sd: `[D]`.
        basis: Q, orthonormal columns, `[D, r]`.
        inner: A lower triangle, `[r, r]`.
    """

    loc: Tensor
    sd: Tensor
    basis: Tensor
    inner: Tensor

    def place(self, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from standard normals `[S, D]`."""
        within = noise @ self.basis
        return self.loc + (noise + (within @ self.inner.T - within) @ self.basis.T) * self.sd

    def log_q(self, noise: Tensor) -> Tensor:
        """Log density at what these normals give, `[S]`, nats."""
        log_det = self.sd.log().sum() + self.inner.diagonal().log().sum()
        return -0.5 * (noise.square().sum(-1) + len(self.loc) * math.log(2.0 * math.pi)) - log_det

    def dense(self) -> Gaussian:
        """The same with a Cholesky factor."""
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        root = self.place(identity) - self.loc
        # Rows of `root` are T's columns; the triangle of its QR is the factor, up to signs.
        upper = torch.linalg.qr(root, mode="r")[1]
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
        return Gaussian(self.loc, (signs[:, None] * upper).T.contiguous())


def along(path: Tensor, gradients: Tensor, history: int) -> Iterator[LowRankGaussian | None]:
    """The Gaussian of the curvature known at each point of a search but the first.

    Args:
        path: Points `[T, D]`.
        gradients: Of the log density there, `[T, D]`.
        history: Steps that are remembered.

    Yields:
        T - 1 Gaussians; None where the curvature known is not positive.
    """
    diagonal = torch.ones_like(path[0])
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for t in range(1, len(path)):
        step, change = path[t] - path[t - 1], gradients[t - 1] - gradients[t]
        bend = step @ change
        if bool(bend > _LEAST_BEND * change.square().sum()):
            diagonal = _updated(diagonal, step, change, bend)
            steps, changes = [*steps, step][-history:], [*changes, change][-history:]
        yield _gaussian(path[t], gradients[t], diagonal, steps, changes)


def _updated(diagonal: Tensor, step: Tensor, change: Tensor, bend: Tensor) -> Tensor:
    """The diagonal of the inverse Hessian after one more step (Gilbert & Lemarechal 1989)."""
    a = (change.square() * diagonal).sum()
    c = (step.square() / diagonal).sum()
    precision = a / (bend * diagonal) + change.square() / bend
    precision = precision - a * step.square() / (bend * c * diagonal.square())
    return 1.0 / precision.clamp_min(1e-300)


def _gaussian(
    z: Tensor, gradient: Tensor, diagonal: Tensor, steps: list[Tensor], changes: list[Tensor]
) -> LowRankGaussian | None:
    """A Newton step away from a point, with the inverse Hessian as covariance."""
    sd = diagonal.sqrt()
    if not steps:
        basis, inner = z.new_zeros(len(z), 0), z.new_zeros(0, 0)
    else:
        s, y = torch.stack(steps, -1), torch.stack(changes, -1)
        upper = (s.T @ y).triu()
        identity = torch.eye(len(upper), dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
        middle = upper.diagonal().diag() + y.T @ (diagonal[:, None] * y)
        gamma = torch.cat(
            [
                torch.cat([torch.zeros_like(middle), -inverse], -1),
                torch.cat([-inverse.T, inverse.T @ middle @ inverse], -1),
            ]
        )
        basis, triangle = torch.linalg.qr(torch.cat([sd[:, None] * y, s / sd[:, None]], -1))
        within = triangle @ gamma @ triangle.T
        within = (within + within.T) / 2 + torch.eye(len(within), dtype=z.dtype, device=z.device)
        inner, failed = torch.linalg.cholesky_ex(within)
        if int(failed) or not bool(inner.isfinite().all()):
            return None
    at = LowRankGaussian(torch.zeros_like(z), sd, basis, inner)
    return LowRankGaussian(z + _times_covariance(at, gradient), sd, basis, inner)


def _times_covariance(at: LowRankGaussian, gradient: Tensor) -> Tensor:
    """`T T^T gradient`, `[D]`."""
    scaled = at.sd * gradient
    within = at.basis.T @ scaled
    pulled = scaled + at.basis @ (at.inner.T @ within - within)
    return at.place(pulled.unsqueeze(0))[0]

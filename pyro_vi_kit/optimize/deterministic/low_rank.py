"""The shape of a Gaussian with diagonal plus low-rank covariance, for fixed-draw fits.

Its ELBO is badly conditioned even where the posterior is a Gaussian: diagonal and factor stand in for
each other, and columns of the factor may be rotated into each other at will. What the ELBO would be if
the frame were the posterior is known in closed form, though, and so are its optimum, where the search
begins, and its Hessian there, in whose units the search is made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vi_kit.guides.gaussian.low_rank import widest
from pyro_vi_kit.optimize.deterministic.minimise import minimise
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, Shape

# The Hessian of so many numbers takes a second; of more, its diagonal is guessed.
_MAX_HESSIAN = 1500
# Rotations of the columns change nothing, and columns that a Gaussian has no use for little.
_FLAT = 0.1


class LowRankShape(Shape):
    """Mean `loc + L m`, covariance `L G G^T L^T + diag(unit exp(s))^2`, for a frame N(loc, L L^T).

    Draws are made with the Cholesky factor: noise of its own for the factor would add as much to the
    gradients, most of all in columns that are hardly used. A search takes D^3 steps of arithmetic then.

    The vector is m, then (s, G) in units of the Hessian at the best low-rank Gaussian for the frame.

    Args:
        frame: A Gaussian near the posterior.
        rank: Columns of the factor.
    """

    def __init__(self, frame: Gaussian, rank: int) -> None:
        self.frame = frame
        self.rank = rank
        self._unit = frame.conditional_sd()
        self.noise = dim = len(frame.loc)
        self._tril = tril = frame.scale_tril / self._unit[:, None]
        self._origin = _best_for(tril, rank)
        ones = frame.loc.new_ones(dim)
        if len(self._origin) <= _MAX_HESSIAN:
            self._basis: Tensor | None = _whitening(tril, self._origin)
            self.curvature = torch.cat([ones, torch.ones_like(self._origin)])
        else:
            self._basis = None
            self.curvature = torch.cat([ones, 2.0 * ones, ones.repeat(rank)])

    def _inner(self, move: Tensor) -> tuple[Tensor, Tensor]:
        """Log diagonal `[D]` in conditional sds and factor `[D, rank]` in the frame's units."""
        inner = self._origin + (move if self._basis is None else self._basis @ move)
        return inner[: self.noise], inner[self.noise :].reshape(self.noise, self.rank)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `[D]`, diagonal sds `[D]` and factor `[D, rank]`."""
        mean = self.frame.loc + self.frame.scale_tril @ x[: self.noise]
        log_sd, factor = self._inner(x[self.noise :])
        return mean, self._unit * log_sd.exp(), self.frame.scale_tril @ factor

    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""
        if log_factor == 0.0:
            return x
        log_sd, factor = self._inner(x[self.noise :])
        inner = torch.cat([log_sd + log_factor, math.exp(log_factor) * factor.flatten()])
        move = inner - self._origin
        if self._basis is not None:
            move = torch.linalg.solve(self._basis, move)
        return torch.cat([x[: self.noise], move])

    def _scale_tril(self, move: Tensor) -> Tensor | None:
        """Cholesky factor of the covariance, `[D, D]`, differentiable; None where it has none."""
        log_sd, factor = self._inner(move)
        wide = self._tril @ factor
        covariance = wide @ wide.T + (2.0 * log_sd).exp().diag()
        root, failed = torch.linalg.cholesky_ex(covariance)
        return None if int(failed) else self._unit[:, None] * root

    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`; the mean alone where the covariance overflows."""
        tril = self._scale_tril(x[self.noise :])
        mean = self.parts(x)[0].expand_as(noise)
        return mean if tril is None else mean + noise @ tril.T

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D]`."""
        return gradient @ self.gaussian(x).scale_tril

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        dim = self.noise
        with torch.enable_grad():
            move = x[dim:].clone().requires_grad_()
            tril = self._scale_tril(move)
            if tril is None:
                # A line search went where the sds overflow: it turns back from infinity.
                return log_p.new_tensor(math.inf), torch.zeros_like(x)
            entropy = tril.diagonal().log().sum()
            moved = (tril * (gradient.T @ noise / len(noise))).sum()
            (slope,) = torch.autograd.grad(entropy + moved, move)
        elbo = log_p.mean() + entropy.detach() + 0.5 * dim * (1.0 + math.log(2.0 * math.pi))
        return -elbo, -torch.cat([gradient.mean(0) @ self.frame.scale_tril, slope])

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for; the frame where its covariance overflows."""
        tril = self._scale_tril(x[self.noise :])
        return self.frame if tril is None else Gaussian(self.parts(x)[0], tril)

    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """This shape: its units are those of an optimum already."""
        return self, x


def _loss(tril: Tensor, inner: Tensor) -> Tensor:
    """Minus the ELBO, up to a constant, of (s, G) where the frame of this factor is the posterior."""
    dim = len(tril)
    log_sd, factor = inner[:dim], inner[dim:].reshape(dim, -1)
    scaled = (tril @ factor) * (-log_sd).exp()[:, None]
    identity = torch.eye(factor.shape[1], dtype=inner.dtype, device=inner.device)
    within = identity + scaled.T @ scaled
    energy = 0.5 * (factor.square().sum() + (2.0 * log_sd).exp().sum())
    return energy - log_sd.sum() - torch.linalg.cholesky(within).diagonal().log().sum()


def _best_for(tril: Tensor, rank: int) -> Tensor:
    """The (s, G) nearest to a Gaussian of this factor in conditional sds, by KL(q || p): `[P - D]`."""
    columns = widest(tril, rank)
    factor = torch.linalg.solve_triangular(tril, columns, upper=False)
    start = torch.cat([torch.zeros_like(tril[0]), factor.flatten()])

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        at = points[0].clone().requires_grad_()
        try:
            value = _loss(tril, at)
        except torch.linalg.LinAlgError:
            return points.new_full((1,), math.inf), torch.zeros_like(points)
        (slope,) = torch.autograd.grad(value, at)
        return value.detach()[None], slope[None]

    return minimise(loss, start, tolerance=1e-6, max_evaluations=500).x


def _whitening(tril: Tensor, inner: Tensor) -> Tensor:
    """The inverse root of the Hessian there, `[P - D, P - D]`."""
    curvature = torch.func.hessian(lambda at: _loss(tril, at))(inner)
    values, vectors = torch.linalg.eigh(curvature)
    return vectors * values.clamp_min(_FLAT).rsqrt()

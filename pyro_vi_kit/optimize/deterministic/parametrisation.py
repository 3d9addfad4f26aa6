"""Gaussians as vectors of numbers, in coordinates in which the posterior is roughly round.

Each shape turns a parameter vector and standard normal noise into points, and the log density's
gradients at those points into the gradient of minus the ELBO: the chain rule in plain algebra, so that
the model is asked for nothing but `log_p` and its gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.guides.gaussian.low_rank import widest
from pyro_vi_kit.guides.gaussian.structured import Layout
from pyro_vi_kit.optimize.deterministic.minimise import minimise


@dataclass
class Gaussian:
    """A Gaussian over `[D]` as mean and Cholesky factor.

    Attributes:
        loc: Mean, `[D]`.
        scale_tril: Cholesky factor of the covariance, `[D, D]`.
    """

    loc: Tensor
    scale_tril: Tensor

    def conditional_sd(self) -> Tensor:
        """The sds of the nearest diagonal Gaussian, by reverse KL: 1 / sqrt(precision_ii), `[D]`."""
        return torch.cholesky_inverse(self.scale_tril).diagonal().rsqrt()


def round_at(loc: Tensor) -> Gaussian:
    """The Gaussian of covariance I around a point `[D]`."""
    return Gaussian(loc, torch.eye(len(loc), dtype=loc.dtype, device=loc.device))


class GaussianParametrisation(ABC):
    """A Gaussian family in the units of a frame; the zero vector is (near) the frame itself.

    Attributes:
        frame: A Gaussian near the optimum: means are measured in its units.
        noise: Standard normals per draw.
        curvature: The ELBO's negative Hessian diagonal where the frame is the posterior, `[P]`.
    """

    frame: Gaussian
    noise: int
    curvature: Tensor

    def start(self) -> Tensor:
        """The frame, or what comes nearest, `[P]`."""
        return torch.zeros_like(self.curvature)

    @abstractmethod
    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""

    @abstractmethod
    def reparameterise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, noise]`."""

    @abstractmethod
    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, noise]`, from those at the draws, `[S, D]`."""

    @abstractmethod
    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`, from log densities and gradients at draws."""

    @abstractmethod
    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for."""

    @abstractmethod
    def recentre(self, x: Tensor) -> tuple[GaussianParametrisation, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""


def _constant(dim: int) -> float:
    """The entropy of D standard normals, nats."""
    return 0.5 * dim * (1.0 + math.log(2.0 * math.pi))


class Dense(GaussianParametrisation):
    """Any covariance: `z = loc + L (m + C eps)`, with C a lower triangle with logs on its diagonal."""

    def __init__(self, frame: Gaussian) -> None:
        self.frame = frame
        self.noise = dim = len(frame.loc)
        self._below = torch.tril_indices(dim, dim, -1, device=frame.loc.device)
        self._log_unit = frame.scale_tril.diagonal().log().sum()
        self.curvature = torch.cat(
            [
                frame.loc.new_ones(dim),
                frame.loc.new_full((dim,), 2.0),
                frame.loc.new_ones(self._below.shape[1]),
            ]
        )

    def _unpack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factor = x[self.noise : 2 * self.noise].exp().diag()
        factor[self._below[0], self._below[1]] = x[2 * self.noise :]
        return x[: self.noise], factor

    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""
        mean, factor = self._unpack(x)
        logs = x[self.noise : 2 * self.noise] + log_factor
        below = factor[self._below[0], self._below[1]] * math.exp(log_factor)
        return torch.cat([mean, logs, below])

    def reparameterise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`."""
        mean, factor = self._unpack(x)
        return self.frame.loc + (mean + noise @ factor.T) @ self.frame.scale_tril.T

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D]`."""
        return gradient @ (self.frame.scale_tril @ self._unpack(x)[1])

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        _, factor = self._unpack(x)
        logs = x[self.noise : 2 * self.noise]
        elbo = log_p.mean() + logs.sum() + self._log_unit + _constant(self.noise)
        inner = gradient @ self.frame.scale_tril
        for_factor = inner.T @ noise / len(noise)
        slope = torch.cat(
            [
                inner.mean(0),
                for_factor.diagonal() * factor.diagonal() + 1.0,
                for_factor[self._below[0], self._below[1]],
            ]
        )
        return -elbo, -slope

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for."""
        mean, factor = self._unpack(x)
        tril = self.frame.scale_tril
        return Gaussian(self.frame.loc + tril @ mean, tril @ factor)

    def recentre(self, x: Tensor) -> tuple[GaussianParametrisation, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        shape = Dense(self.gaussian(x))
        return shape, shape.start()


class Diagonal(GaussianParametrisation):
    """Independent normals: `z = loc + L m + unit * exp(s) * eps`.

    The mean moves in the frame's units, correlations included: with a correlation of 0.99 the ELBO of
    independent normals is as badly conditioned in the mean as the posterior itself.
    """

    def __init__(self, frame: Gaussian, unit: Tensor | None = None) -> None:
        self.frame = frame
        self.noise = dim = len(frame.loc)
        self._unit = frame.conditional_sd() if unit is None else unit
        self.curvature = torch.cat([frame.loc.new_ones(dim), frame.loc.new_full((dim,), 2.0)])

    def scale(self, x: Tensor) -> Tensor:
        """The sds, `[D]`."""
        return self._unit * x[self.noise :].exp()

    def mean(self, x: Tensor) -> Tensor:
        """The means, `[D]`."""
        return self.frame.loc + self.frame.scale_tril @ x[: self.noise]

    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""
        return torch.cat([x[: self.noise], x[self.noise :] + log_factor])

    def reparameterise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`."""
        return self.mean(x) + noise * self.scale(x)

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D]`."""
        return gradient * self.scale(x)

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        scale = self.scale(x)
        elbo = log_p.mean() + scale.log().sum() + _constant(self.noise)
        for_log_scale = (gradient * noise).mean(0) * scale + 1.0
        return -elbo, -torch.cat([gradient.mean(0) @ self.frame.scale_tril, for_log_scale])

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for."""
        return Gaussian(self.mean(x), self.scale(x).diag())

    def recentre(self, x: Tensor) -> tuple[GaussianParametrisation, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        shape = Diagonal(Gaussian(self.mean(x), self.frame.scale_tril), self.scale(x))
        return shape, shape.start()


class Blocked(GaussianParametrisation):
    """`z = loc + L m + U C eps`, with U and C lower triangles of one layout, in the order of its blocks.

    As in `Diagonal` the mean moves in the units of a frame that knows all correlations.

    Args:
        frame: A Gaussian near the posterior.
        layout: The free numbers of C.
        unit: U `[D, D]`; of the member nearest to the frame when None.
    """

    def __init__(self, frame: Gaussian, layout: Layout, unit: Tensor | None = None) -> None:
        self.frame = frame
        self.layout = layout
        self.noise = dim = len(frame.loc)
        self._order = layout.order.to(frame.loc.device)
        self._back = self._order.argsort()
        self._below = layout.free().nonzero().T.to(frame.loc.device)
        self._unit = layout.nearest(frame.scale_tril) if unit is None else unit
        ones = frame.loc.new_ones(dim)
        self.curvature = torch.cat([ones, 2.0 * ones, ones.new_ones(self._below.shape[1])])

    def _inner(self, x: Tensor) -> Tensor:
        """C, `[D, D]`."""
        factor = x[self.noise : 2 * self.noise].exp().diag()
        factor[self._below[0], self._below[1]] = x[2 * self.noise :]
        return factor

    def _mean(self, x: Tensor) -> Tensor:
        return self.frame.loc + self.frame.scale_tril @ x[: self.noise]

    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""
        mean, logs, below = x.split([self.noise, self.noise, self._below.shape[1]])
        return torch.cat([mean, logs + log_factor, below * math.exp(log_factor)])

    def reparameterise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`, which is in the order of the blocks."""
        moved = noise @ (self._unit @ self._inner(x)).T
        return self._mean(x) + moved.index_select(-1, self._back)

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D]`."""
        return gradient.index_select(-1, self._order) @ (self._unit @ self._inner(x))

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        factor, dim = self._inner(x), self.noise
        entropy = x[dim : 2 * dim].sum() + self._unit.diagonal().log().sum()
        elbo = log_p.mean() + entropy + _constant(dim)
        inner = gradient.index_select(-1, self._order) @ self._unit
        for_factor = inner.T @ noise / len(noise)
        slope = torch.cat(
            [
                gradient.mean(0) @ self.frame.scale_tril,
                for_factor.diagonal() * factor.diagonal() + 1.0,
                for_factor[self._below[0], self._below[1]],
            ]
        )
        return -elbo, -slope

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for."""
        rows = (self._unit @ self._inner(x)).index_select(0, self._back)
        return Gaussian(self._mean(x), torch.linalg.cholesky(rows @ rows.T))

    def recentre(self, x: Tensor) -> tuple[GaussianParametrisation, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        frame = Gaussian(self._mean(x), self.frame.scale_tril)
        shape = Blocked(frame, self.layout, self._unit @ self._inner(x))
        return shape, shape.start()


# The Hessian of so many numbers takes a second; of more, its diagonal is guessed.
_MAX_HESSIAN = 1500
# Rotations of the columns change nothing, and columns that a Gaussian has no use for little.
_FLAT = 0.1


class LowRank(GaussianParametrisation):
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

    def reparameterise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`; the mean alone where the covariance overflows."""
        tril = self._scale_tril(x[self.noise :])
        mean = self.parts(x)[0].expand_as(noise)
        return mean if tril is None else mean + noise @ tril.T

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
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
        elbo = log_p.mean() + entropy.detach() + _constant(dim)
        return -elbo, -torch.cat([gradient.mean(0) @ self.frame.scale_tril, slope])

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for; the frame where its covariance overflows."""
        tril = self._scale_tril(x[self.noise :])
        return self.frame if tril is None else Gaussian(self.parts(x)[0], tril)

    def recentre(self, x: Tensor) -> tuple[GaussianParametrisation, Tensor]:
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

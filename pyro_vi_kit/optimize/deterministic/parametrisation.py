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


class Shape(ABC):
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
    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, noise]`."""

    @abstractmethod
    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
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
    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""


def _constant(dim: int) -> float:
    return 0.5 * dim * (1.0 + math.log(2.0 * math.pi))


class Dense(Shape):
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

    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`."""
        mean, factor = self._unpack(x)
        return self.frame.loc + (mean + noise @ factor.T) @ self.frame.scale_tril.T

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
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

    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        shape = Dense(self.gaussian(x))
        return shape, shape.start()


class Diagonal(Shape):
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

    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`."""
        return self.mean(x) + noise * self.scale(x)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
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

    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        shape = Diagonal(Gaussian(self.mean(x), self.frame.scale_tril), self.scale(x))
        return shape, shape.start()

"""The shape of a Gaussian with diagonal plus low-rank covariance, for fixed-draw fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vi_kit.guides.low_rank import widest
from pyro_vi_kit.methods.shapes import Gaussian, Shape


class LowRankShape(Shape):
    """`z = loc + L (m + G e2) + unit * exp(s) * e1`, with noise e1 of D numbers and e2 of `rank`.

    Mean and factor are in the frame's units, in which the posterior is round; the diagonal is in units
    of the conditional sds.
    """

    def __init__(self, frame: Gaussian, rank: int, unit: Tensor | None = None) -> None:
        self.frame = frame
        self.rank = rank
        self._unit = frame.conditional_sd() if unit is None else unit
        self._dim = dim = len(frame.loc)
        self.noise = dim + rank
        ones = frame.loc.new_ones(dim)
        self.curvature = torch.cat([ones, 2.0 * ones, ones.repeat(rank)])

    def start(self) -> Tensor:
        """The frame's conditional sds and widest directions, `[P]`."""
        x = torch.zeros_like(self.curvature)
        columns = self._unit[:, None] * widest(
            self.frame.scale_tril / self._unit[:, None], self.rank
        )
        inner = torch.linalg.solve_triangular(self.frame.scale_tril, columns, upper=False)
        x[2 * self._dim :] = inner.flatten()
        return x

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean `[D]`, diagonal sds `[D]` and factor `[D, rank]`."""
        dim = self._dim
        mean = self.frame.loc + self.frame.scale_tril @ x[:dim]
        sd = self._unit * x[dim : 2 * dim].exp()
        return mean, sd, self.frame.scale_tril @ x[2 * dim :].reshape(dim, self.rank)

    def shrunk(self, x: Tensor, log_factor: float) -> Tensor:
        """The same mean with all sds multiplied by ``exp(log_factor)``."""
        dim = self._dim
        factor = math.exp(log_factor) * x[2 * dim :]
        return torch.cat([x[:dim], x[dim : 2 * dim] + log_factor, factor])

    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D + rank]`."""
        mean, sd, factor = self.parts(x)
        return mean + noise[:, : self._dim] * sd + noise[:, self._dim :] @ factor.T

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D + rank]`."""
        _, sd, factor = self.parts(x)
        return torch.cat([gradient * sd, gradient @ factor], 1)

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        dim, draws = self._dim, len(noise)
        _, sd, factor = self.parts(x)
        # Woodbury: (D^2 + F F^T)^-1 F = D^-2 F (I + F^T D^-2 F)^-1.
        scaled = factor / sd[:, None]
        inner = torch.eye(self.rank, dtype=x.dtype) + scaled.T @ scaled
        root, failed = torch.linalg.cholesky_ex(inner)
        if int(failed):
            # A line search went where the sds overflow: it turns back from infinity.
            return log_p.new_tensor(math.inf), torch.zeros_like(x)
        solved = torch.cholesky_solve(scaled.T, root).T
        entropy = sd.log().sum() + root.diagonal().log().sum()
        entropy = entropy + 0.5 * dim * (1.0 + math.log(2.0 * math.pi))
        for_sd = (gradient * noise[:, :dim]).mean(0) * sd + 1.0 - (solved * scaled).sum(1)
        for_factor = gradient.T @ noise[:, dim:] / draws + solved / sd[:, None]
        tril = self.frame.scale_tril
        slope = torch.cat([gradient.mean(0) @ tril, for_sd, (tril.T @ for_factor).flatten()])
        return -(log_p.mean() + entropy), -slope

    def gaussian(self, x: Tensor) -> Gaussian:
        """The Gaussian that a vector stands for."""
        mean, sd, factor = self.parts(x)
        return Gaussian(mean, torch.linalg.cholesky(factor @ factor.T + sd.square().diag()))

    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """The same shape with its mean in the frame, and ``x`` in those units."""
        mean, sd, _ = self.parts(x)
        shape = LowRankShape(Gaussian(mean, self.frame.scale_tril), self.rank, sd)
        dim = self._dim
        return shape, torch.cat([torch.zeros_like(x[: 2 * dim]), x[2 * dim :]])

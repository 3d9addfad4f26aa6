"""The shape of a Gaussian over blocks of latents, for fixed-draw fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vi_kit.guides.gaussian.structured import Layout
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian, Shape


class Blocked(Shape):
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

    def place(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `[S, D]` from noise `[S, D]`, which is in the order of the blocks."""
        moved = noise @ (self._unit @ self._inner(x)).T
        return self._mean(x) + moved.index_select(-1, self._back)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with respect to the noise, `[S, D]`."""
        return gradient.index_select(-1, self._order) @ (self._unit @ self._inner(x))

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`."""
        factor, dim = self._inner(x), self.noise
        entropy = x[dim : 2 * dim].sum() + self._unit.diagonal().log().sum()
        elbo = log_p.mean() + entropy + 0.5 * dim * (1.0 + math.log(2.0 * math.pi))
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

    def reframed(self, x: Tensor) -> tuple[Shape, Tensor]:
        """The same shape in the units of ``x``, and ``x`` in those units."""
        frame = Gaussian(self._mean(x), self.frame.scale_tril)
        shape = Blocked(frame, self.layout, self._unit @ self._inner(x))
        return shape, shape.start()

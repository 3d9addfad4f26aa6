"""How good a Gaussian in unconstrained space is, by our density on common draws."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_kit.model.log_density import Density

_CHUNK = 4096
# Draws, and nats below the target from which on more of them are worth their time.
_STAGES = ((256, 2.0), (2048, 0.2))


class Oracle:
    """ELBO of N(loc, scale_tril scale_tril^T) on antithetic draws, the same at every call.

    Args:
        density: The model.
        draws: How many draws a full look takes.
    """

    def __init__(self, density: Density, draws: int = 16_384) -> None:
        self.density = density
        half = torch.randn(
            draws // 2,
            density.dim,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(20_26),
        )
        # Pairs side by side, so that the first few are antithetic too.
        self._noise = torch.stack([half, -half], 1).flatten(0, 1)

    def look(self, loc: Tensor, scale_tril: Tensor, target: float) -> float:
        """The ELBO, nats: on few draws where these already say that it is far from the target."""
        for draws, near in _STAGES:
            rough = self._elbo(loc, scale_tril, self._noise[:draws])
            if not rough > target - near:
                return rough
        return self._elbo(loc, scale_tril, self._noise)

    @torch.no_grad()
    def _elbo(self, loc: Tensor, scale_tril: Tensor, noise: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for part in noise.split(_CHUNK):
            total += self.density.log_prob(loc + part @ scale_tril.T).sum()
        entropy = scale_tril.diagonal().abs().log().sum() + 0.5 * self.density.dim * (
            1 + torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        )
        return float(total / len(noise) + entropy)

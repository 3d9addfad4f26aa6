"""Standard normal draws to hold fixed: antithetic, with exact mean 0 and covariance I.

They are drawn on the CPU, so that a fit holds the same ones on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine


def standard_normals(draws: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent normals `[draws, dim]` on the CPU, float64, from a generator of the CPU."""
    return torch.randn(draws, dim, generator=generator, dtype=torch.float64, device="cpu")


def matched_normals(draws: int, dim: int, seed: int) -> Tensor:
    """Moment-matched normals `[draws, dim]` on the CPU, float64.

    Each draw stands beside its mirror image, so odd moments vanish; the covariance is whitened to the
    identity where the draws outnumber twice the dimension, and to unit variances else. A Gaussian
    target's ELBO over these draws is exact, which is what keeps few of them from overfitting.

    Args:
        draws: An even number.
        dim: D.
        seed: The same seed gives the same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    half = standard_normals(draws // 2, dim, generator)
    if draws // 2 > dim:
        factor = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(factor, half.T, upper=False).T
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])


def sobol_normals(draws: int, dim: int, seed: int) -> Tensor:
    """Standard normals `[draws, dim]` from scrambled Sobol points, on the CPU, float64.

    In few dimensions a mean over them is nearly as good as one over as many draws squared.

    Args:
        draws: A power of two, where their balance matters.
        dim: D.
        seed: Of the scrambling.
    """
    points = SobolEngine(dim, scramble=True, seed=seed).draw(draws, dtype=torch.float64)
    return normals_at(points)


def normals_at(points: Tensor) -> Tensor:
    """Standard normals at uniform points in [0, 1), of any shape."""
    tiny = 2.0**-32
    return torch.special.ndtri(points.clamp(tiny, 1.0 - tiny))

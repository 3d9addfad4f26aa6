"""The exact Hessian of minus the ELBO of a Gaussian on draws that are held fixed.

A Gaussian's parameters enter the draws in plain algebra, `z = loc + L (u + C eps)`, so that all the
model is asked for is its own Hessian at each draw, one direction at a time: D products of it with a
vector for all draws together, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.parametrisation import Dense, GaussianParametrisation

# Numbers that one batch of draws may hold for each tensor of the model; its graph is kept.
_MAX_NUMBERS = 2**20
# Central differences of gradients, in units of the Gaussian: their errors meet about here.
_STEP = {torch.float64: 1e-4, torch.float32: 1e-2}
# Draws at which autograd's second derivatives are held against differences of its first.
_PROBED = 4


def entries(shape: GaussianParametrisation) -> tuple[Tensor, Tensor]:
    """Rows and columns `[P - D]` of the factor C that the parameters behind the means stand for.

    The first D are its diagonal, by logs.
    """
    device = shape.frame.loc.device
    diagonal = torch.arange(shape.noise, device=device)
    if not isinstance(shape, Dense):
        return diagonal, diagonal
    below = torch.tril_indices(shape.noise, shape.noise, -1, device=device)
    return torch.cat([diagonal, below[0]]), torch.cat([diagonal, below[1]])


def hessian(
    density: Density, shape: GaussianParametrisation, noise: Tensor, progress: Progress
) -> Tensor:
    """Hessian of minus the ELBO at the zero vector of a shape, nats.

    Args:
        density: The model.
        shape: A Gaussian family framed by the member in question: `Dense(gaussian)`, or
            `Diagonal(gaussian, sds)` where the Gaussian itself is diagonal.
        noise: The fixed standard normals, `[S, D]`.
        progress: Told each product.

    Returns:
        `[P, P]`, float64. Parameters are the means, then the entries of C that `entries` names.
    """
    rows, columns = entries(shape)
    dim = shape.noise
    total = torch.zeros(dim + len(rows), dim + len(rows), dtype=torch.float64, device=noise.device)
    data = sum(tensor.numel() for tensor in density.data)
    exact = _differentiable_twice(density, shape, noise[:_PROBED])
    for piece in noise.split(max(1, _MAX_NUMBERS // max(1, data + dim))):
        paired = piece[:, columns]
        z = shape.reparameterise(shape.start(), piece)
        found = _directions(density, shape.frame.scale_tril, z, exact)
        for i, (gradient, second) in enumerate(found):
            products = second[:, rows] * paired
            own = torch.nonzero(rows == i).squeeze(1)
            total[i, :dim] -= second.sum(0)
            total[i, dim:] -= products.sum(0)
            total[dim + own, dim:] -= (piece[:, columns[own]].T @ products).double()
            # C_ii is exp(t_i), whose second derivative is itself.
            total[dim + i, dim + i] -= (gradient * piece[:, i]).sum()
            progress.step(steps=2 * len(z))
    total[dim:, :dim] = total[:dim, dim:].T
    return (total + total.T) / (2 * len(noise))


def _directions(
    density: Density, scale: Tensor, z: Tensor, exact: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Slope `[S]` along each column of a factor, and the slope's gradient `[S, D]`, in its units."""
    points = z.detach().requires_grad_()
    with torch.enable_grad():
        log_prob = density.log_prob(points)
        (gradient,) = torch.autograd.grad(log_prob.sum(), points, create_graph=True)
    inner = gradient.detach() @ scale
    for i in range(z.shape[1]):
        rows = _twice(points, gradient, scale[:, i]) if exact else None
        if rows is None:
            rows = _by_differences(density, z, scale[:, i])
        yield inner[:, i], rows @ scale


def _differentiable_twice(density: Density, shape: GaussianParametrisation, noise: Tensor) -> bool:
    """Whether autograd's second derivatives are true: a model may cut its gradient off.

    In single precision differences are too coarse to tell, and it is taken to be so.
    """
    z = shape.reparameterise(shape.start(), noise)
    if z.dtype != torch.float64:
        return True
    direction = shape.frame.scale_tril.sum(1)
    points = z.detach().requires_grad_()
    with torch.enable_grad():
        total = density.log_prob(points).sum()
        (gradient,) = torch.autograd.grad(total, points, create_graph=True)
    found = _twice(points, gradient, direction)
    if found is None:
        return True  # it says so itself, draw by draw
    expected = _by_differences(density, z, direction) @ shape.frame.scale_tril
    found = found @ shape.frame.scale_tril
    return bool((found - expected).abs().max() <= 1e-3 * (1.0 + expected.abs().max()))


def _by_differences(density: Density, z: Tensor, direction: Tensor) -> Tensor:
    """Each point's Hessian times a vector by central differences of gradients, `[S, D]`."""
    size = _STEP[z.dtype]
    step = size * direction
    ahead, behind = (density.log_prob_and_grad(z + s)[1] for s in (step, -step))
    return (ahead - behind) / (2.0 * size)


def _twice(points: Tensor, gradient: Tensor, direction: Tensor) -> Tensor | None:
    """Each point's Hessian times a vector, `[S, D]`; None where it cannot be had from autograd.

    An operation may have no second derivative, or one that is not finite (`logaddexp` far from a tie).
    """
    if not gradient.requires_grad:
        return torch.zeros_like(points)
    try:
        (rows,) = torch.autograd.grad(
            gradient,
            points,
            direction.expand_as(gradient),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError:
        return None
    return rows.detach() if bool(rows.isfinite().all()) else None

"""Log densities written out by hand, and the comparison of a Density with them."""

import math

import torch
from torch import Tensor

import pyro_vi_kit as vi
from pyro_vi_kit.model.log_density import Density

# Prime and no size of a model here, so that a particle dimension cannot pass for one of theirs.
K = 5


def normal(x, loc=0.0, scale=1.0):
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def gamma(x, shape, rate):
    constant = shape * math.log(rate) - math.lgamma(shape)
    return constant + (shape - 1) * x.log() - rate * x


def beta(x, a, b):
    constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return constant + (a - 1) * x.log() + (b - 1) * (1 - x).log()


def bernoulli(x, logits):
    return x * logits - torch.log1p(logits.exp())


def sigmoid_jacobian(u):
    """log of d sigmoid(u) / du."""
    s = 1 / (1 + (-u).exp())
    return s.log() + (1 - s).log()


def stick_breaking(u):
    """The simplex point of `[n - 1]` unconstrained numbers, and the log determinant."""
    n = len(u) + 1
    left, parts, log_det = torch.ones(()), [], torch.zeros(())
    for i in range(n - 1):
        share = torch.sigmoid(u[i] - math.log(n - 1 - i))
        log_det = log_det + left.log() + share.log() + (1 - share).log()
        parts.append(left * share)
        left = left * (1 - share)
    return torch.stack([*parts, left]), log_det


def density_of(fn, *args, dtype=torch.float64, **kwargs) -> Density:
    return Density(vi.Model(fn, *args, kwargs=kwargs), dtype=dtype)


def points(dim, seed=0, k=K, spread=0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(k, dim, generator=generator, dtype=torch.float64)


def value_and_grad(hand, z):
    """A hand-written density and its gradient, one point after another."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        leaves = [row.clone().requires_grad_() for row in z]
        values = [hand(leaf) for leaf in leaves]
        grads = torch.autograd.grad(torch.stack(values).sum(), leaves)
    finally:
        torch.set_default_dtype(default)
    return torch.stack(values).detach(), torch.stack(grads)


def assert_agrees(density, hand, dim):
    """Value and gradient equal the hand-written ones at K points, to rounding of float64."""
    assert density.dim == dim
    z = points(dim)
    value, grad = density.log_prob_and_grad(z)
    expected, expected_grad = value_and_grad(hand, z)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)

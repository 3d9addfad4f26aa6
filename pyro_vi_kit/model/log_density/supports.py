"""Maps from unconstrained space to a site's support, those that torch and Pyro lack among them."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.transforms import CholeskyTransform
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_vi_kit.core.errors import ModelError


def bijector(name: str, fn: Any) -> Any:
    """The map from unconstrained space to the support of a site's distribution, as it is now.

    Beside torch's own: matrices by their Cholesky factor, and a von Mises angle within (-pi, pi), where
    Pyro draws it. torch calls its support real, on which a periodic density has no integral.

    Raises:
        ModelError: If there is none.
    """
    if isinstance(_base(fn), torch.distributions.VonMises):
        turn = Turn()
        return IndependentTransform(turn, fn.event_dim) if fn.event_dim else turn
    try:
        return _map(fn.support)
    except NotImplementedError as error:
        kind = _base(fn)
        remedy = (
            "Register one with torch.distributions.biject_to.register, or build the value from sites "
            "that have one (a covariance from LKJCholesky and a vector of scales)."
        )
        if isinstance(kind, dist.ProjectedNormal | dist.VonMises3D):
            remedy = (
                "Make it a ProjectedNormal under poutine.reparam(config={"
                f"{name!r}: pyro.infer.reparam.ProjectedNormalReparam()}})."
            )
        raise ModelError(
            f"site {name!r}: the support of {type(fn).__name__}, {fn.support}, has no map from "
            f"unconstrained space. {remedy}"
        ) from error


def _base(fn: Any) -> Any:
    """The distribution inside masks, expansions and event dims."""
    while isinstance(fn, TorchDistributionMixin) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _map(support: Any) -> Any:
    if isinstance(support, type(constraints.lower_cholesky)):
        return LowerCholesky()
    if isinstance(support, type(constraints.positive_definite)):
        return ComposeTransform([LowerCholesky(), CholeskyTransform().inv])
    if isinstance(support, constraints.independent):
        base = _map(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    if isinstance(support, MixtureSameFamilyConstraint) and _is_fixed(support.base_constraint):
        return _map(support.base_constraint)  # of each component, and so of them all
    return biject_to(support)


def _is_fixed(support: Any) -> bool:
    """Whether a support depends on no parameter of its distribution."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return not any(isinstance(value, Tensor) for value in vars(support).values())


class Turn(ComposeTransform):
    """A number to an angle within (-pi, pi), of a distribution that is periodic in it."""

    def __init__(self) -> None:
        super().__init__(biject_to(constraints.interval(-math.pi, math.pi)).parts)


class LowerCholesky(Transform):
    """A vector of n (n + 1) / 2 numbers to a lower triangular matrix with a positive diagonal.

    Row by row; the diagonal is the exponential of its numbers.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowerCholesky)

    __hash__ = None

    def _call(self, x: Tensor) -> Tensor:
        n = _rows(x.shape[-1])
        below = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        diagonal = torch.eye(n, device=x.device) > 0
        # Where each entry of the matrix stands in the vector; what lies above is hidden afterwards.
        place = (below.flatten().cumsum(0) - 1).clamp(min=0)
        matrix = x[..., place].reshape(*x.shape[:-1], n, n)
        lower = torch.where(diagonal, torch.zeros_like(matrix), matrix)
        positive = torch.where(diagonal, matrix, torch.zeros_like(matrix)).exp()
        return torch.where(diagonal, positive, torch.where(below, lower, torch.zeros_like(lower)))

    def _inverse(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        diagonal = torch.eye(n, device=y.device) > 0
        logs = torch.where(diagonal, y, torch.ones_like(y)).log()
        row, column = torch.tril_indices(n, n, device=y.device)
        return torch.where(diagonal, logs, y)[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the diagonal's logs, `[...]`."""
        n = _rows(x.shape[-1])
        return x[..., torch.arange(1, n + 1, device=x.device).cumsum(0) - 1].sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """The matrix's shape."""
        n = _rows(shape[-1])
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """The vector's shape."""
        n = shape[-1]
        return torch.Size((*shape[:-2], n * (n + 1) // 2))


def _rows(numbers: int) -> int:
    return (math.isqrt(8 * numbers + 1) - 1) // 2

"""Where a site's values may be: maps from unconstrained space to its support, and where it is defined.

Torch and Pyro lack some of the maps. Of arguments and data Pyro's validation raises where they leave
their constraints. Evaluations run without it, and formulas go on without a word: the log gamma function
of a negative number is finite, and a probability of 1.3 is clamped. There the density is zero instead
(`Visit.unscaled`), which guides, samplers and importance weights understand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, TorchDistributionMixin
from pyro.distributions.transforms import CholeskyTransform
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    TransformedDistribution,
    biject_to,
    constraints,
)
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform
from torch.distributions.utils import lazy_property

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import broadcast_shapes

# As torch's own check of a simplex has it.
_SIMPLEX_ERROR = 1e-6


def layers(fn: Any) -> Iterator[Any]:
    """A distribution, and what is inside of its masks, expansions and event dims, one by one."""
    yield fn
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
        yield fn


def innermost(fn: Any) -> Any:
    """The distribution inside masks, expansions and event dims."""
    return [*layers(fn)][-1]


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
    held = vars(of_one_number(support)).values()
    return not any(isinstance(value, Tensor) for value in held)


def of_one_number(constraint: Any) -> Any:
    """A constraint without what `independent` makes of it: that of one number, or one vector."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


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


# -- where a distribution is defined ---------------------------------------------------------------


class Bound(NamedTuple):
    """How far inside of its constraint something is.

    Attributes:
        what: It and the constraint, in words.
        margin: `[*batch]` of the site; negative outside.
    """

    what: str
    margin: Tensor


# Distributions that a run has made since its last site: a factor's own are among them.
_made: list[Any] = []


def note(fn: Any) -> None:
    """Keep a distribution as it is made, inside `compat.plain`."""
    _made.append(fn)


def taken() -> list[Any]:
    """The distributions made since this was last asked."""
    made = _made.copy()
    _made.clear()
    return made


def bounds(fn: Any, value: Tensor | None, made: Sequence[Any] = ()) -> list[Bound]:
    """Every constraint that can be told, of a distribution and of those that it is made of.

    What is not a number is not outside: the density is none there either.

    Args:
        fn: The site's distribution.
        value: What was observed; None for a latent, which is inside its support by its transform.
        made: Distributions that a factor was computed by.
    """
    batch = len(fn.batch_shape)
    found: list[Bound] = []
    try:
        found += _bounds(fn, value, batch)
        for other in made:
            found += (Bound(b.what, _fitted(b.margin, fn)) for b in _bounds(other, None, batch))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, ValueError):
        pass  # a distribution that does not say what it is made of
    return found


def _bounds(fn: Any, value: Tensor | None, batch: int) -> Iterator[Bound]:
    if isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        yield from _bounds(fn.base_dist, value, batch)
        return
    inner = len(fn.batch_shape) - batch
    name = type(fn).__name__
    for argument, constraint in (_told(fn, "arg_constraints") or {}).items():
        given = _argument(fn, argument)
        margin = None if given is None else _margin(constraint, given)
        if margin is not None:
            yield Bound(
                f"{argument!r} of its {name} is not {_words(constraint)}", _of(margin, inner)
            )
    if isinstance(fn, TransformedDistribution):
        yield from _bounds(fn.base_dist, _inverted(fn, value), batch)
        return
    support = None if value is None else _told(fn, "support")
    margin = None if value is None or support is None else _margin(support, value)
    if margin is not None:
        yield Bound(f"data are outside the support of its {name}", _of(margin, inner))
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from _bounds(part, None, batch)


def _fitted(margin: Tensor, fn: Any) -> Tensor:
    """The margin of a distribution that a factor was computed by, in the factor's own batch.

    Where the two have other shapes (what was summed over is the last dim, say), one number for all.
    """
    try:
        fits = broadcast_shapes(margin.shape, fn.batch_shape) == fn.batch_shape
    except RuntimeError:
        fits = False
    return margin if fits or not margin.numel() else margin.min()


def _told(fn: Any, name: str) -> Any:
    """What a distribution says of itself; None where it does not, as a user's own need not."""
    try:
        return getattr(fn, name, None)
    except NotImplementedError:
        return None


def _argument(fn: Any, name: str) -> Tensor | None:
    """An argument that the distribution was made with, not one that would have to be computed."""
    if name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property):
        return None
    value = getattr(fn, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def _inverted(fn: TransformedDistribution, value: Tensor | None) -> Tensor | None:
    """What the base distribution made a value of."""
    for transform in reversed(fn.transforms):
        value = None if value is None else transform.inv(value)
    return value


def _margin(constraint: Any, value: Tensor) -> Tensor | None:
    """How far inside a value is, event dims reduced; None for constraints without bounds.

    Real numbers have none, and of what a matrix factor has to be its own logarithm knows. A little
    beyond the boundary, as rounding may put it, is inside.
    """
    dims = 0
    while isinstance(constraint, constraints.independent):
        dims += constraint.reinterpreted_batch_ndims
        constraint = constraint.base_constraint
    value = value.detach()
    low, high = (b.detach() if isinstance(b, Tensor) else b for b in ends(constraint))
    if isinstance(constraint, type(constraints.simplex)):
        error = _SIMPLEX_ERROR - (value.sum(-1) - 1.0).abs()
        margin = torch.minimum(value.amin(-1), error)
    elif low is not None and high is not None:
        margin = torch.minimum(value - low, high - value)
    elif low is not None:
        margin = value - low
    elif high is not None:
        margin = high - value
    else:
        return None
    if not margin.is_floating_point():
        margin = margin.to(torch.get_default_dtype())
    # Sums of some hundred terms round by less: 4e-11 in float64, 2e-5 in float32.
    margin = margin + torch.finfo(margin.dtype).eps ** (2 / 3)
    return _of(margin, dims)


def ends(constraint: Any) -> tuple[Any, Any]:
    """The bounds of an interval of numbers."""
    low, high = (getattr(constraint, f"{end}_bound", None) for end in ("lower", "upper"))
    if (low is None and high is None) or constraint.event_dim:
        return None, None
    return low, high


def _of(margin: Tensor, inner: int) -> Tensor:
    """The least margin over so many dims from the right."""
    inner = min(inner, margin.dim())
    return margin.amin(tuple(range(-inner, 0))) if inner > 0 else margin


def _words(constraint: Any) -> str:
    constraint = of_one_number(constraint)
    if isinstance(constraint, type(constraints.simplex)):
        return "on the simplex"
    low, high = ends(constraint)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return "inside its bounds"
    if low is None or high is None:
        return f"above {low:g}" if high is None else f"below {high:g}"
    return f"between {low:g} and {high:g}"

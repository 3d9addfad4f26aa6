"""Where a distribution is defined: its arguments, and what was observed of it, inside their constraints.

Pyro's validation raises elsewhere. Evaluations run without it, and formulas go on without a word: the
log gamma function of a negative number is finite, and a probability of 1.3 is clamped. There the density
is zero instead (`Visit.unscaled`), which guides, samplers and importance weights understand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, constraints
from torch.distributions.utils import lazy_property

from pyro_vi_kit.core.runtime import broadcast_shapes

# As torch's own check of a simplex has it.
_SIMPLEX_ERROR = 1e-6


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
    low, high = map(_plain, ends(constraint))
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


def _plain(bound: Any) -> Any:
    return bound.detach() if isinstance(bound, Tensor) else bound


def _of(margin: Tensor, inner: int) -> Tensor:
    """The least margin over so many dims from the right."""
    inner = min(inner, margin.dim())
    return margin.amin(tuple(range(-inner, 0))) if inner > 0 else margin


def _words(constraint: Any) -> str:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, type(constraints.simplex)):
        return "on the simplex"
    low, high = ends(constraint)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return "inside its bounds"
    if low is None or high is None:
        return f"above {low:g}" if high is None else f"below {high:g}"
    return f"between {low:g} and {high:g}"
